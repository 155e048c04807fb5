"""The health gate: how many discriminator steps a policy step gets, from held-out measurements alone.

A discriminator that wins everything gives flat rewards, one that loses gives noise. States:

    BOOST  accuracy below `low_accuracy`           steps + extra_steps
    TRAIN  inside the bands                        steps
    SLOW   accuracy, margin or saturation high     1
    PAUSED accuracy or margin at the pause bound   0, until accuracy and margin are below the *slow* bounds

PAUSED never goes to SLOW: one step at a bound still exceeded would push the discriminator back over it, and
the gate would oscillate between the two. PAUSED never goes to BOOST either: a discriminator that stood still
while the policy moved may measure low once; it gets an ordinary step and is judged again.
"""

from collections import deque
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from discriminator.config import HealthConfig


class HealthState(StrEnum):
    """What the gate allows."""

    BOOST = "boost"
    TRAIN = "train"
    SLOW = "slow"
    PAUSED = "paused"


@dataclass(frozen=True)
class HealthReading:
    """Held-out balanced accuracy in [0, 1], margin in logits, share of saturated sequence probabilities."""

    accuracy: float
    margin: float
    saturation: float


@dataclass(frozen=True)
class Transition:
    """One change of state, with the reading that caused it."""

    step: int
    before: HealthState
    after: HealthState
    reason: str


class HealthGate:
    """Feed it readings, ask it for steps.

    gate = HealthGate(config.health, steps=config.steps_per_policy_step)
    gate.observe(step, HealthReading(accuracy=.97, margin=3.0, saturation=.2))   # -> SLOW
    gate.allowed_steps()                                                         # -> 1
    """

    def __init__(self, config: HealthConfig, *, steps: int, log_size: int = 100) -> None:
        self.config = config
        self.steps = steps
        self.state = HealthState.TRAIN
        self.readings_in_state = 0
        self.transitions: deque[Transition] = deque(maxlen=log_size)

    def observe(self, step: int, reading: HealthReading) -> Transition | None:
        """Move to the state the reading asks for; returns the transition, None when the state stays.

        Raises:
            ValueError: a number that is not finite; a broken discriminator must not pass for a healthy one.
        """
        for name, value in asdict(reading).items():
            if not abs(value) < float("inf"):
                raise ValueError(f"held-out {name} of the discriminator is {value} at step {step}")
        after, reason = self._judge(reading)
        self.readings_in_state += 1
        if after is self.state:
            return None
        transition = Transition(step=step, before=self.state, after=after, reason=reason)
        self.state = after
        self.readings_in_state = 0
        self.transitions.append(transition)
        return transition

    def allowed_steps(self) -> int:
        """Discriminator steps for the next policy step."""
        if not self.config.enabled:
            return self.steps
        return {
            HealthState.BOOST: self.steps + self.config.extra_steps,
            HealthState.TRAIN: self.steps,
            HealthState.SLOW: 1,
            HealthState.PAUSED: 0,
        }[self.state]

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint (JSON types)."""
        return {
            "state": self.state.value,
            "readings_in_state": self.readings_in_state,
            "transitions": [
                asdict(t) | {"before": t.before.value, "after": t.after.value} for t in self.transitions
            ],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.state = HealthState(state["state"])
        self.readings_in_state = int(state["readings_in_state"])
        self.transitions.clear()
        self.transitions.extend(
            Transition(t["step"], HealthState(t["before"]), HealthState(t["after"]), t["reason"])
            for t in state["transitions"]
        )

    def _judge(self, reading: HealthReading) -> tuple[HealthState, str]:
        bounds = self.config
        pause = [
            f"{name} {value:.3f} >= {bound:g}"
            for name, value, bound in (
                ("accuracy", reading.accuracy, bounds.pause_accuracy),
                ("margin", reading.margin, bounds.pause_margin),
            )
            if value >= bound
        ]
        slow = [
            f"{name} {value:.3f} >= {bound:g}"
            for name, value, bound in (
                ("accuracy", reading.accuracy, bounds.slow_accuracy),
                ("margin", reading.margin, bounds.slow_margin),
            )
            if value >= bound
        ]
        if pause:
            return HealthState.PAUSED, ", ".join(pause)
        if self.state is HealthState.PAUSED:
            if slow:
                return HealthState.PAUSED, ", ".join(slow)
            return HealthState.TRAIN, "accuracy and margin back below the slow bounds"
        if reading.saturation >= bounds.slow_saturation:
            slow.append(f"saturation {reading.saturation:.3f} >= {bounds.slow_saturation:g}")
        if slow:
            return HealthState.SLOW, ", ".join(slow)
        if reading.accuracy < bounds.low_accuracy:
            return HealthState.BOOST, f"accuracy {reading.accuracy:.3f} < {bounds.low_accuracy:g}"
        return HealthState.TRAIN, "inside the bands"
