"""The benchmark's results as markdown."""

import statistics
from typing import Any


def markdown(results: dict[str, Any]) -> str:
    """Tables of ratios, of seconds with their parts, and of peak memory."""
    work, machine = results["workload"], results["machine"]
    loads = [f"{machine[key][0]:.1f}" for key in ("load_before", "load_after")]
    lines = [
        f"{work['model']}, {work['dtype']}, {work['threads']} threads: {work['samples']} samples of "
        f"{work['response_tokens']} tokens, groups of {work['group_size']}, prompts of "
        f"{work['prompt_tokens_mean']:.0f} tokens. {machine['cores']} cores, load {' to '.join(loads)}.",
        "",
        "| ratio (min / median / max) | wall time | processor time | aim |",
        "|---|---|---|---|",
    ]
    for part in results["parts"].values():
        for ratio in part["ratios"]:
            processor = _spread(ratio["processor"]) if ratio["processor"] else ""
            lines.append(
                f"| {part['title']}: {ratio['label']} | {_spread(ratio['wall'])} | {processor} "
                f"| >= {ratio['aim']:g} |"
            )
    lines += ["", "| contender | seconds (min / median / max) | medians of its parts |", "|---|---|---|"]
    for title, entry in _contenders(results):
        seconds = [row["seconds"] for row in entry["details"]]
        lines.append(f"| {title} | {_spread(seconds, 3)} | {_medians(entry['details'])} |")
    lines += ["", "| contender | peak memory by process, MiB |", "|---|---|"]
    for title, entry in _contenders(results):
        peaks = ", ".join(f"{name} {size:.0f}" for name, size in entry["peak_mib"].items())
        lines.append(f"| {title} | {peaks} |")
    return "\n".join(lines) + "\n"


def _contenders(results: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [
        (f"{part['title']}: {name}", entry)
        for part in results["parts"].values()
        for name, entry in part["contenders"].items()
    ]


def _spread(values: list[float], digits: int = 2) -> str:
    return " / ".join(f"{v:.{digits}f}" for v in (min(values), statistics.median(values), max(values)))


def _medians(details: list[dict[str, Any]]) -> str:
    names = [name for name in details[0] if name != "seconds"]
    values = {name: statistics.median(row[name] for row in details) for name in names}
    return ", ".join(f"{name} {value:.4g}" for name, value in values.items())
