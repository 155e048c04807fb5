"""The controller's loop and clocks against a small in-memory system: bounds, overlap, accounts, metrics."""

import asyncio
import json
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from machine import PROMPTS, SAMPLES, TICK, Machine, configuration, drive, stop_after

from rollout.trajectory import TRAJECTORY_SCHEMA
from services.controller import Controller

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
    trained = accounts["trained"] // (PROMPTS * SAMPLES)
    assert trained == 2 if policy_lag == 0 else trained < 2, "what is asked for ahead is not waited for"


@pytest.mark.parametrize("disc_lag", [0, 3, 50])
def test_a_failed_discriminator_turn_ends_the_run_at_once(disc_lag):
    """Not when somebody waits for the turn: with a lag that is many steps later, or never before a save."""
    machine = Machine(judging=1)
    machine.misjudges = 2
    with pytest.raises(ConnectionError, match="discriminator gone"):
        drive(machine, configuration(steps=20, max_disc_lag=disc_lag))
    assert machine.learned <= 4


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
