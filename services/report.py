"""What a finished run says: closing table, verdict, samples, time spent; `summary.json`, `report.md`.

The table has one row per policy (base, best, last) and one for the humans themselves, all measured on the
same test prompts. It is read from left to right: C2ST against the human floor tells whether it worked, the
rest tells at what price.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rollout.files import write_whole
from rollout.printable import printable
from services.evaluation.evaluate import KEYS
from services.metrics import strict
from services.watching.alarms import Alarm

ROWS = ("base", "best", "last", "human")
Evaluation = Mapping[str, Mapping[str, Any]]
Phases = Mapping[str, Mapping[str, float | int]]
Curve = Sequence[tuple[int, Mapping[str, Any]]]

COLUMNS = ("C2ST [95 %]", "NLL", "ROUGE-L", "chrF", "distinct-2", "self-BLEU", "length", "copied")
LEGEND = (
    "C2ST: accuracy of a fresh classifier, human or model; 0.5 = cannot tell; human row: humans against "
    "humans. NLL: human answers under the policy, nats per token; in the human row the best of the policies, "
    "an upper bound on the humans' entropy. ROUGE-L, chrF: overlap with the human answer; in the human row "
    "with the answer to another prompt. distinct-2, self-BLEU: diversity, best near the human row. "
    "length: words. copied: share found verbatim among the training demonstrations."
)


def make_console() -> Console:
    """The terminal as it is; where there is none, wide enough for every table."""
    console = Console()
    return console if console.is_terminal else Console(width=150)


def table_cells(name: str, row: Mapping[str, Any]) -> list[str]:
    """One row of the closing table as text, in the order of `COLUMNS`, after its name."""

    def number(key: str, places: int) -> str:
        value = row.get(key)
        return "-" if value is None or not math.isfinite(value) else f"{value:.{places}f}"

    return [
        "human (floor)" if name == "human" else name,
        f"{number('c2st', 3)} [{number('c2st_low', 2)}, {number('c2st_high', 2)}]",
        ("≤ " if name == "human" else "") + number("nll", 3),
        number("rouge_l", 3),
        number("chrf", 1),
        number("distinct_2", 3),
        number("self_bleu", 1),
        number("length_mean", 1),
        number("copy_rate", 3),
    ]


def verdict(evaluation: Evaluation) -> str:
    """One sentence on whether the best checkpoint came closer to the humans, judged by the two intervals."""
    base, best, human = evaluation["base"], evaluation["best"], evaluation["human"]
    change = f"C2ST {base['c2st']:.3f} → {best['c2st']:.3f} (human floor {human['c2st']:.3f})"
    if best["c2st_high"] < base["c2st_low"]:
        rest = "; it is within the floor's interval" if best["c2st"] <= human["c2st_high"] else ""
        return f"It worked: {change}; the intervals do not touch{rest}."
    if best["c2st_low"] > base["c2st_high"]:
        return f"It got worse: {change}."
    return f"No clear change: {change}; the intervals overlap."


def closing_table(evaluation: Evaluation, title: str = "Test prompts") -> Table:
    """The closing table for a terminal."""
    table = Table(title=Text(title, style="table.title"), caption=LEGEND, caption_justify="left")
    table.add_column("", no_wrap=True)
    for column in COLUMNS:
        table.add_column(column, justify="right", no_wrap=True)
    for name in ROWS:
        if name in evaluation:
            table.add_row(*(Text(cell) for cell in table_cells(name, evaluation[name])))
    return table


def phase_rows(phases: Phases, wall: float | None = None) -> list[list[str]]:
    """Cells of phase, seconds, share of `wall` (default: of the sum), tokens, tokens per second."""
    whole = wall or sum(item["seconds"] for item in phases.values()) or 1.0
    rows = []
    for name, item in sorted(phases.items(), key=lambda pair: -pair[1]["seconds"]):
        seconds, count = item["seconds"], int(item.get("tokens", 0))
        rate = f"{count / seconds:,.0f}" if count and seconds > 0 else ""
        rows.append([name, f"{seconds:.1f}", f"{seconds / whole:.0%}", f"{count:,}" if count else "", rate])
    return rows


PHASE_COLUMNS = ("phase", "seconds", "share", "tokens", "tokens/s")
SAMPLE_COLUMNS = ("prompt", "human", "base", "model")
"""Columns of the samples; one that the samples do not have (`base` during a run) is left out."""


def phase_table(phases: Phases, wall: float | None = None) -> Table:
    """Where the time went, for a terminal."""
    table = Table(title="Where the time went")
    for index, column in enumerate(PHASE_COLUMNS):
        table.add_column(column, justify="left" if index == 0 else "right")
    for cells in phase_rows(phases, wall):
        table.add_row(*(Text(cell) for cell in cells))
    return table


def sample_columns(samples: Sequence[Mapping[str, str]]) -> list[str]:
    """Which of `SAMPLE_COLUMNS` the samples have."""
    return [column for column in SAMPLE_COLUMNS if all(column in sample for sample in samples)]


def sample_rows(samples: Sequence[Mapping[str, str]], width: int = 200) -> list[list[str]]:
    """Cells of the samples in the order of `sample_columns`, one line each, long texts cut in the middle."""

    def cut(text: str) -> str:
        flat = printable(" ".join(text.split()))
        half = width // 2 - 1
        return flat if len(flat) <= width else f"{flat[:half]} … {flat[-half:]}"

    return [[cut(sample[column]) for column in sample_columns(samples)] for sample in samples]


def sample_table(samples: Sequence[Mapping[str, str]], title: str = "Samples") -> Table:
    """Model answers beside the demonstrations, for a terminal."""
    table = Table(title=title, show_lines=True)
    for column in sample_columns(samples):
        table.add_column(column, overflow="fold")
    for cells in sample_rows(samples):
        table.add_row(*(Text(cell) for cell in cells))
    return table


def write_samples(
    run_dir: str | Path, step: int, prompts: Sequence[str], human: Sequence[str], model: Sequence[str]
) -> Path:
    """Write every evaluation response to `samples/step-000020.parquet` (step, prompt, human, model)."""
    path = Path(run_dir) / "samples" / f"step-{step:06d}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {"prompt": list(prompts), "human": list(human), "model": list(model)}
    schema = pa.schema([("step", pa.int32()), *((name, pa.string()) for name in columns)])
    pq.write_table(pa.table({"step": [step] * len(prompts), **columns}, schema=schema), path)
    return path


def print_report(
    console: Console,
    evaluation: Evaluation,
    phases: Phases,
    alarms: Sequence[Alarm],
    samples: Sequence[Mapping[str, str]] = (),
    wall: float | None = None,
) -> None:
    """Print the whole closing report; the verdict and the table come last, where the reader looks."""
    if samples:
        console.print(sample_table(samples))
    console.print(phase_table(phases, wall))
    for alarm in alarms:
        line = printable(f"alarm at step {alarm.step}: {alarm.name}: {alarm.message}")
        console.print(Text(line, style="yellow"))
    console.print(closing_table(evaluation))
    console.print(Text(verdict(evaluation), style="bold"))


def write_summary(
    run_dir: str | Path,
    evaluation: Evaluation,
    phases: Phases,
    alarms: Sequence[Alarm],
    facts: Mapping[str, Any] | None = None,
) -> Path:
    """Write `summary.json`: evaluation.base|best|last|human, verdict, phases, alarms, and `facts`.

    Whole or absent. Raises ValueError when a row or one of its promised keys is missing, or a fact takes a
    name.
    """
    for name in ROWS:
        missing = [key for key in KEYS if key not in evaluation.get(name, {})]
        if missing:
            raise ValueError(f"summary needs evaluation.{name}.{missing[0]}")
    summary: dict[str, Any] = {
        "evaluation": evaluation,
        "verdict": verdict(evaluation),
        "phases": phases,
        "alarms": [{"step": alarm.step, "name": alarm.name, "message": alarm.message} for alarm in alarms],
    }
    clash = summary.keys() & (facts or {}).keys()
    if clash:
        raise ValueError(f"summary facts may not be called {', '.join(sorted(clash))}")
    text = json.dumps(strict({**summary, **(facts or {})}), indent=2, allow_nan=False, ensure_ascii=False)
    return write_whole(Path(run_dir) / "summary.json", text + "\n")


def write_report(
    run_dir: str | Path,
    title: str,
    evaluation: Evaluation,
    phases: Phases,
    alarms: Sequence[Alarm],
    curve: Curve,
    samples: Sequence[Mapping[str, str]] = (),
    wall: float | None = None,
    method: str = "",
    budget: Mapping[str, int] | None = None,
) -> Path:
    """Write `report.md` and `learning_curve.svg`; `curve`: (step, row) on the selection prompts, `budget`:
    tokens by who computed them.
    """
    if curve:
        series = {
            "C2ST": [(step, float(row["c2st"])) for step, row in curve],
            "coverage": [(step, float(row["coverage"])) for step, row in curve if "coverage" in row],
        }
        svg = line_chart(series, "C2ST (0.5 = cannot tell) and coverage on selection prompts", "step")
        write_whole(Path(run_dir) / "learning_curve.svg", svg)
    keys = ("c2st", "coverage", "nll", "rouge_l", "distinct_2", "length_mean")
    steps = [
        [str(step), *("-" if row.get(key) is None else f"{row[key]:.3f}" for key in keys)]
        for step, row in curve
    ]
    parts = [
        f"# {title}",
        *([f"Method: {method}."] if method else []),
        verdict(evaluation),
        "## Test prompts",
        markdown_table(
            ("", *COLUMNS), [table_cells(name, evaluation[name]) for name in ROWS if name in evaluation]
        ),
        LEGEND,
    ]
    if curve:
        parts += [
            "## Learning curve",
            "![learning curve](learning_curve.svg)",
            markdown_table(("step", *keys), steps),
        ]
    if samples:
        parts += ["## Samples", markdown_table(sample_columns(samples), sample_rows(samples))]
    parts += ["## Where the time went", markdown_table(PHASE_COLUMNS, phase_rows(phases, wall))]
    if budget:
        rows = [[name.replace("_", " "), f"{count:,}"] for name, count in budget.items()]
        parts += ["## Budget", markdown_table(("tokens", "count"), rows)]
    lines = [f"- step {alarm.step}, {alarm.name}: {alarm.message}" for alarm in alarms]
    parts += ["## Alarms", "\n".join(lines) or "None."]
    return write_whole(Path(run_dir) / "report.md", "\n\n".join(parts) + "\n")


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table; bars and line breaks inside cells are escaped."""

    def line(cells: Sequence[str]) -> str:
        safe = (
            escape(printable(cell)).replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")
            for cell in cells
        )
        return "| " + " | ".join(safe) + " |"

    return "\n".join([line(head), "|" + " --- |" * len(head), *(line(row) for row in rows)])


