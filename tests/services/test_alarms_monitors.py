"""Alarms on collapse, repetition, length, copying and cycling: a series that fires, one that does not."""

import json

import pytest

from services.watching.alarms import AlarmBounds, Alarms

HEALTHY = {
    "monitor/mode_share": 0.95,
    "monitor/modes_lost": 0.02,
    "monitor/distinct_2_share": 0.94,
    "monitor/self_bleu_room": 0.9,
    "monitor/repetition": 0.1,
    "monitor/repetition_human": 0.05,
    "monitor/length_ratio": 1.05,
    "monitor/copy_rate": 0.34,
    "monitor/copy_natural": 0.33,
    "monitor/copy_excess": -0.06,
    "monitor/recurrence": 0.1,
    "monitor/nll_tail": 13.0,
}
EVERY = 5


def series(*evaluations: dict[str, float], spearman: float = 0.1) -> list[dict]:
    """One row a step; monitors appear every `EVERY` steps, in the step after the evaluation."""
    rows = []
    for number, evaluation in enumerate(evaluations):
        for step in range(number * EVERY + 1, (number + 1) * EVERY + 1):
            rows.append({"step": step, "reward/length_spearman": spearman})
        rows[-EVERY] |= HEALTHY | evaluation
    return rows


def raised(rows: list[dict], bounds: AlarmBounds | None = None) -> Alarms:
    alarms = Alarms(bounds)
    for end in range(1, len(rows) + 1):
        alarms.check(rows[:end])
    return alarms


def test_overconfidence_is_entropy_that_human_answers_do_not_bear_out() -> None:
    """The base is no reference for itself: its own entropy is that of the first step."""
    base = {"step": 0, "evaluation/nll": 4.0}
    steps = [{"step": step, "policy/entropy": 3.5 - 0.1 * step} for step in range(1, 6)]
    learns = [base, *steps, {"step": 6, "policy/entropy": 2.9, "evaluation/nll": 3.4}]
    narrows = [base, *steps, {"step": 6, "policy/entropy": 2.9, "evaluation/nll": 4.0}]
    assert raised(learns).raised == []
    (alarm,) = raised(narrows).raised
    assert (alarm.name, alarm.step) == ("overconfidence", 6)
    assert (
        "entropy is 2.9 nats per token while human answers cost 4; the difference has grown by 0.5"
        in alarm.message
    )


COPYING = {"monitor/copy_rate": 0.55, "monitor/copy_excess": 0.08}
CASES = [
    ("mode_collapse", [{}, {"monitor/mode_share": 0.5}], 0.1, 6, "0.50 of the humans'"),
    ("mode_collapse", [{}, {}, {"monitor/modes_lost": 0.15}], 0.1, 11, "15% of the human answers"),
    ("mode_dropping", [{"monitor/nll_tail": nats} for nats in (13.8, 13.0, 13.5)], 0.1, 11, "at best 13"),
    ("distinct_collapse", [{}, {"monitor/distinct_2_share": 0.4}], 0.1, 6, "0.40 of the humans' (bound"),
    ("self_bleu_collapse", [{}, {"monitor/self_bleu_room": 0.3}], 0.1, 6, "is 0.30 of the humans'"),
    ("repetition", [{}, {"monitor/repetition": 0.4}], 0.1, 6, "40% of the tokens"),
    ("length_hacking", [{}, {}, {"monitor/length_ratio": 1.5}], 0.5, 11, "1.50 times as long"),
    ("length_hacking", [{}, {}, {"monitor/length_ratio": 0.6}], -0.5, 11, "-0.50 over 10 steps"),
    ("length_hacking", [{"monitor/length_ratio": r} for r in (1.4, 1.1, 1.5)], 0.5, 11, "1.50 times as long"),
    ("copying", [{}, COPYING], 0.1, 6, "at least 8.0% (55.0%, natural 33.0%)"),
    ("cycling", [{}, {"monitor/recurrence": 1.1}], 0.1, 6, "by 1.10 more"),
]


@pytest.mark.parametrize(("name", "evaluations", "spearman", "step", "text"), CASES)
def test_each_monitor_raises_its_alarm_once(name, evaluations, spearman, step, text) -> None:
    rows = series(*evaluations, spearman=spearman)
    alarms = raised(rows)
    assert [(alarm.name, alarm.step) for alarm in alarms.raised] == [(name, step)]
    assert text in alarms.raised[0].message
    resumed = Alarms()
    resumed.load_state_dict(json.loads(json.dumps(alarms.state_dict())))
    assert resumed.check(rows) == []
    recovered = [*rows, {"step": 99, "reward/length_spearman": 0.0, **HEALTHY}]
    worse = [*recovered, {**rows[step - 1], "step": 100}]
    assert resumed.check(recovered) == []
    assert [alarm.name for alarm in resumed.check(worse)] == [name]


@pytest.mark.parametrize(
    ("evaluations", "spearman"),
    [
        ([{}, {}, {}], 0.1),
        ([{"monitor/mode_share": 4.9}, {"monitor/mode_share": 1.4}, {"monitor/mode_share": 0.8}], 0.1),
        # A base policy that does not cover the humans yet has lost nothing; it is closing in.
        ([{"monitor/modes_lost": 0.9}, {"monitor/modes_lost": 0.5}, {"monitor/modes_lost": 0.55}], 0.1),
        # A base that is far less diverse than the humans is no collapse, nor is going on like it.
        ([{"monitor/distinct_2_share": 0.3}, {"monitor/distinct_2_share": 0.2}], 0.1),
        ([{"monitor/self_bleu_room": 0.4}, {"monitor/self_bleu_room": 0.25}], 0.1),
        ([{"monitor/distinct_2_share": 1.6}, {"monitor/distinct_2_share": 0.6}], 0.1),
        ([{}, {"monitor/repetition": 0.5, "monitor/repetition_human": 0.45}], 0.1),
        # Longer while length does not pay, and length pays while it goes towards the humans.
        ([{}, {}, {"monitor/length_ratio": 1.6}], 0.1),
        ([{}, {}, {"monitor/length_ratio": 0.7}], 0.6),
        ([{}, {}, {"monitor/length_ratio": 1.2}], 0.6),
        # A base that was too long or too short before any reward.
        ([{"monitor/length_ratio": 1.6}] * 3, 0.6),
        ([{"monitor/length_ratio": 0.5}] * 3, -0.6),
        ([{}, {"monitor/copy_rate": 0.4, "monitor/copy_excess": 0.01}], 0.1),
        ([{}, {"monitor/recurrence": 0.4}], 0.1),
        # A policy that comes nearer to all of them, and one that wavers.
        ([{"monitor/nll_tail": 16.0}, {"monitor/nll_tail": 14.0}], 0.1),
        ([{}, {"monitor/nll_tail": 13.4}], 0.1),
    ],
)
def test_healthy_series_are_silent(evaluations, spearman) -> None:
    assert raised(series(*evaluations, spearman=spearman)).raised == []


def test_mode_dropping_is_seen_between_evaluations() -> None:
    rows = series({}, {})
    rows[7]["monitor/nll_tail"] = 13.6
    assert [(alarm.name, alarm.step) for alarm in raised(rows).raised] == [("mode_dropping", 8)]


def test_bounds_can_be_moved() -> None:
    rows = series({}, {"monitor/mode_share": 0.8})
    assert raised(rows).raised == []
    assert [alarm.name for alarm in raised(rows, AlarmBounds(mode_share=0.85)).raised] == ["mode_collapse"]
