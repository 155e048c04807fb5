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
    """Rows with a metric that its trend is judged on."""
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
    overconfidence: float = 0.3
    """Nats per token by which NLL of human answers minus entropy may grow: a policy that is as sure as it is
    right has 0."""
    length_share: float = 0.7
    """Share of responses cut by the length limit that is too large."""
    mode_share: float = 0.7
    """Modes have collapsed when the policy's effective number of modes falls below this share of the
    humans'."""
    modes_lost: float = 0.1
    """Modes have collapsed when human answers of this share lie in modes that the policy has lost since it
    covered most."""
    tail_rise: float = 0.035
    """Share by which the human answers that are least likely may cost more than they did at best."""
    distinct_share: float = 0.5
    """Diversity has collapsed when the policy's distinct-2 falls below this share of the humans' (of the
    base's, where that is less)."""
    self_bleu_room: float = 0.5
    """The same of what self-BLEU leaves to 100, where all answers are one."""
    repetition: float = 0.2
    """Largest excess over the humans of the share of tokens inside repeated n-grams."""
    length_rank_correlation: float = 0.3
    """Rank correlation of reward and length that counts as a pull towards longer (or shorter) responses."""
    length_drift: float = 1.25
    """Length is hacked when such a pull has taken responses this many times beyond the humans' length."""
    copy_excess: float = 0.05
    """Largest share of copied demonstrations above the natural rate, at the lower end of its interval."""
    masked: float = 0.5
    """Share of drawn responses without a judge's gradient that leaves Gumbel-Softmax little to learn from."""
    recurrence: float = 0.5
    """The discriminator cycles when its ranking agrees by this much more with an earlier version than with
    one in between."""


def _recent(rows: Rows, key: str, count: int) -> list[float]:
    """The metric's last `count` values, or [] when there are fewer."""
    values = [float(row[key]) for row in rows if row.get(key) is not None]
    return values[-count:] if len(values) >= count else []


def _beside_humans(rows: Rows, key: str, least: float) -> tuple[float, float]:
    """A share of the humans' value, last seen, and its bound: `least`, or that of the first one where the
    base was below the humans already. (0, 0) where the rows have none."""
    values = [float(row[key]) for row in rows if row.get(key) is not None] or [0.0]
    return values[-1], least * min(1.0, values[0])


def not_finite(rows: Rows, bounds: AlarmBounds) -> str | None:
    """Some number of the last step is NaN or infinite, or an update was skipped because of one."""
    bad = [key for key, value in rows[-1].items() if isinstance(value, float) and not math.isfinite(value)]
    bad += [key for key, value in rows[-1].items() if key.endswith("/skipped") and value]
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
        return f"held-out discriminator accuracy above {bounds.accuracy:g} for {len(values)} turns"
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


def overconfidence(rows: Rows, bounds: AlarmBounds) -> str | None:
    """`evaluation/nll` − `policy/entropy` has grown since the first evaluation: the policy is surer of its
    answers than the humans' answers bear out."""
    gaps = []
    for row, after in zip(rows, [*rows[1:], {}], strict=True):
        nll, entropy = row.get("evaluation/nll"), row.get("policy/entropy", after.get("policy/entropy"))
        if nll is not None and entropy is not None:
            gaps.append((float(nll), float(entropy)))
    if len(gaps) < 2:
        return None
    grown = (gaps[-1][0] - gaps[-1][1]) - (gaps[0][0] - gaps[0][1])
    if grown > bounds.overconfidence:
        return (
            f"entropy is {gaps[-1][1]:.3g} nats per token while human answers cost {gaps[-1][0]:.3g}; the "
            f"difference has grown by {grown:.2g}"
        )
    return None


def truncation(rows: Rows, bounds: AlarmBounds) -> str | None:
    """`response/truncated_rate`: most responses never end."""
    values = _recent(rows, "response/truncated_rate", bounds.window)
    if values and min(values) > bounds.length_share:
        return f"{values[-1]:.0%} of the responses are cut by the length limit"
    return None


def mode_collapse(rows: Rows, bounds: AlarmBounds) -> str | None:
    """`monitor/mode_share`, `monitor/modes_lost`: the policy answers in fewer ways than the humans do (than
    the base did, where that had fewer already), or no longer in ways it had."""
    share, bound = _beside_humans(rows, "monitor/mode_share", bounds.mode_share)
    lost = _recent(rows, "monitor/modes_lost", 1)
    if share < bound:
        return f"effective number of modes is {share:.2f} of the humans' (bound {bound:.2g})"
    if lost:
        least = min(
            float(row["monitor/modes_lost"]) for row in rows if row.get("monitor/modes_lost") is not None
        )
        if lost[-1] - least > bounds.modes_lost:
            return (
                f"{lost[-1]:.0%} of the human answers lie in modes the policy has lost, at best {least:.0%}"
            )
    return None


