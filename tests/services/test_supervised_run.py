"""The supervised loop against a learner in memory: what it trains on, when it stops, what is restored."""

import asyncio
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from discriminator.config import CanonicalConfig
from rollout.config import DataConfig, PolicyConfig
from rollout.data import load_data
from rollout.templates import Renderer, load_tokenizer
from services.answers import HumanNLL, human_answers
from services.config import Config, load
from services.supervised.controller import SupervisedController, examples_of


def configuration(model: Path, demonstrations: Path, **fields: Any) -> Config:
    words = {
        "run.method": "sft",
        "run.steps": 12,
        "policy.model": model,
        "data.demonstrations": demonstrations,
        "data.max_prompt_tokens": 32,
        "sampling.max_tokens": 6,
        "evaluation.every": 4,
        "learner.sft.batch_size": 16,
        "learner.sft.check_every": 2,
        "learner.sft.patience": 2,
    }
    return load(None, [f"--{name}={value}" for name, value in (words | fields).items()])


class Machine:
    """A learner whose weights are the number of its steps, and whose likelihood is given for each."""

    def __init__(self, config: Config, likelihoods: dict[int, float]) -> None:
        self.renderer = Renderer(load_tokenizer(config.policy), config.data, config.policy)
        self.splits = load_data(config.data, self.renderer)
        self.likelihoods = likelihoods
        self.weights = self.kept = self.served = 0
        self.resident = {"rollout": 300.0}
        self.trained: list[pa.Table] = []
        self.served_at: list[tuple[int, int]] = []

    async def learn(self, examples: pa.Table) -> list[dict[str, Any]]:
        self.trained.append(examples)
        self.weights += 1
        return [{"nll": 1.0, "tokens_response": 10.0}]

    async def human_nll(self, split: pa.Table, prompts: int) -> HumanNLL:
        assert split is self.splits.selection
        return HumanNLL(per_token=self.likelihoods[self.weights], tail=0.0)

    async def keep(self) -> None:
        self.kept = self.weights

    async def restore(self) -> None:
        self.weights = self.kept

    async def sync(self, version: int) -> dict[str, float]:
        self.served = self.weights
        self.served_at.append((version, self.weights))
        return {}


def drive(machine: Machine, config: Config, state: Any = None, stop: int | None = None) -> Any:
    """Run to its end; the controller, its metrics by step and the weights each step left behind."""
    observed: dict[int, dict[str, Any]] = {}
    controller = SupervisedController(config, machine, observed.__setitem__, lambda phase: None)  # type: ignore[arg-type]
    if state is not None:
        controller.load_state(state)
    left: dict[int, int] = {}

    async def every_step(step: int) -> None:
        left[step] = machine.weights
        controller.stopping = step == stop

    asyncio.run(controller.run(every_step))
    return controller, observed, left


FALLING = {step: 5.0 - step for step in range(13)}
TURNING = {step: abs(step - 4.0) + 1 for step in range(13)}


@pytest.fixture
def files(tiny_model: Path, tiny_demonstrations: Path) -> tuple[Path, Path]:
    return tiny_model, tiny_demonstrations


def test_patience_ends_the_run_at_the_best_weights(files):
    config = configuration(*files)
    machine = Machine(config, TURNING)
    controller, observed, left = drive(machine, config)
    assert list(observed) == list(range(1, 9)), "looks at 6 and 8 brought nothing"
    assert controller.finished
    assert left == {**{step: step for step in range(1, 8)}, 8: 4}
    assert machine.served_at == [(4, 4), (8, 4)], "workers hold what an evaluation judges, the last the best"
    assert controller.facts() == {
        "prompts_seen": 8 * 16,
        "early_stopping": {"ended_by": "patience", "restored_step": 4, "selection_nll": 1.0},
    }
    assert [step for step, row in observed.items() if row["selection"]] == [2, 4, 6, 8]
    assert observed[6]["selection"] == {"nll": 3.0, "best_nll": 1.0, "looks_without_improvement": 1}


def test_a_run_that_only_gets_better_ends_with_its_steps(files):
    config = configuration(*files, **{"run.steps": 7})
    machine = Machine(config, FALLING)
    controller, observed, left = drive(machine, config)
    assert left[7] == machine.served == 7, "the last step is looked at, whatever check_every"
    assert controller.facts()["early_stopping"]["ended_by"] == "steps"
    assert len(observed) == 7


