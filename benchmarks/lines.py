"""Lines of tables: what several runs say of one measure, mean and range over the seeds. Pure functions of raw
results."""

from collections.abc import Callable, Sequence
from math import isnan
from statistics import mean

from benchmarks.store import Result
from services.report import markdown_table

Value = Callable[[Result], float | None]
Column = tuple[str, Value, int]
"""Head, what it shows of a result, decimals."""


def of_test(name: str, row: str = "best") -> Value:
    """A measure of the checkpoint that selection chose (or of the last step), on test prompts."""
    return lambda result: result.get("test", {}).get(row, {}).get(name)


def spread(values: Sequence[float | None], digits: int) -> str:
    """`mean (least to most)` of the values that are there, with their number where some are missing; NaN is
    a value that was not recorded."""
    if values and all(value is not None and isnan(value) for value in values):
        return "not recorded"
    found = [value for value in values if value is not None and not isnan(value)]
    if not found:
        return "-"
    missing = f" [{len(found)} of {len(values)}]" if len(found) < len(values) else ""
    least, most, middle = (f"{number:.{digits}f}" for number in (min(found), max(found), mean(found)))
    if len(found) == 1 or least == most:
        return (middle if digits else least) + missing
    return f"{mean(found):.{max(digits, 1)}f} ({least} to {most}){missing}"


def results_table(lines: Sequence[tuple[str, Sequence[Result]]], columns: Sequence[Column]) -> str:
    """One line a cell: its name, the number of its runs, and the columns over them."""
    head = ("", "runs", *(name for name, _, _ in columns))
    rows = [
        (name, str(len(results)), *(spread([of(r) for r in results], digits) for _, of, digits in columns))
        for name, results in lines
        if results
    ]
    return markdown_table(head, rows)


def cost_line(who: str, results: Sequence[Result]) -> str:
    """Seconds and tokens of the runs, in a sentence."""
    timed = [r for r in results if r.get("tokens")]
    if not timed:
        return ""
    walls = [r["seconds"]["wall"] for r in timed]
    tokens = {name: mean(r["tokens"][name] for r in timed) for name in timed[0]["tokens"]}
    said = ", ".join(f"{name.replace('_', ' ')} {value / 1e6:.2f} M" for name, value in tokens.items())
    if len(timed) == 1:
        return f"{who}: one run, {walls[0]:.0f} s; {said}."
    wall = f"{mean(walls):.0f} s each ({min(walls):.0f} to {max(walls):.0f})"
    return f"{who}: {len(timed)} runs, {wall}; in the mean {said}."
