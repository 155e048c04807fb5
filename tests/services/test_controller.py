"""The controller's loop and clocks against a small in-memory system: bounds, overlap, accounts, state.

The system stands in for the processes, not for the controller: it samples with the weights it holds, stamps
what it made with their versions, refuses prompts for weights it does not have yet, and writes down what
happened when.
"""

import asyncio
import json
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from rollout.data import prompt_id
from rollout.prompts import PromptSource
from rollout.trajectory import TRAJECTORY_SCHEMA, trajectories, trajectory_id
from services.config import Config, load
from services.controller import Controller

PROMPTS, SAMPLES = 3, 2
TICK = 0.002

Event = tuple[str, int]


def configuration(**run: Any) -> Config:
    overrides = [f"--run.{name}={str(value).lower()}" for name, value in run.items()]
    return load(
        None,
        [
            "--policy.model=m",
            "--data.demonstrations=d",
            f"--run.prompts_per_step={PROMPTS}",
            f"--sampling.group_size={SAMPLES}",
            *overrides,
        ],
    )


class Machine:
    """Policy weights, discriminator and prompts of a run in one process; every answer takes some ticks."""

    def __init__(self, *, generating: int = 2, learning: int = 4, judging: int = 3) -> None:
        texts = [f"prompt {i}" for i in range(20)]
        table = pa.table({"prompt_id": [prompt_id(t) for t in texts], "prompt_text": texts})
        self.prompts = PromptSource(table, lambda text: list(text.encode()), SAMPLES, seed=1)
        self.ticks = {"generate": generating, "learn": learning, "discriminate": judging}
        self.serving = 0
        self.disc_version = 0
        self.replacements = self.sync_failures = 0
        self.resident = {"rollout": 300.0, "scoring": 200.0}
        self.learned = 0
        self.events: list[Event] = []
        self.scored: list[tuple[int, int]] = []
        self.trained: list[pa.Table] = []
        self.judged: list[int] = []
        self.aged: dict[str, int] = {}
        """Groups that come back that many versions older than they are."""
        self.breaks: int | None = None
        """Step whose generation fails."""

    async def _busy(self, what: str, step: int) -> None:
        self.events.append((f"{what} begins", step))
        for _ in range(self.ticks[what]):
            await asyncio.sleep(TICK)
        self.events.append((f"{what} ends", step))

    async def generate(self, requests: pa.Table, min_version: int) -> pa.Table:
        step = requests["step"][0].as_py()
        assert self.serving >= min_version, (
            f"step {step} asked for version {min_version}, {self.serving} is served"
        )
        oldest = self.serving
        await self._busy("generate", step)
        if step == self.breaks:
            raise ConnectionError("worker gone")
        rows = []
        for request in requests.to_pylist():
            for sample in range(request["n"]):
                age = self.aged.get(request["group_id"], 0) if sample == 0 else 0
                rows.append(
                    {
                        **{
                            name: request[name]
                            for name in ("group_id", "prompt_id", "step", "prompt_text", "prompt_ids")
                        },
                        "trajectory_id": trajectory_id(request["group_id"], sample),
                        "sample": sample,
                        "response_ids": [7, 8, sample],
                        "response_logprobs": [-1.0, -1.0, -1.0],
                        "response_text": "abc",
                        "token_ends": [1, 2, 3],
                        "finish_reason": "stop",
                        "policy_version": oldest - age,
                        "policy_version_end": self.serving,
                        "worker": 0,
                    }
                )
        return trajectories(rows)

    async def score(self, batch: pa.Table, version: int) -> list[dict[str, Any]]:
        assert version <= self.disc_version, "a version that is not published yet"
        self.scored.append((self.learned, version))
        await asyncio.sleep(TICK)
        scores = np.array([0.1, 0.2, float(version)], dtype=np.float32)
        return [{"scores": scores, "spans": [(0, 1), (1, 2), (2, 3)]} for _ in range(batch.num_rows)]

    async def reward_inputs(self, batch: pa.Table, version: int) -> dict[str, list[float]]:
        return {}

    async def learn(self, scored: pa.Table, step: int, lr_factor: float) -> list[dict[str, float]]:
        assert lr_factor == 1.0
        assert step == self.learned
        self.trained.append(scored)
        await self._busy("learn", step)
        self.learned += 1
        return [{"loss": float(step)}]

    async def sync(self, version: int) -> dict[str, float]:
        assert version == self.learned
        await asyncio.sleep(TICK)
        self.serving = version
        self.events.append(("sync", version))
        return {"wire_s": 0.0}

    async def discriminate(self, batch: pa.Table, step: int) -> dict[str, Any]:
        self.judged.append(step)
        await self._busy("discriminate", step)
        self.disc_version = step + 1
        return {"turn": float(step)}

    def when(self, what: str, step: int) -> int:
        """Position of an event in the order of events."""
        return self.events.index((what, step))