def mode_dropping(rows: Rows, bounds: AlarmBounds) -> str | None:
    """`monitor/nll_tail`: the human answers that are least likely to the policy have become less likely
    still, as those of a mode do that it is about to lose. It is no matter of samples, so it shows early."""
    tail = [float(row["monitor/nll_tail"]) for row in rows if row.get("monitor/nll_tail") is not None]
    if tail and tail[-1] > min(tail) * (1 + bounds.tail_rise):
        return (
            f"the human answers that are least likely (a tenth) cost {tail[-1]:.4g} nats each, at best "
            f"{min(tail):.4g}"
        )
    return None


def distinct_collapse(rows: Rows, bounds: AlarmBounds) -> str | None:
    """`monitor/distinct_2_share`: the policy's answers share more of their bigrams than the humans' do."""
    share, bound = _beside_humans(rows, "monitor/distinct_2_share", bounds.distinct_share)
    if share < bound:
        return f"distinct-2 is {share:.2f} of the humans' (bound {bound:.2g})"
    return None


def self_bleu_collapse(rows: Rows, bounds: AlarmBounds) -> str | None:
    """`monitor/self_bleu_room`: the policy's answers resemble each other more than the humans' do."""
    share, bound = _beside_humans(rows, "monitor/self_bleu_room", bounds.self_bleu_room)
    if share < bound:
        return f"100 - self-BLEU is {share:.2f} of the humans' (bound {bound:.2g})"
    return None


def repetition(rows: Rows, bounds: AlarmBounds) -> str | None:
    """`monitor/repetition`: responses repeat themselves more than human answers do."""
    model, human = _recent(rows, "monitor/repetition", 1), _recent(rows, "monitor/repetition_human", 1)
    if model and human and model[-1] - human[-1] > bounds.repetition:
        return f"{model[-1]:.0%} of the tokens lie in repeated n-grams, {human[-1]:.0%} in human answers"
    return None


def length_hacking(rows: Rows, bounds: AlarmBounds) -> str | None:
    """`reward/length_spearman` pulls the length one way and `monitor/length_ratio` has gone that way, past
    the humans, and past the base, which may have been there already."""
    pull = _recent(rows, "reward/length_spearman", bounds.window)
    ratio = [float(row[key]) for row in rows if row.get(key := "monitor/length_ratio") is not None]
    if not pull or not ratio:
        return None
    mean = sum(pull) / len(pull)
    longer = mean > bounds.length_rank_correlation and ratio[-1] > max(bounds.length_drift, ratio[0])
    shorter = mean < -bounds.length_rank_correlation and ratio[-1] < min(1 / bounds.length_drift, ratio[0])
    if longer or shorter:
        return (
            f"responses are {ratio[-1]:.2f} times as long as the humans', and reward's rank correlation with "
            f"length is {mean:+.2f} over {len(pull)} steps"
        )
    return None


def copying(rows: Rows, bounds: AlarmBounds) -> str | None:
    """`monitor/copy_excess`: the policy writes demonstrations word by word more often than humans would."""
    excess = _recent(rows, "monitor/copy_excess", 1)
    if excess and excess[-1] > bounds.copy_excess:
        rate, natural = (_recent(rows, f"monitor/copy_{name}", 1) for name in ("rate", "natural"))
        seen = f" ({rate[-1]:.1%}, natural {natural[-1]:.1%})" if rate and natural else ""
        return f"copies of demonstrations exceed the natural rate by at least {excess[-1]:.1%}{seen}"
    return None


def cycling(rows: Rows, bounds: AlarmBounds) -> str | None:
    """`monitor/recurrence`: the discriminator has come back to a judgement that it had left."""
    values = _recent(rows, "monitor/recurrence", 1)
    if values and values[-1] > bounds.recurrence:
        return (
            f"the discriminator's ranking of fixed probes agrees by {values[-1]:.2f} more with an earlier "
            "version than with one in between"
        )
    return None


def gumbel_masked(rows: Rows, bounds: AlarmBounds) -> str | None:
    """`policy/gumbel_masked`: the policy draws texts that the discriminator spells with other tokens."""
    values = _recent(rows, "policy/gumbel_masked", bounds.window)
    if values and min(values) > bounds.masked:
        return (
            f"{values[-1]:.0%} of the responses drawn for Gumbel-Softmax are not in canonical spelling and "
            "teach nothing"
        )
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
        overconfidence,
        truncation,
        mode_collapse,
        mode_dropping,
        distinct_collapse,
        self_bleu_collapse,
        repetition,
        length_hacking,
        copying,
        cycling,
        gumbel_masked,
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
