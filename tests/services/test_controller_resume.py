"""A run that is stopped leaves nothing in the air, and goes on where it was."""

import json
from typing import Any

import pytest
from machine import PROMPTS, SAMPLES, Machine, configuration, drive, stop_after

from services.config import Config
from services.controller import Controller


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
