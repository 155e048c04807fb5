"""The part of docs/results.md on known modes, from raw results alone. What is outside the markers stays."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks import store
from benchmarks.document import replace_part
from benchmarks.figures import Band, by_number, chart, over_steps
from benchmarks.known_modes import full_system, planning
from benchmarks.known_modes.cells import Grid, Task
from benchmarks.known_modes.tables import (
    MEASURES,
    agreement_line,
    alarm_lead,
    alarm_line,
    alarm_step,
    alarm_table,
    copy_ratio,
    first_gone,
    lost_step,
    reference_table,
    tuning_table,
)
from benchmarks.lines import Column, cost_line, of_test, results_table
from benchmarks.store import Result
from rollout.files import write_whole
from services.report import markdown_table

REPORT = Path("docs/results.md")
PART = "known modes"
COMMAND = "python -m benchmarks.methods report"
CAPTION = """Every line: mean (least to most) over its runs, whose raw numbers are in `benchmarks/results`.
Measured on 4,096 test sentences (512 in "alarms") at the checkpoint that C2ST and coverage on selection
prompts chose. C2ST: .5 = a fresh classifier cannot tell; mode TV 0, 8 modes, NLL gap 0 and valid 1 are
perfect; copies / natural: answers that are one of the demonstrations, over what fresh expert sentences
score."""

Lines = list[tuple[str, list[Result]]]


def write_report(grids: Iterable[Grid], assets: Path, results: Path, out: Path) -> list[str]:
    """Rewrite the part of `out` between the markers, and the figures beside it; returns what was written.

    Raises:
        ValueError: `out` lacks the markers.
    """
    figures = out.parent / "figures"
    parts, written = [CAPTION], []
    for grid in grids:
        section = grid_section(grid, assets, results, figures)
        if section:
            parts.append(section)
            written.append(f"{grid.name}: {planning.progress(grid, assets, results)[0]} runs")
    replace_part(out, PART, COMMAND, "\n\n".join(parts))
    return written or ["no results yet"]


def grid_section(grid: Grid, assets: Path, results: Path, figures: Path) -> str:
    """One grid's tables; empty while it has no result. Writes its figures."""
    lines, tuned = gather(grid, assets, results)
    if not any(found for _, found in lines):
        return ""
    kinds = {cell.name: cell.kind for cell in grid.cells}
    trained = [(name, found) for name, found in lines if found and kinds[name] == "train"]
    whole = full_system.kept(grid.name, results)
    parts = [f"### {grid.name}: {grid.question}", f"`python -m benchmarks.methods run {grid.name}`"]
    parts += [reference_table(found[0]) for name, found in lines if found and kinds[name] == "reference"]
    if trained:
        parts.append(results_table([*trained, *whole], MEASURES + EXTRA.get(grid.name, ())))
        if alarm_lead in [of for _, of, _ in EXTRA.get(grid.name, ())]:
            parts.append(alarm_line([result for _, found in trained for result in found]))
        if grid.name == "alarms":
            runs = [result for _, found in trained for result in found]
            parts += ["When alarms came in runs that lost a mode for good, and in how many of the others:"]
            parts.append(alarm_table(runs, ALARMS))
        for name, found in trained:
            parts.append(agreement_line(found, dict(whole).get(full_system.title(name), [])))
    audits = [(name, found[0]) for name, found in lines if found and kinds[name] == "audit"]
    if audits:
        parts.append(audit_table(audits))
    if grid.name in FIGURES and trained:
        parts += FIGURES[grid.name](trained, figures)
    if any(found for _, found in tuned):
        parts += ["Tuning runs, on the selection split, one seed:", tuning_table(tuned)]
    parts.append(cost_line("One process", [result for _, found in trained for result in found]))
    parts.append(cost_line("Full system", [result for _, found in whole for result in found]))
    return "\n\n".join(part for part in parts if part)


def gather(grid: Grid, assets: Path, results: Path) -> tuple[Lines, Lines]:
    """Results by cell: those of its seeds, and those of its tuning."""
    lines: Lines = []
    tuned: Lines = []
    for cell in grid.cells:
        one = replace(grid, cells=(cell,))
        try:
            facts = planning.bases(one, assets)
            tuned.append((cell.name, _found(planning.tuning(one), facts, results)))
            lines.append((cell.name, _found(planning.finals(one, facts, results), facts, results)))
        except FileNotFoundError:  # its base or its tuning is not there yet
            continue
    return lines, [(name, found) for name, found in tuned if found]


def _found(tasks: Sequence[Task], facts: planning.Facts, results: Path) -> list[Result]:
    read = (store.read(results / task.file(facts[task.cell.base])) for task in tasks)
    return [result for result in read if result is not None]


