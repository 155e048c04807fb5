"""Which tasks a grid consists of, and which settings its tuning chose. Reads results, runs nothing."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import store
from benchmarks.known_modes.cells import TUNING_SEED, Cell, Grid, Settings, Task

Facts = Mapping[str, Mapping[str, Any]]
"""How each base model was trained, by the name of its assets."""


MAKE = {"known-modes-merged": "--form merged --split 0.1 --out assets/known-modes-merged"}
"""Options of `examples.known_modes.make` for assets that are not its default."""


def base_facts(assets: Path, base: str) -> dict[str, Any]:
    """How the base model was trained, as `examples.known_modes.make` noted it.

    Raises:
        FileNotFoundError: with the command that makes it.
    """
    file = assets / base / "facts.json"
    if not file.is_file():
        how = "python -m examples.known_modes.make" + (f" {MAKE[base]}" if base in MAKE else "")
        raise FileNotFoundError(f"{file} is missing; make the base model with: {how}")
    return dict(json.loads(file.read_text())["training"])


def narrowed(grid: Grid, seeds: str, only: str) -> Grid:
    """The part of a grid that was asked for. What trains nothing runs with its own seed or not at all.

    Raises:
        ValueError: no cell is left, or a seed is no number.
    """
    cells = tuple(cell for cell in grid.cells if only in cell.name)
    if not cells:
        raise ValueError(f"no cell of {grid.name} contains {only!r}: {'; '.join(c.name for c in grid.cells)}")
    if seeds:
        chosen = tuple(int(seed) for seed in seeds.split(","))
        cells = tuple(
            replace(cell, seeds=chosen)
            if cell.kind == "train"
            else replace(cell, seeds=tuple(seed for seed in grid.seeds_of(cell) if seed in chosen))
            for cell in cells
        )
    return replace(grid, cells=cells)


def bases(grid: Grid, assets: Path) -> Facts:
    """Facts of every base model that the grid needs.

    Raises:
        FileNotFoundError: one is missing.
    """
    return {name: base_facts(assets, name) for name in dict.fromkeys(cell.base for cell in grid.cells)}


def tuning(grid: Grid) -> list[Task]:
    """Every candidate of every tuned cell."""
    return [
        Task(grid.name, cell, TUNING_SEED, number, candidate)
        for cell in grid.cells
        for number, candidate in enumerate(cell.candidates)
    ]


def finals(grid: Grid, facts: Facts, results: Path) -> list[Task]:
    """Every cell with every seed, tuned ones with what tuning chose.

    Raises:
        FileNotFoundError: a cell's tuning is not complete.
    """
    return [
        Task(grid.name, cell, seed, chosen=_chosen(grid, cell, facts, results))
        for cell in grid.cells
        for seed in grid.seeds_of(cell)
    ]


def pending(tasks: Iterable[Task], facts: Facts, results: Path) -> list[tuple[Task, Path]]:
    """The tasks that have no result yet, and the file that each is to leave."""
    files = [(task, results / task.file(facts[task.cell.base])) for task in tasks]
    return [(task, file) for task, file in files if store.read(file) is None]


def _chosen(grid: Grid, cell: Cell, facts: Facts, results: Path) -> Settings:
    """The candidate whose best evaluation on selection prompts is highest (`selection_key`); ties go to the
    first.
    """
    if not cell.candidates:
        return {}
    keys = []
    for task in tuning(replace(grid, cells=(cell,))):
        result = store.read(results / task.file(facts[cell.base]))
        if result is None:
            raise FileNotFoundError(f"{task.label} has not run yet")
        keys.append(result["selection"] if result["selection"] is not None else float("-inf"))
    return cell.candidates[keys.index(max(keys))]


def progress(grid: Grid, assets: Path, results: Path) -> tuple[int, int]:
    """Runs that are there, and all runs of the grid."""
    total = len(tuning(grid)) + sum(len(grid.seeds_of(cell)) for cell in grid.cells)
    try:
        facts = bases(grid, assets)
        tasks = tuning(grid)
        found = [store.read(results / task.file(facts[task.cell.base])) for task in tasks]
        if None not in found:
            tasks = finals(grid, facts, results)
            found += [store.read(results / task.file(facts[task.cell.base])) for task in tasks]
    except FileNotFoundError:
        return 0, total
    return sum(result is not None for result in found), total


def summary(result: store.Result) -> str:
    """A run in one line."""
    if result.get("failed"):
        return f"FAILED: {result['failed']}"
    row = result.get("test", {}).get("best") or (result.get("curve") or [{}])[-1]
    if not row:
        return "done"
    names = ("c2st", "mode_tv", "modes_kept", "nll_gap", "valid")
    shown = "  ".join(f"{name} {row[name]:.3f}" for name in names if name in row)
    return f"{shown}  (step {result['best_step']})" if "best_step" in result else shown
