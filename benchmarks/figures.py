"""Figures as SVG text: lines over training steps, with the range of the seeds behind them."""

from collections.abc import Callable, Mapping, Sequence
from html import escape
from math import log2
from statistics import mean

from benchmarks.store import Result

COLOURS = ("#c0392b", "#2471a3", "#1e8449", "#7d3c98", "#b9770e", "#17a589", "#566573", "#d98880")
Band = list[tuple[float, float, float, float]]
"""(x, least, mean, most)."""


def over_steps(results: Sequence[Result], name: str, part: str = "steps", x: str = "step") -> Band:
    """A recorded number at the steps that all the runs have it for, over the steps or over another number of
    theirs, of which the runs' mean is taken.
    """
    by_step: dict[int, list[tuple[float, float]]] = {}
    for result in results:
        for row in result.get(part, []):
            if row.get(name) is not None:
                by_step.setdefault(row["step"], []).append((row[x], row[name]))
    points = []
    for _, found in sorted(by_step.items()):
        if len(found) == len(results):
            values = [value for _, value in found]
            points.append((mean(at for at, _ in found), min(values), mean(values), max(values)))
    return points


def by_number(results: Sequence[Result], of: Callable[[Result], float | None]) -> dict[str, Band]:
    """A measure over log2 of the number of demonstrations, by method."""
    found: dict[str, dict[int, list[float]]] = {}
    for result in results:
        value = of(result)
        if value is not None:
            found.setdefault(result["method"], {}).setdefault(result["demonstrations"], []).append(value)
    return {
        method: [(log2(n), min(v), mean(v), max(v)) for n, v in sorted(numbers.items())]
        for method, numbers in found.items()
    }


def chart(
    panels: Mapping[str, Mapping[str, Band]],
    *,
    width: int = 800,
    height: int = 250,
    x_label: str = "step",
    from_zero: bool = True,
) -> str:
    """Panels below one another, each with its own y range and lines of the same names and colours; a panel
    without a point is left out. `from_zero` lets every y axis hold zero.

    Raises:
        ValueError: none is left.
    """
    panels = {title: lines for title, lines in panels.items() if any(lines.values())}
    if not panels:
        raise ValueError("nothing to draw")
    names = dict.fromkeys(name for lines in panels.values() for name in lines)
    colours = {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(names)}
    whole = height * len(panels)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {whole}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{width}" height="{whole}" fill="white"/>',
    ]
    for index, (title, lines) in enumerate(panels.items()):
        parts += _panel(title, lines, colours, index * height, width, height, x_label, from_zero)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(
    title: str,
    lines: Mapping[str, Band],
    colours: Mapping[str, str],
    top: int,
    width: int,
    height: int,
    x_label: str,
    from_zero: bool,
) -> list[str]:
    points = [point for line in lines.values() for point in line]
    first, last = min(p[0] for p in points), max(p[0] for p in points)
    low, high = min(p[1] for p in points), max(p[3] for p in points)
    low = min(low, 0.0) if from_zero else low
    high = high if high > low else low + 1.0
    left, right, upper, lower = 46, width - 24 - round(7 * max(map(len, lines))), top + 32, top + height - 34

    def place(x: float, y: float) -> str:
        across = (x - first) / (last - first) if last > first else 0.5
        return (
            f"{left + across * (right - left):.1f},{lower - (y - low) / (high - low) * (lower - upper):.1f}"
        )

    parts = [f'<text x="{left}" y="{top + 20}">{escape(title)}</text>']
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        value = low + tick * (high - low)
        y = lower - tick * (lower - upper)
        parts.append(
            f'<path d="M{left} {y:.1f}H{right}" stroke="#ddd"/><text x="6" y="{y + 4:.1f}">{value:.2f}</text>'
        )
    ends = [f"{end:.1f}".removesuffix(".0") for end in (first, last)]
    for x, label in ((left, ends[0]), ((left + right) // 2, x_label), (right - 10, ends[1])):
        parts.append(f'<text x="{x}" y="{lower + 18}">{escape(label)}</text>')
    for row, (name, line) in enumerate(lines.items()):
        if not line:
            continue
        colour = colours[name]
        edge = [place(x, most) for x, _, _, most in line] + [place(x, least) for x, least, _, _ in line[::-1]]
        parts.append(f'<polygon points="{" ".join(edge)}" fill="{colour}" opacity="0.15"/>')
        path = " ".join(place(x, middle) for x, _, middle, _ in line)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.8"/>')
        y = upper + 15 * row + 8
        parts.append(f'<text x="{right + 12}" y="{y}" fill="{colour}">{escape(name)}</text>')
    return parts
