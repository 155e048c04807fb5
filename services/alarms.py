"""Alarms: conditions of a run that someone should look at, as pure functions over its metrics rows.

An alarm is raised when its condition begins and again only after it has ended in between. A check whose
metric is not in the rows says nothing. Rows are flat (`reward/mean`), oldest first, as `MetricsLog.log`
returns them.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Alarm:
    """One alarm: the step at which its condition began, its name and a sentence with the numbers."""

    step: int
    name: str
    message: str


@dataclass(frozen=True)
class AlarmBounds:
    """When the checks speak up."""

    window: int = 10
    """Rows that a trend is judged on."""
    reward_spread: float = 1e-4
    """Reward is flat when its standard deviation within a batch stays below this."""
    accuracy: float = 0.98
    """Discriminator is saturated when its held-out accuracy stays above this."""
    logprob_mismatch: float = 0.1
    """Largest mean |log-probability difference| between sampler and learner, nats."""
    length_correlation: float = 0.5
    """Largest |correlation| of reward and response length, averaged over the window."""
    entropy_share: float = 0.2
    """Entropy has collapsed when it falls below this share of its first value."""
    length_share: float = 0.7
    """Share of responses cut by the length limit that is too large."""


def _recent(rows: Rows, key: str, count: int) -> list[float]:
    """The metric's last `count` values, or [] when there are fewer."""
    values = [float(row[key]) for row in rows if row.get(key) is not None]
    return values[-count:] if len(values) >= count else []


def not_finite(rows: Rows, bounds: AlarmBounds) -> str | None:
    """Some number of the last step is NaN or infinite."""
    bad = [key for key, value in rows[-1].items() if isinstance(value, float) and not math.isfinite(value)]
    return f"not finite: {', '.join(bad)}" if bad else None


def reward_flat(rows: Rows, bounds: AlarmBounds) -> str | None:
    """`reward/std` stays near 0: all responses earn alike and the policy learns nothing."""
    values = _recent(rows, "reward/std", bounds.window)
    if values and max(values) < bounds.reward_spread:
        return f"reward spread below {bounds.reward_spread:g} for {len(values)} steps (last {values[-1]:.2g})"
    return None


def discriminator_saturated(rows: Rows, bounds: AlarmBounds) -> str | None:
    """`discriminator/accuracy_heldout` is pinned near 1: a shortcut, or a policy left behind."""
    values = _recent(rows, "discriminator/accuracy_heldout", bounds.window)
    if values and min(values) > bounds.accuracy:
        return f"held-out discriminator accuracy above {bounds.accuracy:g} for {len(values)} steps"
    return None


def logprob_mismatch(rows: Rows, bounds: AlarmBounds) -> str | None:
    """`policy/mismatch_mean`: sampler and learner disagree about the same tokens."""
    values = _recent(rows, "policy/mismatch_mean", 1)
    if values and values[-1] > bounds.logprob_mismatch:
        return f"mean |log-prob difference| {values[-1]:.3g} nats, bound {bounds.logprob_mismatch:g}"
    return None


def length_reward(rows: Rows, bounds: AlarmBounds) -> str | None:
    """`reward/length_correlation`: the discriminator has found length."""
    values = _recent(rows, "reward/length_correlation", bounds.window)
    mean = sum(values) / len(values) if values else 0.0
    if abs(mean) > bounds.length_correlation:
        return f"correlation of reward and length {mean:+.2f} over {len(values)} steps"
    return None


def entropy_collapse(rows: Rows, bounds: AlarmBounds) -> str | None:
    """`policy/entropy` has fallen far below where it began."""
    values = _recent(rows, "policy/entropy", 1)
    first = next((float(row["policy/entropy"]) for row in rows if row.get("policy/entropy") is not None), 0.0)
    if values and first > 0 and values[-1] < bounds.entropy_share * first:
        return f"entropy {values[-1]:.3g} nats per token, began at {first:.3g}"
    return None


def truncation(rows: Rows, bounds: AlarmBounds) -> str | None:
    """`response/truncated_rate`: most responses never end."""
    values = _recent(rows, "response/truncated_rate", bounds.window)
    if values and min(values) > bounds.length_share:
        return f"{values[-1]:.0%} of the responses are cut by the length limit"
    return None


CHECKS: dict[str, Callable[[Rows, AlarmBounds], str | None]] = {
    check.__name__: check
    for check in (
        not_finite,
        reward_flat,
        discriminator_saturated,
        logprob_mismatch,
        length_reward,
        entropy_collapse,
        truncation,
    )
}


class Alarms:
    """Runs every check after each step and keeps what it found."""

    def __init__(self, bounds: AlarmBounds | None = None) -> None:
        self.bounds = bounds or AlarmBounds()
        self.raised: list[Alarm] = []
        self._active: set[str] = set()

    def check(self, rows: Rows) -> list[Alarm]:
        """New alarms of the last row; `rows` begin with the run's first row."""
        if not rows:
            return []
        new = []
        for name, condition in CHECKS.items():
            message = condition(rows, self.bounds)
            if message is not None and name not in self._active:
                new.append(Alarm(int(rows[-1]["step"]), name, message))
            (self._active.discard if message is None else self._active.add)(name)
        self.raised += new
        return new

    def state_dict(self) -> dict[str, Any]:
        """Raised alarms and running conditions, for a checkpoint."""
        return {"raised": [asdict(alarm) for alarm in self.raised], "active": sorted(self._active)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.raised = [Alarm(**alarm) for alarm in state["raised"]]
        self._active = set(state["active"])