def drive(
    machine: Machine,
    config: Config,
    *,
    state: dict[str, Any] | None = None,
    each: Callable[[Controller], None] | None = None,
) -> tuple[Controller, dict[int, dict[str, Any]]]:
    """Run a controller to its end; returns it and what it observed by step."""
    observed: dict[int, dict[str, Any]] = {}
    controller = Controller(config, machine, observed.__setitem__, lambda phase: None)  # type: ignore[arg-type]
    if state is not None:
        controller.load_state(state)

    async def every_step(step: int) -> None:
        assert step == controller.step
        if each is not None:
            each(controller)

    asyncio.run(controller.run(every_step))
    return controller, observed


LAGS = [(p, d) for p in (0, 1, 2) for d in (0, 1, 2)]


@pytest.mark.parametrize(("policy_lag", "disc_lag"), LAGS)
@pytest.mark.parametrize("speeds", [(2, 4, 3), (6, 1, 1), (1, 1, 12), (0, 0, 0)])
def test_bounds_hold_and_accounts_balance_at_every_step(policy_lag, disc_lag, speeds):
    generating, learning, judging = speeds
    machine = Machine(generating=generating, learning=learning, judging=judging)
    config = configuration(steps=6, max_policy_lag=policy_lag, max_disc_lag=disc_lag)
    controller, observed = drive(machine, config)
    assert list(observed) == [1, 2, 3, 4, 5, 6]
    for step, table in enumerate(machine.trained):
        assert set(table["step"].to_pylist()) == {step}
        ages = step - np.array(table["policy_version"])
        judges = step - np.array(table["disc_version"])
        assert ages.min() >= 0
        assert ages.max() <= policy_lag
        assert judges.max() <= disc_lag
        assert len(set(judges)) == 1
        assert observed[step + 1]["lag"] == {"policy": ages.tolist(), "disc": judges.tolist()}
        accounts = observed[step + 1]["responses"]
        assert accounts["submitted"] == sum(n for name, n in accounts.items() if name != "submitted")
        assert accounts["trained"] == (step + 1) * PROMPTS * SAMPLES
    if policy_lag == 0:
        assert {
            row
            for table in machine.trained
            for row in (table["step"].to_numpy() - table["policy_version"].to_numpy())
        } == {0}
    assert machine.judged == [0, 1, 2, 3, 4, 5]
    assert machine.disc_version == 6
    assert controller.ledger.check() == {
        "submitted": 36, "trained": 36, "dropped": 0, "failed": 0, "in_flight": 0
    }  # fmt: skip


@pytest.mark.parametrize("policy_lag", [1, 2])
def test_a_lag_is_used_to_generate_while_learning(policy_lag):
    machine = Machine()
    drive(machine, configuration(steps=6, max_policy_lag=policy_lag))
    for step in range(5):
        assert machine.when("generate begins", step + 1) < machine.when("learn ends", step)
    late = [
        int(s - v)
        for t in machine.trained
        for s, v in zip(t["step"].to_numpy(), t["policy_version"].to_numpy(), strict=True)
    ]
    assert max(late) == policy_lag


