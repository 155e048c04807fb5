"""Runs of the full system (`rlgaf train`) as results of a grid, so that a table shows them beside one
process.
"""

import re
from pathlib import Path

from benchmarks import store
from benchmarks.run_folder import read_run

FOLDER = "full-system"


def title(cell: str) -> str:
    """What a cell's runs through the full system are called in tables."""
    return f"{cell}, full system"


def keep(run: Path, grid: str, cell: str, results: Path) -> Path:
    """Copy what a finished run folder says of itself into `results`; returns the file.

    Raises:
        FileNotFoundError: the run is not finished, or is none.
    """
    result = {"grid": grid, "cell": title(cell)} | read_run(run)
    name = re.sub(r"[^a-z0-9.]+", "-", cell.lower()).strip("-")
    file = results / grid / FOLDER / f"{name}.seed{result['seed']}.json"
    store.write(file, result)
    return file


def kept(grid: str, results: Path) -> list[tuple[str, list[store.Result]]]:
    """Full-system results of a grid by cell."""
    found: dict[str, list[store.Result]] = {}
    for file in store.below(results / grid):
        if file.parent.name == FOLDER and (result := store.read(file)) is not None:
            found.setdefault(result["cell"], []).append(result)
    return list(found.items())
