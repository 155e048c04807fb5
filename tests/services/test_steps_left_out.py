"""Steps and samples that are not finite: left out, counted, kept, and the end at a limit."""

import asyncio
import json
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from machine import PROMPTS, SAMPLES, Machine, configuration, drive

from services.checkpoint import Checkpoints
from services.not_finite import NotFinite, NotFiniteError, finite_rows
from services.run_life import RunLife
from services.saving import Saver
from services.watching.alarms import AlarmBounds, not_finite

BATCH = PROMPTS * SAMPLES


class Broken(Machine):
    """Its learner skips some steps, its scores and log-probabilities of some are not finite."""

    def __init__(self, skips=(), scores=(), logprobs=(), whole=False) -> None:
        super().__init__()
        self.skips, self.bad_scores, self.bad_logprobs, self.whole = skips, scores, logprobs, whole

    async def generate(self, requests, min_version):
        batch = await super().generate(requests, min_version)
        step = requests["step"][0].as_py()
        rows = batch["response_logprobs"].to_pylist()
        if step in self.bad_logprobs:
            rows[: BATCH if self.whole else 1] = [[-1.0, math.nan, -1.0]] * (BATCH if self.whole else 1)
        column = pa.array(rows, batch.schema.field("response_logprobs").type)
        return batch.set_column(batch.column_names.index("response_logprobs"), "response_logprobs", column)

    async def score(self, batch, version):
        answers = await super().score(batch, version)
        if version in self.bad_scores:
            for answer in answers if self.whole else answers[:1]:
                answer["scores"] = np.array([0.1, np.inf, 0.2])
        return answers

    async def learn(self, scored, step, lr_factor):
        self.learned = step
        metrics = await super().learn(scored, step, lr_factor)
        bad = step in self.skips
        return [metrics[0] | {"skipped": float(bad), "grad_norm": math.nan if bad else 1.0}]

    async def sync(self, version):
        self.learned = version
        return await super().sync(version)


@pytest.fixture
def config(tmp_path):
    return lambda **run: configuration(output=str(tmp_path), name="run", **run)


def balanced(observed) -> bool:
    rows = [row["responses"] for row in observed.values()]
    return all(row["submitted"] == sum(n for name, n in row.items() if name != "submitted") for row in rows)


def test_a_step_that_was_skipped_counts_as_dropped_and_its_samples_are_kept(config, tmp_path):
    machine = Broken(skips=(1, 3))
    controller, observed = drive(machine, config(steps=5))
    assert controller.ledger.dropped == {"not_finite": 2 * BATCH}
    assert controller.ledger.trained == 3 * BATCH
    assert balanced(observed)
    assert [row["not_finite"].get("policy", 0) for row in observed.values()] == [0, 1, 1, 2, 2]
    kept = pq.read_table(tmp_path / "run/not-finite/policy-000002.parquet")
    assert kept["response_text"].to_pylist() == machine.trained[1]["response_text"].to_pylist()
    cases = [json.loads(line) for line in (tmp_path / "run/not-finite/cases.jsonl").open()]
    assert [(case["step"], case["grad_norm"]) for case in cases] == [(2, None), (4, None)]
    state = json.loads(json.dumps(controller.state()))
    assert state["not_finite"] == {"policy": 2}


@pytest.mark.parametrize("what", ["scores", "logprobs"])
def test_a_group_that_is_not_finite_is_dropped_before_the_update(config, tmp_path, what):
    machine = Broken(**{what: (2,)})
    controller, observed = drive(machine, config(steps=4))
    assert controller.ledger.dropped == {f"{what}_not_finite": SAMPLES}
    assert controller.ledger.trained == 4 * BATCH - SAMPLES
    assert balanced(observed)
    assert [table.num_rows for table in machine.trained] == [BATCH, BATCH, BATCH - SAMPLES, BATCH]
    assert observed[3]["not_finite"] == {what: 1}
    assert pq.read_table(tmp_path / f"run/not-finite/{what}-000003.parquet").num_rows == 1


