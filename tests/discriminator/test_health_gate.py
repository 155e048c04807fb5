import pytest

from discriminator.config import HealthConfig
from discriminator.health import HealthGate, HealthReading, HealthState

CONFIG = HealthConfig(
    low_accuracy=0.55, slow_accuracy=0.9, pause_accuracy=0.98, slow_margin=4, pause_margin=8, extra_steps=2
)


def reading(accuracy: float = 0.7, margin: float = 1.0, saturation: float = 0.1) -> HealthReading:
    return HealthReading(accuracy, margin, saturation)


@pytest.mark.parametrize(
    ("given", "state", "steps"),
    [
        (reading(), HealthState.TRAIN, 2),
        (reading(accuracy=0.5), HealthState.BOOST, 4),
        (reading(accuracy=0.9), HealthState.SLOW, 1),
        (reading(margin=4), HealthState.SLOW, 1),
        (reading(saturation=0.95), HealthState.SLOW, 1),
        (reading(accuracy=0.98), HealthState.PAUSED, 0),
        (reading(margin=8), HealthState.PAUSED, 0),
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
    gate.observe(0, reading(accuracy=1.0))
    assert gate.allowed_steps() == 3


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