def test_without_lag_generation_waits_for_the_sync():
    machine = Machine()
    drive(machine, configuration(steps=4))
    for step in range(3):
        assert machine.when("sync", step + 1) < machine.when("generate begins", step + 1)
        assert machine.when("learn ends", step) < machine.when("generate begins", step + 1)


@pytest.mark.parametrize("disc_lag", [0, 1])
def test_the_discriminators_turn_overlaps_update_and_next_generation(disc_lag):
    machine = Machine(generating=3, judging=9)
    drive(machine, configuration(steps=4, max_disc_lag=disc_lag))
    for step in range(3):
        assert machine.when("discriminate begins", step) < machine.when("learn ends", step)
        assert machine.when("generate begins", step + 1) < machine.when("discriminate ends", step)
    assert all(learned - version <= disc_lag for learned, version in machine.scored)


@pytest.mark.parametrize("judging", [0, 1, 9])
def test_without_lag_nothing_depends_on_how_long_a_turn_takes(judging):
    machine = Machine(judging=judging)
    _, observed = drive(machine, configuration(steps=4))
    assert machine.scored == [(0, 0), (1, 1), (2, 2), (3, 3)]
    assert [observed[step]["discriminator"] for step in (2, 3, 4)] == [
        {"turn": 0.0},
        {"turn": 1.0},
        {"turn": 2.0},
    ]


@pytest.mark.parametrize("disc_lag", [1, 2])
def test_a_discriminator_lag_is_used_when_the_discriminator_is_slow(disc_lag):
    machine = Machine(generating=1, learning=1, judging=12)
    drive(machine, configuration(steps=7, max_disc_lag=disc_lag))
    assert max(learned - version for learned, version in machine.scored) == disc_lag


def test_turns_of_the_discriminator_never_overlap():
    machine = Machine(generating=0, learning=0, judging=8)
    drive(machine, configuration(steps=5, max_disc_lag=2, max_policy_lag=2))
    turns = [event for event in machine.events if event[0].startswith("discriminate")]
    assert [what for what, _ in turns] == ["discriminate begins", "discriminate ends"] * 5
    assert all(a == b for (_, a), (_, b) in list(pairwise(turns))[::2])


def test_a_group_that_is_too_old_is_dropped_whole_and_counted():
    machine = Machine()
    machine.aged = {"000002-00001": 2}
    config = configuration(steps=4, max_policy_lag=1)
    controller, observed = drive(machine, config)
    kept = machine.trained[2]["group_id"].to_pylist()
    assert kept == ["000002-00000"] * SAMPLES + ["000002-00002"] * SAMPLES
    assert controller.ledger.dropped == {"policy_lag": SAMPLES}
    assert observed[3]["responses"]["dropped"] == SAMPLES
    assert controller.ledger.check()["trained"] == 4 * PROMPTS * SAMPLES - SAMPLES


def test_a_step_whose_groups_are_all_too_old_ends_the_run_by_name():
    """Nothing to learn from must not look like a step that learned."""
    machine = Machine()
    machine.aged = {f"000001-{i:05d}": 5 for i in range(PROMPTS)}
    with pytest.raises(RuntimeError, match=r"step 2: every group is older than run\.max_policy_lag"):
        drive(machine, configuration(steps=3, max_policy_lag=1))
    assert len(machine.trained) == 1


@pytest.mark.parametrize("policy_lag", [0, 2])
def test_a_failed_generation_is_counted_and_raised(policy_lag):
    machine = Machine()
    machine.breaks = 2
    config = configuration(steps=5, max_policy_lag=policy_lag)
    controller = Controller(config, machine, lambda step, row: None, lambda phase: None)  # type: ignore[arg-type]

    async def every_step(step: int) -> None:
        return None

    with pytest.raises(ConnectionError, match="worker gone"):
        asyncio.run(controller.run(every_step))
    accounts = controller.ledger.check()
    assert controller.ledger.failed["generation failed"] >= PROMPTS * SAMPLES
    assert accounts["trained"] == 2 * PROMPTS * SAMPLES


