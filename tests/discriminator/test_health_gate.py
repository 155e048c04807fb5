import pytest

from discriminator.health import HealthGate, HealthReading, HealthState, PolicyState
from discriminator.health_config import HealthConfig

CONFIG = HealthConfig(
    low_accuracy=0.55,
    confident_accuracy=0.8,
    slow_accuracy=0.9,
    pause_accuracy=0.98,
    slow_margin=4,
    pause_margin=8,
    extra_steps=2,
)


def reading(accuracy: float = 0.7, margin: float = 1.0, saturation: float = 0.1) -> HealthReading:
    return HealthReading(accuracy, margin, saturation)


@pytest.mark.parametrize(
    ("given", "state", "steps"),
    [
        (reading(), HealthState.TRAIN, 2),
        (reading(accuracy=0.5), HealthState.BOOST, 4),
        (reading(accuracy=0.9), HealthState.SLOW, 1),
        (reading(accuracy=0.8, margin=4), HealthState.SLOW, 1),
        (reading(accuracy=0.79, margin=9), HealthState.TRAIN, 2),
        (reading(accuracy=0.8, saturation=0.95), HealthState.SLOW, 1),
        (reading(accuracy=0.79, saturation=0.95), HealthState.TRAIN, 2),
        (reading(accuracy=0.98), HealthState.PAUSED, 0),
        (reading(accuracy=0.8, margin=8), HealthState.PAUSED, 0),
    ],
)
def test_each_band_gives_its_state(given: HealthReading, state: HealthState, steps: int) -> None:
    gate = HealthGate(CONFIG, steps=2)
    gate.observe(0, given)
    assert gate.state is state
    assert gate.allowed_steps() == steps


def test_paused_lasts_until_below_the_slow_bounds_and_leaves_through_train() -> None:
    gate = HealthGate(CONFIG, steps=2)
    states = []
    for step, accuracy in enumerate([0.99, 0.95, 0.91, 0.5, 0.5]):
        gate.observe(step, reading(accuracy=accuracy))
        states.append(gate.state)
    assert states == [HealthState.PAUSED] * 3 + [HealthState.TRAIN, HealthState.BOOST]
    assert [(t.step, t.before, t.after) for t in gate.transitions] == [
        (0, HealthState.TRAIN, HealthState.PAUSED),
        (3, HealthState.PAUSED, HealthState.TRAIN),
        (4, HealthState.TRAIN, HealthState.BOOST),
    ]
    assert "accuracy 0.990" in gate.transitions[0].reason


def test_switched_off_it_always_allows_the_configured_steps() -> None:
    gate = HealthGate(CONFIG.model_copy(update={"enabled": False}), steps=3)
    assert gate.observe(0, reading(accuracy=1.0)) == []
    assert gate.allowed_steps() == 3
    assert gate.state is HealthState.TRAIN
    assert not gate.transitions


def test_state_survives_a_checkpoint() -> None:
    gate = HealthGate(CONFIG, steps=2)
    gate.observe(0, reading(accuracy=0.99))
    other = HealthGate(CONFIG, steps=2)
    other.load_state_dict(gate.state_dict())
    assert other.state_dict() == gate.state_dict()
    assert other.allowed_steps() == 0


def test_not_a_number_is_an_error() -> None:
    with pytest.raises(ValueError, match="margin"):
        HealthGate(CONFIG, steps=2).observe(4, reading(margin=float("nan")))


def test_bands_out_of_order_are_refused() -> None:
    with pytest.raises(ValueError, match="low_accuracy"):
        HealthConfig(low_accuracy=0.96)
    with pytest.raises(ValueError, match="confident_accuracy"):
        HealthConfig(confident_accuracy=0.96)


def policy_gate(limit: int = 3) -> HealthGate:
    fields = {
        "pause_policy": True,
        "policy_pause_accuracy": 0.52,
        "policy_slow_factor": 0.25,
        "policy_pause_limit": limit,
    }
    return HealthGate(CONFIG.model_copy(update=fields), steps=2)


def test_the_policy_is_left_alone_unless_asked_for() -> None:
    gate = HealthGate(CONFIG, steps=2)
    changes = gate.observe(0, reading(accuracy=0.5))
    assert gate.policy_factor() == 1.0
    assert [t.side for t in changes] == ["discriminator"]


def test_the_policy_pauses_at_chance_until_the_discriminator_has_recovered() -> None:
    gate = policy_gate()
    seen = []
    for step, accuracy in enumerate([0.6, 0.53, 0.51, 0.54, 0.55, 0.51]):
        gate.observe(step, reading(accuracy=accuracy))
        seen.append(gate.policy_factor())
    assert seen == [1.0, 0.25, 0.0, 0.0, 1.0, 0.0]
    told = [(t.step, t.after, t.reason) for t in gate.transitions if t.side == "policy"]
    assert told == [
        (1, PolicyState.SLOW, "accuracy 0.530 < 0.55"),
        (2, PolicyState.PAUSED, "accuracy 0.510 < 0.52"),
        (4, PolicyState.RUN, "accuracy 0.550 >= 0.55"),
        (5, PolicyState.PAUSED, "accuracy 0.510 < 0.52"),
    ]


def test_a_policy_that_has_converged_is_not_paused_for_good() -> None:
    gate = policy_gate(limit=3)
    seen = []
    for step in range(8):
        gate.observe(step, reading(accuracy=0.5))
        seen.append(gate.policy_factor())
    assert seen == [0.0] * 3 + [0.25] * 5
    gate.observe(8, reading(accuracy=0.6))
    gate.observe(9, reading(accuracy=0.5))
    assert gate.policy_factor() == 0.0, "after a recovery it may be paused again"


def test_the_policys_state_survives_a_checkpoint_and_older_ones_have_none() -> None:
    gate = policy_gate(limit=2)
    for step in range(3):
        gate.observe(step, reading(accuracy=0.5))
    state = gate.state_dict()
    other = policy_gate(limit=2)
    other.load_state_dict(state)
    assert other.state_dict() == state
    assert other.observe(3, reading(accuracy=0.5)) == gate.observe(3, reading(accuracy=0.5))
    old = HealthGate(CONFIG, steps=2).state_dict()
    for name in ("policy", "policy_readings", "policy_may_pause"):
        del old[name]
    other.load_state_dict(old)
    assert other.policy_factor() == 1.0


def test_pausing_the_policy_needs_readings_and_ordered_bands() -> None:
    with pytest.raises(ValueError, match="enabled"):
        HealthConfig(pause_policy=True, enabled=False)
    with pytest.raises(ValueError, match="policy_pause_accuracy"):
        HealthConfig(pause_policy=True, policy_pause_accuracy=0.6)
