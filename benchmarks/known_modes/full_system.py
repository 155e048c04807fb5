"""Runs of the full system (`rlgaf train`) as results of a grid, so that a table shows them beside one
process.
"""

import json
import re
import tomllib
from pathlib import Path
from typing import Any

from benchmarks.known_modes import store
from benchmarks.known_modes.recorded import recorded
from services.metrics import read_metrics

FOLDER = "full-system"


def title(cell: str) -> str:
    """What a cell's runs through the full system are called in tables."""
    return f"{cell}, full system"


def keep(run: Path, grid: str, cell: str, results: Path) -> Path:
    """Copy what a finished run folder says of itself into `results`; returns the file.

    Raises:
        FileNotFoundError: the run is not finished, or is none.
    """
    summary: dict[str, Any] = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    config = tomllib.loads((run / "config.toml").read_text(encoding="utf-8"))
    seed = config["run"]["seed"]
    # What a result keeps must mean the same on another machine.
    del config["run"]["output"]
    config["policy"]["model"] = "/".join(Path(config["policy"]["model"]).parts[-2:])
    rows = [
        {"step": row["step"], **recorded(row)} for row in read_metrics(run / "metrics.jsonl") if row["step"]
    ]
    result: store.Result = {
        "grid": grid,
        "cell": title(cell),
        "method": summary["method"],
        "seed": seed,
        "demonstrations": summary["demonstrations"],
        "best_step": summary["best_step"],
        "last_step": summary["steps"],
        "test": {name: summary["evaluation"][name] for name in ("base", "best", "last", "human")},
        "seconds": {"wall": summary["wall_seconds"]},
        "tokens": {name: count for name, count in summary["budget"].items() if name.endswith("_tokens")},
        "alarms": summary["alarms"],
        "curve": summary["learning_curve"],
        "steps": rows,
        "config": config,
    }
    name = re.sub(r"[^a-z0-9.]+", "-", cell.lower()).strip("-")
    file = results / grid / FOLDER / f"{name}.seed{seed}.json"
    store.write(file, result)
    return file


def kept(grid: str, results: Path) -> list[tuple[str, list[store.Result]]]:
    """Full-system results of a grid by cell."""
    found: dict[str, list[store.Result]] = {}
    for file in sorted((results / grid / FOLDER).glob("*.json")):
        result = store.read(file)
        if result is not None:
            found.setdefault(result["cell"], []).append(result)
    return list(found.items())