def audit_table(audits: Sequence[tuple[str, Result]]) -> str:
    """What the auditor found and what it would do."""
    rows = [
        (name, finding["cue"], f"{finding['accuracy']:.3f}", finding["verdict"], finding["explanation"])
        for name, result in audits
        for finding in result["findings"] or [NOTHING_FOUND]
    ]
    return markdown_table(("demonstrations", "cue", "accuracy", "verdict", "why"), rows)


NOTHING_FOUND = {"cue": "none", "accuracy": 0.5, "verdict": "-", "explanation": "-"}

COLLAPSE: tuple[Column, ...] = (
    ("modes kept, last step", of_test("modes_kept", "last"), 0),
    ("a mode gone from step", lost_step, 0),
    ("alarm: overconfidence", alarm_step("overconfidence"), 0),
    ("alarm: mode_collapse", alarm_step("mode_collapse"), 0),
    ("first alarm ahead of it by", alarm_lead, 0),
    ("mode_collapse on the known modes", alarm_step("mode_collapse", "known_alarms"), 0),
)
ALARMS = ("mode_dropping", "mode_collapse", "overconfidence")
EXTRA: dict[str, tuple[Column, ...]] = {
    "rewards": COLLAPSE,
    "alarms": (
        ("a mode gone from step", lost_step, 0),
        ("first time", first_gone, 0),
        *((f"alarm: {name}", alarm_step(name), 0) for name in ALARMS),
    ),
    "frozen": COLLAPSE,
    "gumbel": (*COLLAPSE, ("repetition", lambda r: r["curve"][-1].get("monitor/repetition"), 3)),
    "artefacts": (
        ("artefact rate", of_test("artefact_rate"), 3),
        ("artefact rate, last step", of_test("artefact_rate", "last"), 3),
        ("length TV", of_test("length_tv"), 3),
        ("discriminator accuracy", lambda r: r.get("discriminator_accuracy"), 3),
    ),
    "null": (
        ("discriminator accuracy", lambda r: r.get("discriminator_accuracy"), 3),
        ("moved, nats per sentence", of_test("moved", "last"), 3),
    ),
}
"""Columns of single grids."""


def _steps_figure(file: str, panels: Sequence[tuple[str, str, str]]) -> Callable[[Lines, Path], list[str]]:
    """A figure of recorded numbers: panels of (title, name, part of the result)."""

    def draw(lines: Lines, figures: Path) -> list[str]:
        drawn: dict[str, dict[str, Band]] = {
            title: {name: over_steps(found, number, part) for name, found in lines}
            for title, number, part in panels
        }
        write_whole(figures / file, chart(drawn))
        return [f"![{panels[0][0]}](figures/{file})"]

    return draw


def _by_number(lines: Lines, figures: Path) -> list[str]:
    """Measures by the number of demonstrations, a line a method."""
    panels: dict[str, dict[str, Band]] = {}
    for title, of in (
        ("NLL gap by log2 of the number of demonstrations", of_test("nll_gap")),
        ("C2ST", of_test("c2st")),
        ("mode TV", of_test("mode_tv")),
        ("copies / natural", copy_ratio),
    ):
        panels[title] = by_number([result for _, found in lines for result in found], of)
    write_whole(figures / "demonstrations.svg", chart(panels, x_label="log2 N"))
    return ["![measures by the number of demonstrations](figures/demonstrations.svg)"]


def _forms(lines: Lines, figures: Path) -> list[str]:
    """Mode TV over steps, a panel for whole sequences and one per token."""
    panels = {
        f"{TV[0]}, {level}": {
            name.removesuffix(f", {level}"): over_steps(found, TV[1])
            for name, found in lines
            if name.endswith(level)
        }
        for level in ("sequence", "per token")
    }
    write_whole(figures / "rewards.svg", chart(panels))
    return ["![mode TV over steps by reward form](figures/rewards.svg)"]


TV = ("mode TV of the last 2,048 training samples", "mode_tv", "steps")
FIGURES: dict[str, Callable[[Lines, Path], list[str]]] = {
    "default": _steps_figure(
        "default.svg",
        (TV, ("C2ST on selection prompts", "c2st", "curve"), ("mean reward", "reward", "steps")),
    ),
    "rewards": _forms,
    "demonstrations": _by_number,
    "frozen": _steps_figure("frozen.svg", (("mean reward", "reward", "steps"), TV)),
    "gumbel": _steps_figure("gumbel.svg", (TV, ("entropy, nats per token", "entropy", "steps"))),
}