def test_a_step_without_a_finite_score_is_skipped(config):
    machine = Broken(scores=(1,), whole=True)
    controller, observed = drive(machine, config(steps=4))
    assert len(machine.trained) == 3
    assert controller.ledger.trained == 3 * BATCH
    assert controller.ledger.dropped == {"scores_not_finite": BATCH}
    assert observed[2]["policy"] == {"skipped": 1.0}
    assert balanced(observed)
    assert machine.serving == 4


def test_a_broken_sampler_ends_the_run(config):
    with pytest.raises(NotFiniteError, match="step 2: log-probabilities of every group are not finite"):
        drive(Broken(logprobs=(1,), whole=True), config(steps=4))


def test_the_limit_is_of_steps_in_a_row_of_one_side(tmp_path):
    account, table = NotFinite(tmp_path, 2), pa.table({"x": [1]})

    def saw(side, *bad):
        for step, value in enumerate(bad):
            account.saw(side, step, bad=value, samples=table, what={})
            account.check()

    saw("policy", True, False, True)
    assert account.active
    saw("discriminator", True, False)
    with pytest.raises(NotFiniteError, match=r"policy: .* 2 steps in a row .* lower learner\.lr"):
        saw("policy", True)
    assert account.counts == {"policy": 3, "discriminator": 1}


def test_finite_rows_of_ragged_columns():
    rows = [[1.0], [], [1.0, math.inf], [math.nan], [2.0, 3.0]]
    table = pa.table({"x": pa.chunked_array([rows[:2], rows[2:]], pa.list_(pa.float32()))})
    assert finite_rows(table["x"]).to_pylist() == [True, True, False, False, True]
    assert finite_rows(table["x"].slice(3)).to_pylist() == [False, True]


class Life(RunLife):
    """A run's life without its processes: what it notes, reloads and saves."""

    def __init__(self, config, folder) -> None:
        self.config = config
        self.checkpoints = Checkpoints(folder, 2)
        self.rollbacks = 0
        self.done: list[Any] = []
        self.account = NotFinite(folder, config.run.max_skipped)
        self.system: Any = SimpleNamespace(reload=self._reload)
        self.display: Any = SimpleNamespace(note=self.done.append)
        self.saver = Saver(self.checkpoints, config.run.checkpoint_every, self.display.note)
        self.controller: Any = SimpleNamespace(
            not_finite=self.account, quiesce=lambda: asyncio.sleep(0), finished=False
        )

    def _record(self, step) -> None:
        pass

    async def _reload(self, folder) -> None:
        self.done.append(folder)

    async def _save(self) -> None:
        self.done.append("saved")

    async def steps(self, *bad: bool) -> None:
        for step, value in enumerate(bad, start=1):
            self.account.saw("policy", step, bad=value, samples=pa.table({"x": [1]}), what={})
            await self._after_step(step)


def test_no_checkpoint_is_made_while_steps_are_skipped(config, tmp_path):
    life = Life(config(steps=9, checkpoint_every=1), tmp_path)
    asyncio.run(life.steps(False, True, True, False))
    assert life.done == ["saved", "saved"]


def test_the_limit_ends_the_run_or_goes_back_as_often_as_the_setting_says(config, tmp_path):
    life = Life(config(steps=99, max_skipped=2, rollbacks=1, checkpoint_every=0), tmp_path)
    life.checkpoints.begin(7)
    kept = life.checkpoints.commit(7, {})
    with pytest.raises(NotFiniteError, match="in 2 steps in a row"):
        asyncio.run(life.steps(True, True, False, True, True))
    note, reloaded = life.done
    assert reloaded == kept
    assert note.endswith("going back to the weights of step-000007")
    assert life._way_on("the run ended") == "the run ended; --resume goes on from step 7"


def test_a_skipped_step_raises_the_alarm():
    rows = [{"step": 1, "policy/skipped": 0.0}, {"step": 2, "policy/skipped": 0.25}]
    assert not_finite(rows[:1], AlarmBounds()) is None
    assert not_finite(rows, AlarmBounds()) == "not finite: policy/skipped"