@pytest.mark.parametrize("policy_lag", [0, 1])
def test_tokens_per_second_are_those_of_the_batchs_own_generation(policy_lag):
    """A batch that was asked for ahead is not waited for; its generation took as long all the same."""
    machine = Machine(generating=4, learning=9)
    _, observed = drive(machine, configuration(steps=4, max_policy_lag=policy_lag))
    tokens = PROMPTS * SAMPLES * 3
    for step, row in observed.items():
        assert 0 < row["rollout"]["tokens_per_s"] <= tokens / (4 * TICK), step
    if policy_lag:
        waited, took = observed[4]["seconds"]["generate"], tokens / observed[4]["rollout"]["tokens_per_s"]
        assert waited < took, "nothing was generated ahead"


def test_a_row_has_the_memory_of_every_kind_of_process():
    _, observed = drive(Machine(), configuration(steps=1))
    memory = observed[1]["memory_mib"]
    assert memory.pop("controller") > 10
    assert memory == {"rollout": 300.0, "scoring": 200.0}


def stop_after(step: int) -> Callable[[Controller], None]:
    def each(controller: Controller) -> None:
        controller.stopping = controller.step >= step

    return each


@pytest.mark.parametrize("policy_lag", [0, 1, 2])
def test_ctrl_c_ends_after_the_step_with_nothing_in_the_air(policy_lag):
    machine = Machine(judging=9)
    config = configuration(steps=9, max_policy_lag=policy_lag)
    controller, observed = drive(machine, config, each=stop_after(3))
    assert list(observed) == [1, 2, 3]
    assert machine.learned == controller.step == 3
    assert machine.disc_version == 3
    accounts = controller.ledger.check()
    assert accounts["in_flight"] == 0
    assert accounts["trained"] == 3 * PROMPTS * SAMPLES
    assert accounts["dropped"] == sum(controller.ledger.dropped.values()) <= policy_lag * PROMPTS * SAMPLES


def asked(machine: Machine) -> list[tuple[str, str]]:
    """(group, prompt) of everything trained, in order."""
    return [
        pair
        for t in machine.trained
        for pair in zip(t["group_id"].to_pylist(), t["prompt_id"].to_pylist(), strict=True)
    ]


def resumed_after(
    stopped: Controller, old: Machine, config: Config, state: dict[str, Any]
) -> tuple[Controller, Machine]:
    """A new controller and a new machine that go on from a state that went through JSON."""
    machine = Machine()
    machine.serving = machine.learned = machine.disc_version = state["step"]
    controller, _ = drive(machine, config, state=json.loads(json.dumps(state)))
    assert controller.step == config.run.steps
    return controller, machine


@pytest.mark.parametrize("policy_lag", [0, 2])
def test_a_resumed_run_trains_on_the_same_prompts(policy_lag):
    """State taken between two steps, as a checkpoint does; what was asked for ahead is asked for again."""
    config = configuration(steps=7, max_policy_lag=policy_lag)
    whole = Machine()
    states: dict[int, dict[str, Any]] = {}
    unbroken, _ = drive(
        whole, config, each=lambda c: states.__setitem__(c.step, json.loads(json.dumps(c.state())))
    )
    for step in (1, 3, 6):
        controller, machine = resumed_after(unbroken, whole, config, states[step])
        assert asked(machine) == asked(whole)[step * PROMPTS * SAMPLES :]
        assert controller.ledger.check() == unbroken.ledger.check()
        assert (
            controller.timer.totals()["generate"]["tokens"] == unbroken.timer.totals()["generate"]["tokens"]
        )


