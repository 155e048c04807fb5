"""No demonstration reaches the policy but through the discriminator's scores.

The controller drives the real discriminator trainer, scorer and policy learner in this process. Once the
discriminator has been updated, its demonstrations can be exchanged for others and the policy's next update
does not change by one bit; exchanged before the update, it does change, so the comparison can fail.
"""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from discriminator.scorer import Scorer
from discriminator.trainer import DiscriminatorTrainer
from learner.policy import PolicyLearner
from rollout.data import DataSplits, load_data
from rollout.prompts import PromptSource
from rollout.templates import Renderer, load_tokenizer
from rollout.trajectory import TRAJECTORY_SCHEMA, text_and_token_ends, trajectories, trajectory_id
from services.config import Config, load
from services.controller import Controller
from services.demonstrations import Demonstrations

STAMPED = ["disc_version", "score", "token_rewards", "last_reward"]


@pytest.fixture(scope="module")
def other_demonstrations(tiny_demonstrations: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same prompts with quite other answers."""
    path = tmp_path_factory.mktemp("data") / "others.jsonl"
    lines = [json.loads(line) for line in tiny_demonstrations.read_text().splitlines()]
    path.write_text(
        "".join(json.dumps(row | {"response": "naïve façade, 東京 and Größe"}) + "\n" for row in lines)
    )
    return path


def configuration(model: Path, demonstrations: Path) -> Config:
    words = {
        "policy.model": model,
        "data.demonstrations": demonstrations,
        "policy.dtype": "float32",
        "run.steps": 2,
        "run.prompts_per_step": 4,
        "sampling.group_size": 4,
        "sampling.max_tokens": 12,
        "data.max_prompt_tokens": 32,
        "learner.device": "cpu",
        "learner.lr": 1e-3,
        "learner.threads": 1,
        "discriminator.device": "cpu",
        "discriminator.lr": 2e-3,
        "discriminator.batch_size": 16,
        "discriminator.threads": 1,
    }
    return load(None, [f"--{name}={value}" for name, value in words.items()])


class OneProcess:
    """The words of `services.system.System` with real trainer, scorer and learner; responses are noise."""

    def __init__(self, config: Config, *, swap: Callable[["OneProcess"], None] | None = None) -> None:
        self.renderer = Renderer(load_tokenizer(config.policy), config.data, config.policy)
        self.splits = load_data(config.data, self.renderer)
        self.config = config
        self.swap = swap
        self.demonstrations = self.canonical(self.splits)
        self.prompts = PromptSource(
            self.splits.rollout_prompts(), self.renderer.encode, config.sampling.group_size, 0
        )
        model = config.policy.model
        self.trainer = DiscriminatorTrainer(config.discriminator, model, model_dtype="float32")
        self.scorer = Scorer(config.discriminator, model, model_dtype="float32")
        self.learner = PolicyLearner(model, config.learner, model_dtype="float32")
        self.published: dict[int, Any] = {}
        self.disc_version = 0
        self.replacements = self.sync_failures = 0
        self.resident: dict[str, float] = {}
        self._publish(0)
        self.seen: list[pa.Table] = []

    def canonical(self, splits: DataSplits) -> Demonstrations:
        return Demonstrations(
            splits,
            self.renderer.tokenizer,
            self.config.discriminator.canonical,
            self.config.sampling.max_tokens,
        )

    def _publish(self, version: int) -> None:
        published = self.trainer.publish()
        assert published is not None
        self.published[version] = (published.checksum, published.state)

    async def generate(self, requests: pa.Table, min_version: int) -> pa.Table:
        rows = []
        for request in requests.to_pylist():
            rng = np.random.default_rng(request["seed"])
            for sample in range(request["n"]):
                ids = rng.integers(5, 300, int(rng.integers(3, 12))).tolist()
                text, ends = text_and_token_ends(
                    ids, lambda i: self.renderer.tokenizer.decode(i, skip_special_tokens=True)
                )
                rows.append(
                    {
                        **{
                            name: request[name]
                            for name in ("group_id", "prompt_id", "step", "prompt_text", "prompt_ids")
                        },
                        "trajectory_id": trajectory_id(request["group_id"], sample),
                        "sample": sample,
                        "response_ids": ids,
                        "response_logprobs": rng.normal(-5.5, 0.5, len(ids)).tolist(),
                        "response_text": text,
                        "token_ends": ends,
                        "finish_reason": "stop",
                        "policy_version": min_version,
                        "policy_version_end": min_version,
                        "worker": 0,
                    }
                )
        return trajectories(rows)

    async def score(self, batch: pa.Table, version: int) -> list[dict[str, Any]]:
        if version == 1 and self.swap is not None:
            self.swap(self)
        self.scorer.ensure(version, self.published.__getitem__)
        answers = []
        for row in batch.to_pylist():
            [[scored]] = self.scorer.score(version, [row["prompt_text"]], [[(row["response_text"], True)]])
            answers.append({"scores": scored.scores, "spans": scored.spans})
        return answers

    async def reward_inputs(self, batch: pa.Table, version: int) -> dict[str, list[float]]:
        return {}

    async def learn(self, scored: pa.Table, step: int, lr_factor: float) -> list[dict[str, float]]:
        self.seen.append(scored)
        return [self.learner.train_step(scored, step, lr_factor)]

    async def sync(self, version: int) -> dict[str, float]:
        return {}

    async def discriminate(self, batch: pa.Table, step: int) -> dict[str, Any]:
        metrics = self.trainer.update(batch, self.demonstrations.train, step)
        self._publish(step + 1)
        self.disc_version = step + 1
        return dict(metrics)


def policy_after(system: OneProcess) -> dict[str, torch.Tensor]:
    """The policy's weights after the two steps, as they would be broadcast."""
    controller = Controller(system.config, system, lambda step, row: None, lambda phase: None)  # type: ignore[arg-type]

    async def every_step(step: int) -> None:
        return None

    asyncio.run(controller.run(every_step))
    assert system.disc_version == 2
    weights: dict[str, torch.Tensor] = {}
    system.learner.weights(lambda name, tensor: weights.__setitem__(name, tensor.clone()))
    return weights


@pytest.fixture(scope="module")
def undisturbed(tiny_model: Path, tiny_demonstrations: Path) -> tuple[OneProcess, dict[str, torch.Tensor]]:
    system = OneProcess(configuration(tiny_model, tiny_demonstrations))
    return system, policy_after(system)


def test_demonstrations_exchanged_after_the_update_leave_the_policy_as_it_is(
    undisturbed, tiny_model, tiny_demonstrations, other_demonstrations
):
    exchanged = []

    def swap(system: OneProcess) -> None:
        data = system.config.data.model_copy(update={"demonstrations": str(other_demonstrations)})
        system.splits = load_data(data, system.renderer)
        system.demonstrations = system.canonical(system.splits)
        exchanged.append(system.demonstrations.train["response_text"][0].as_py())

    weights = policy_after(OneProcess(configuration(tiny_model, tiny_demonstrations), swap=swap))
    assert exchanged
    assert "façade" in exchanged[0]
    assert weights.keys() == undisturbed[1].keys()
    assert all(torch.equal(tensor, undisturbed[1][name]) for name, tensor in weights.items())


def test_demonstrations_exchanged_before_the_update_change_it(undisturbed, tiny_model, other_demonstrations):
    weights = policy_after(OneProcess(configuration(tiny_model, other_demonstrations)))
    assert any(not torch.equal(tensor, undisturbed[1][name]) for name, tensor in weights.items())


def test_the_learner_is_handed_trajectories_and_scores_and_nothing_else(undisturbed):
    system, _ = undisturbed
    answers = set(system.splits.train["response"].to_pylist())
    for table in system.seen:
        assert table.column_names == TRAJECTORY_SCHEMA.names + STAMPED
        assert not answers & set(table["response_text"].to_pylist())
