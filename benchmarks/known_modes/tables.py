"""What tables of the known-modes benchmark show of a result, and tables of its own: pure functions of raw
results."""

from collections.abc import Mapping, Sequence
from math import isnan, nan
from statistics import mean, median
from typing import Any

from benchmarks.known_modes.modes import WINDOW
from benchmarks.lines import Column, Value, of_test, results_table
from benchmarks.store import Result
from services.report import markdown_table


def copy_ratio(result: Result) -> float | None:
    """Answers that are one of the demonstrations, over what fresh expert sentences score."""
    copied, natural = (of_test(name)(result) for name in ("sentence_copy_rate", "natural_copy_rate"))
    return copied / natural if copied is not None and natural else None


def lost_step(result: Result) -> float | None:
    """The recorded step from which some mode of the target stays gone until the end (None: none is; NaN: the
    run did not record it, as those of the full system)."""
    gone_from = None
    steps = result.get("steps", [])
    if not any("gone" in row for row in steps):
        return nan
    for row in steps:
        if not row.get("gone"):
            gone_from = None
        elif gone_from is None:
            gone_from = row["step"]
    return gone_from


def alarm_step(name: str, kind: str = "alarms") -> Value:
    """The step of the first alarm of that name."""
    return lambda result: next((a["step"] for a in result.get(kind, []) if a["name"] == name), None)


def first_gone(result: Result) -> float | None:
    """The first recorded step at which some mode of the target is gone, for good or for a while."""
    full = (row for row in result.get("steps", []) if row["step"] > WINDOW)
    return next((row["step"] for row in full if row.get("gone")), None)


def alarm_lead(result: Result) -> float | None:
    """Steps from the first alarm of a collapse to the loss of a mode, below 0 where the alarm was late (None:
    one of the two did not come)."""
    lost = lost_step(result)
    first = [step for name in COLLAPSE_ALARMS if (step := alarm_step(name)(result)) is not None]
    return lost - min(first) if lost is not None and first else None


COLLAPSE_ALARMS = ("overconfidence", "mode_collapse")

MEASURES: tuple[Column, ...] = (
    ("C2ST", of_test("c2st"), 3),
    ("mode TV", of_test("mode_tv"), 3),
    ("modes kept", of_test("modes_kept"), 0),
    ("NLL gap", of_test("nll_gap"), 2),
    ("valid", of_test("valid"), 3),
    ("copies / natural", copy_ratio, 2),
    ("chosen step", lambda result: result.get("best_step"), 0),
    ("mode TV, last step", of_test("mode_tv", "last"), 3),
)


def alarm_table(results: Sequence[Result], names: Sequence[str]) -> str:
    """One line an alarm: when it came in the runs that lost a mode for good, and what it said in the others;
    empty without results."""
    results = [r for r in results if (step := lost_step(r)) is None or not isnan(step)]
    lost = [r for r in results if lost_step(r) is not None]
    kept = [r for r in results if lost_step(r) is None]
    rows = []
    for name in names:
        raised = [(alarm_step(name)(r), lost_step(r)) for r in lost]
        lead = [gone - step for step, gone in raised if step is not None and gone is not None]
        calls = [first_gone(r) is not None for r in kept if alarm_step(name)(r) is not None]
        rows.append(
            (
                name,
                *map(str, (sum(n > 0 for n in lead), lead.count(0), sum(n < 0 for n in lead))),
                str(len(lost) - len(lead)),
                f"{median(lead):.0f}" if lead else "-",
                *map(str, (sum(calls), len(calls) - sum(calls))),
            )
        )
    waned = sum(first_gone(r) is not None for r in kept)
    names_of = (
        "alarm",
        f"before it, of {len(lost)}",
        "at the same step",
        "later",
        "never",
        "steps ahead, median",
        f"mode gone for a while, of {waned}",
        f"no mode gone, of {len(kept) - waned}",
    )
    return markdown_table(names_of, rows) if results else ""


def alarm_line(results: Sequence[Result]) -> str:
    """In how many runs that lost a mode for good the first alarm of a collapse came before, with and after
    that; empty where no run did."""
    lost = [r for r in results if (step := lost_step(r)) is not None and not isnan(step)]
    if not lost:
        return ""
    leads = [lead for r in lost if (lead := alarm_lead(r)) is not None]
    ahead, late = sum(lead > 0 for lead in leads), sum(lead < 0 for lead in leads)
    return (
        f"{len(lost)} runs lost a mode for good. The first alarm came before that in {ahead}, at the same "
        f"step in {len(leads) - ahead - late}, later in {late}, and never in {len(lost) - len(leads)}."
    )


def reference_table(result: Result) -> str:
    """The rows that no run changes: the base, and fresh demonstrations in its place."""
    lines = [
        (title, [{"test": {"best": result["test"][row]}}])
        for row, title in (("base", "base"), ("human", "fresh demonstrations"))
    ]
    return results_table(lines, MEASURES[:6])


TOLERANCE = (("C2ST", 0.03), ("mode TV", 0.03), ("modes kept", 0.5), ("NLL gap", 0.1))
"""How far the means of one process and of the full system may lie apart for grids in one process to speak for
both."""


def agreement_line(one_process: Sequence[Result], full_system: Sequence[Result]) -> str:
    """Differences of the means (full system minus one process), and whether `TOLERANCE` holds."""
    if not one_process or not full_system:
        return ""
    measures = {name: of for name, of, _ in MEASURES}
    said, kept = [], True
    for name, most in TOLERANCE:
        ours, theirs = (
            mean(value for r in results if (value := measures[name](r)) is not None)
            for results in (one_process, full_system)
        )
        kept &= abs(theirs - ours) <= most
        said.append(f"{name} {theirs - ours:+.3f} (allowed {most:g})")
    verdict = "The two agree" if kept else "The two do NOT agree"
    return f"{verdict}; full system minus one process, in the mean: {', '.join(said)}."


def settings_text(settings: Mapping[str, Any]) -> str:
    """Settings on one line."""
    return ", ".join(f"{name} = {value}" for name, value in settings.items()) or "none"


def tuning_table(lines: Sequence[tuple[str, Sequence[Result]]]) -> str:
    """Every tuning run: the cell, what was tried, its best `selection_key`, and which was chosen."""
    rows = []
    for name, results in lines:
        keys = [r["selection"] if r["selection"] is not None else float("-inf") for r in results]
        for result, key in zip(results, keys, strict=True):
            row: dict[str, Any] = next((r for r in result["curve"] if r["step"] == result["best_step"]), {})
            rows.append(
                (
                    name,
                    settings_text(result["chosen"]),
                    f"{key:.3f}",
                    *(f"{row[n]:.3f}" if n in row else "-" for n in ("c2st", "coverage", "mode_tv")),
                    "chosen" if result is results[keys.index(max(keys))] else "",
                )
            )
    return markdown_table(("cell", "candidate", "score", "C2ST", "coverage", "mode TV", ""), rows)