@pytest.mark.parametrize("policy_lag", [0, 2])
def test_a_run_stopped_with_ctrl_c_goes_on_with_the_prompts_it_had_not_trained_on(policy_lag):
    config = configuration(steps=7, max_policy_lag=policy_lag)
    whole = Machine()
    drive(whole, config)
    first = Machine()
    stopped, _ = drive(first, config, each=stop_after(3))
    controller, second = resumed_after(stopped, first, config, stopped.state())
    assert asked(first) + asked(second) == asked(whole)
    accounts = controller.ledger.check()
    assert accounts["trained"] == 7 * PROMPTS * SAMPLES
    assert accounts["in_flight"] == 0


def test_discriminator_metrics_are_those_of_the_last_finished_turn():
    machine = Machine()
    _, observed = drive(machine, configuration(steps=4))
    assert [observed[step]["discriminator"] for step in observed] == [
        {},
        {"turn": 0.0},
        {"turn": 1.0},
        {"turn": 2.0},
    ]


@pytest.mark.parametrize(("judging", "learning"), [(12, 1), (3, 4)])
@pytest.mark.parametrize("stop", [0, 4])
def test_with_a_lag_every_turn_is_reported_once_and_in_order(judging, learning, stop):
    """Also over a stop, whose checkpoint waits for the turns, and a resume."""
    config = configuration(steps=12, max_disc_lag=2)
    machine = Machine(generating=1, learning=learning, judging=judging)
    controller, observed = drive(machine, config, each=stop_after(stop or 12))
    if stop:
        machine = Machine(generating=1, learning=learning, judging=judging)
        machine.serving = machine.learned = machine.disc_version = stop
        state = json.loads(json.dumps(controller.state()))
        controller, later = drive(machine, config, state=state)
        observed |= later
    told = [row["discriminator"]["turn"] for row in observed.values() if row["discriminator"]]
    told += [turn["turn"] for turn in controller.state()["untold_turns"]]
    assert told == [float(turn) for turn in range(12)]
    assert all(row["discriminator"].get("turn", -1) < step - 1 for step, row in observed.items())
    if judging == 12 and not stop:
        assert not all(row["discriminator"] for row in list(observed.values())[1:]), "some have none"


class Gated(Machine):
    """A health gate that allows the policy half its rate after the second turn."""

    def __init__(self, **ticks: int) -> None:
        super().__init__(**ticks)
        self.factors: list[tuple[int, float]] = []

    async def learn(self, scored: pa.Table, step: int, lr_factor: float) -> list[dict[str, float]]:
        self.factors.append((self.disc_version, lr_factor))
        return await super().learn(scored, step, 1.0)

    async def discriminate(self, batch: pa.Table, step: int) -> dict[str, Any]:
        return await super().discriminate(batch, step) | {"policy_factor": 0.5 if step == 1 else 1.0}


@pytest.mark.parametrize("disc_lag", [0, 2])
def test_what_a_turn_lets_the_policy_do_holds_until_the_next_one(disc_lag):
    config = configuration(steps=6, max_disc_lag=disc_lag)
    machine, first, second = (Gated(generating=1, learning=1, judging=8) for _ in range(3))
    drive(machine, config)
    assert [factor for _, factor in machine.factors] == [
        0.5 if version == 2 else 1.0 for version, _ in machine.factors
    ]
    assert 2 in [version for version, _ in machine.factors]
    stopped, _ = drive(first, config, each=stop_after(2))
    second.serving = second.learned = second.disc_version = 2
    drive(second, config, state=json.loads(json.dumps(stopped.state())))
    assert second.factors[0] == (2, 0.5)


def test_rewards_come_from_the_version_that_is_stamped():
    machine = Machine()
    drive(machine, configuration(steps=4))
    for version, table in enumerate(machine.trained):
        assert table["score"].to_pylist() == [float(version)] * PROMPTS * SAMPLES
        last = np.log1p(np.exp(version))  # -log(1 - D) of the last score, on the last token only
        np.testing.assert_allclose(
            table["token_rewards"].to_pylist(), [[0, 0, last]] * PROMPTS * SAMPLES, rtol=1e-6
        )
        assert table.schema.names[: len(TRAJECTORY_SCHEMA.names)] == TRAJECTORY_SCHEMA.names
