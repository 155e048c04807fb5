"""The health gate: how many discriminator steps a policy step gets, from held-out measurements alone.

A discriminator that wins everything gives flat rewards, one that loses gives noise. States:

    BOOST  accuracy below `low_accuracy`           steps + extra_steps
    TRAIN  inside the bands                        steps
    SLOW   accuracy, margin or saturation high     1
    PAUSED accuracy or margin at the pause bound   0, until accuracy and margin are below the *slow* bounds

Margin and saturation count from `confident_accuracy` on: a discriminator that errs more often than that is
not winning everything, however sure it is of some responses.

PAUSED never goes to SLOW: one step at a bound still exceeded would push the discriminator back over it, and
the gate would oscillate between the two. PAUSED never goes to BOOST either: a discriminator that stood still
while the policy moved may measure low once; it gets an ordinary step and is judged again.

The policy has a gate of its own beside it, open unless `pause_policy` is set, because a discriminator at
chance gives it noise:

    RUN    accuracy at `low_accuracy` or above     learning rate x 1
    SLOW   below it                                x policy_slow_factor
    PAUSED below `policy_pause_accuracy`           x 0, until accuracy is at `low_accuracy` or the limit is up

A pause that outlasts `policy_pause_limit` readings ends in SLOW and is not renewed before the policy has been
in RUN: a policy that has become its demonstrations keeps every discriminator at chance, and waiting for one
that is not would stop the run for good.
"""

from collections import deque
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, Literal

from discriminator.health_config import HealthConfig

Side = Literal["discriminator", "policy"]


class HealthState(StrEnum):
    """What the gate allows."""

    BOOST = "boost"
    TRAIN = "train"
    SLOW = "slow"
    PAUSED = "paused"


HEALTH_LEVEL = {
    HealthState.BOOST: -1.0,
    HealthState.TRAIN: 0.0,
    HealthState.SLOW: 1.0,
    HealthState.PAUSED: 2.0,
}
"""As a number, for the metrics."""


class PolicyState(StrEnum):
    """What the gate lets the policy do."""

    RUN = "run"
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
    """One change of state of either side, with the reading that caused it."""

    step: int
    before: HealthState | PolicyState
    after: HealthState | PolicyState
    reason: str
    side: Side = "discriminator"


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
        self.policy = PolicyState.RUN
        self.policy_readings = 0
        self.policy_may_pause = True
        self.transitions: deque[Transition] = deque(maxlen=log_size)

    def observe(self, step: int, reading: HealthReading) -> list[Transition]:
        """Move both sides to the states the reading asks for; returns the transitions, none where the states
        stay, as they all do with `enabled = false`.

        Raises:
            ValueError: a number that is not finite; a broken discriminator must not pass for a healthy one.
        """
        for name, value in asdict(reading).items():
            if not abs(value) < float("inf"):
                raise ValueError(f"held-out {name} of the discriminator is {value} at step {step}")
        if not self.config.enabled:
            return []
        changes = []
        after, reason = self._judge(reading)
        self.readings_in_state += 1
        if after is not self.state:
            changes.append(Transition(step=step, before=self.state, after=after, reason=reason))
            self.state = after
            self.readings_in_state = 0
        if self.config.pause_policy:
            changes += self._observe_policy(step, reading.accuracy)
        self.transitions.extend(changes)
        return changes

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

    def policy_factor(self) -> float:
        """Factor of the policy's learning rate for the next policy step; 0 leaves the step out."""
        if not self.config.pause_policy:
            return 1.0
        return {
            PolicyState.RUN: 1.0,
            PolicyState.SLOW: self.config.policy_slow_factor,
            PolicyState.PAUSED: 0.0,
        }[self.policy]

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint (JSON types)."""
        return {
            "state": self.state.value,
            "readings_in_state": self.readings_in_state,
            "policy": self.policy.value,
            "policy_readings": self.policy_readings,
            "policy_may_pause": self.policy_may_pause,
            "transitions": [
                asdict(t) | {"before": t.before.value, "after": t.after.value} for t in self.transitions
            ],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.state = HealthState(state["state"])
        self.readings_in_state = int(state["readings_in_state"])
        # Checkpoints from before the policy had a gate do not name it: it was open.
        self.policy = PolicyState(state.get("policy", PolicyState.RUN))
        self.policy_readings = int(state.get("policy_readings", 0))
        self.policy_may_pause = bool(state.get("policy_may_pause", True))
        self.transitions.clear()
        for t in state["transitions"]:
            side: Side = t.get("side", "discriminator")
            kind = PolicyState if side == "policy" else HealthState
            self.transitions.append(
                Transition(t["step"], kind(t["before"]), kind(t["after"]), t["reason"], side)
            )

    def _observe_policy(self, step: int, accuracy: float) -> list[Transition]:
        after, reason = self._judge_policy(accuracy)
        self.policy_readings += 1
        if after is self.policy:
            return []
        before, self.policy = self.policy, after
        self.policy_readings = 0
        if before is PolicyState.PAUSED or after is PolicyState.RUN:
            self.policy_may_pause = after is PolicyState.RUN
        return [Transition(step, before, after, reason, "policy")]

    def _judge_policy(self, accuracy: float) -> tuple[PolicyState, str]:
        bounds = self.config
        if accuracy >= bounds.low_accuracy:
            return PolicyState.RUN, f"accuracy {accuracy:.3f} >= {bounds.low_accuracy:g}"
        if self.policy is PolicyState.PAUSED:
            if self.policy_readings + 1 >= bounds.policy_pause_limit:
                return PolicyState.SLOW, f"paused for {bounds.policy_pause_limit} readings"
            return PolicyState.PAUSED, f"accuracy {accuracy:.3f} < {bounds.low_accuracy:g}"
        if accuracy < bounds.policy_pause_accuracy and self.policy_may_pause:
            return PolicyState.PAUSED, f"accuracy {accuracy:.3f} < {bounds.policy_pause_accuracy:g}"
        return PolicyState.SLOW, f"accuracy {accuracy:.3f} < {bounds.low_accuracy:g}"

    def _judge(self, reading: HealthReading) -> tuple[HealthState, str]:
        bounds = self.config
        confident = reading.accuracy >= bounds.confident_accuracy
        margin = reading.margin if confident else 0.0
        pause = [
            f"{name} {value:.3f} >= {bound:g}"
            for name, value, bound in (
                ("accuracy", reading.accuracy, bounds.pause_accuracy),
                ("margin", margin, bounds.pause_margin),
            )
            if value >= bound
        ]
        slow = [
            f"{name} {value:.3f} >= {bound:g}"
            for name, value, bound in (
                ("accuracy", reading.accuracy, bounds.slow_accuracy),
                ("margin", margin, bounds.slow_margin),
            )
            if value >= bound
        ]
        if pause:
            return HealthState.PAUSED, ", ".join(pause)
        if self.state is HealthState.PAUSED:
            if slow:
                return HealthState.PAUSED, ", ".join(slow)
            return HealthState.TRAIN, "accuracy and margin back below the slow bounds"
        if confident and reading.saturation >= bounds.slow_saturation:
            slow.append(f"saturation {reading.saturation:.3f} >= {bounds.slow_saturation:g}")
        if slow:
            return HealthState.SLOW, ", ".join(slow)
        if reading.accuracy < bounds.low_accuracy:
            return HealthState.BOOST, f"accuracy {reading.accuracy:.3f} < {bounds.low_accuracy:g}"
        return HealthState.TRAIN, "inside the bands"