def test_a_run_that_only_gets_worse_ends_at_the_base_model(files):
    config = configuration(*files)
    machine = Machine(config, {step: 5.0 + step for step in range(13)})
    controller, _, left = drive(machine, config)
    assert controller.step == 4
    assert left[4] == machine.served == 0


def test_examples_are_the_training_answers_as_the_evaluation_spells_them(files):
    config = configuration(*files, **{"run.steps": 3})
    machine = Machine(config, FALLING)
    drive(machine, config)
    expected = human_answers(machine.splits.train, machine.renderer, 6, config.discriminator.canonical)
    end = machine.renderer.end_id
    rows = {json.dumps(row) for row in expected.to_pylist()}
    for table in machine.trained:
        assert table.num_rows == 16
        assert {json.dumps(row) for row in table.to_pylist()} <= rows
    held = machine.splits.selection["prompt_id"].to_pylist()
    assert not {g for table in machine.trained for g in table["group_id"].to_pylist()} & set(held)
    texts = machine.splits.train["response"].to_pylist()
    for text, ids in zip(texts, expected["response_ids"].to_pylist(), strict=True):
        assert ids == [*machine.renderer.tokenizer(text, add_special_tokens=False)["input_ids"], end][:6]


@pytest.mark.parametrize(
    ("said", "whitespace", "learned"),
    [
        (" fac\u0327ade\u2028of  stone \n", "collapse", " façade\nof stone"),
        (" fac\u0327ade\u2028of  stone \n", "outer", " façade\nof  stone"),
        ("  of  stone ", "off", "  of  stone "),
        (" of stone", "collapse", " of stone"),
    ],
)
def test_human_answers_are_spelled_as_the_discriminator_reads_them(tiny_model, said, whitespace, learned):
    """But for the whitespace that joins them to their prompts."""
    policy = PolicyConfig(model=str(tiny_model))
    renderer = Renderer(load_tokenizer(policy), DataConfig(), policy)
    split = pa.table({"prompt_id": ["a"], "prompt_text": ["the cat"], "response": [said]})
    ids = human_answers(split, renderer, 99, CanonicalConfig(whitespace=whitespace))["response_ids"][
        0
    ].as_py()
    assert renderer.tokenizer.decode(ids[:-1]) == learned
    assert ids[-1] == renderer.end_id


def test_every_epoch_holds_every_example_once_in_an_order_of_its_own():
    rows = np.concatenate([examples_of(step, 50, 16, seed=3) for step in range(25)])
    epochs = rows.reshape(8, 50)
    assert all(Counter(epoch) == Counter(range(50)) for epoch in epochs.tolist())
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 8
    assert not np.array_equal(examples_of(0, 50, 16, seed=4), rows[:16])
    assert len(examples_of(0, 5, 16, seed=0)) == 16, "a batch may be longer than an epoch"


def test_a_resumed_run_equals_the_unbroken_one(files):
    config = configuration(*files)
    whole = Machine(config, TURNING)
    unbroken, rows, _ = drive(whole, config)
    first = Machine(config, TURNING)
    stopped, before, left = drive(first, config, stop=5)
    assert not stopped.finished
    assert left[5] == 5, "nothing is restored before the end"
    second = Machine(config, TURNING)
    second.weights, second.kept = first.weights, first.kept
    state = json.loads(json.dumps(stopped.state()))
    resumed, after, _ = drive(second, config, state=state)
    assert [t.to_pylist() for t in first.trained + second.trained] == [t.to_pylist() for t in whole.trained]
    assert {**before, **after}.keys() == rows.keys()
    assert all({**before, **after}[step]["selection"] == rows[step]["selection"] for step in rows)
    assert resumed.budget == unbroken.budget
    assert second.weights == whole.weights == 4


def test_only_trained_tokens_are_charged(files):
    config = configuration(*files, **{"run.steps": 2})
    machine = Machine(config, FALLING)
    controller, _, _ = drive(machine, config)
    tokens = 0
    for table in machine.trained:
        prompts = {row["group_id"]: len(row["prompt_ids"]) for row in table.to_pylist()}
        tokens += sum(prompts.values()) + sum(len(ids) for ids in table["response_ids"].to_pylist())
    assert controller.budget.state() == {
        "rollout_tokens": 0, "learner_tokens": tokens, "learner_forward_tokens": 0, "discriminator_tokens": 0
    }  # fmt: skip
    assert controller.ledger.check()["submitted"] == 0