def line_chart(
    series: Mapping[str, Sequence[tuple[float, float]]],
    title: str,
    x_label: str,
    width: int = 640,
    height: int = 280,
) -> str:
    """An SVG of a few lines over y from 0 to 1 (values outside are clipped), x from first to last point."""
    points = [point for line in series.values() for point in line]
    first, last = min(x for x, _ in points), max(x for x, _ in points)
    left, right, top, bottom = 40, width - 110, 36, height - 36

    def place(x: float, y: float) -> str:
        across = (x - first) / (last - first) if last > first else 0.5
        return f"{left + across * (right - left):.1f},{bottom - min(max(y, 0.0), 1.0) * (bottom - top):.1f}"

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{left}" y="20">{escape(title)}</text>',
    ]
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = bottom - tick * (bottom - top)
        parts.append(
            f'<path d="M{left} {y:.1f}H{right}" stroke="#ddd"/><text x="8" y="{y + 4:.1f}">{tick:.2f}</text>'
        )
    for x, label in ((left, f"{first:g}"), ((left + right) // 2, x_label), (right, f"{last:g}")):
        parts.append(f'<text x="{x}" y="{height - 14}">{escape(label)}</text>')
    colours = ("#c0392b", "#2471a3", "#1e8449", "#7d3c98")
    for index, (name, line) in enumerate(series.items()):
        colour = colours[index % len(colours)]
        path = " ".join(place(x, y) for x, y in line)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(
            f'<text x="{right + 12}" y="{top + 16 * index + 8}" fill="{colour}">{escape(name)}</text>'
        )
    return "\n".join([*parts, "</svg>\n"])
