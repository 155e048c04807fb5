"""Declared grids, their tasks, what is left to do, and what tuning chooses."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import store
from benchmarks.grids import GRIDS
from benchmarks.known_modes import planning
from benchmarks.known_modes.cells import Cell, Grid, Task
from services.config import ConfigError

ROOT = Path(__file__).parents[2]
FACTS = {"known-modes": {"steps": 1}, "known-modes-merged": {"steps": 1}}


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("name", GRIDS)
def test_every_declared_run_has_a_valid_configuration(name: str, tmp_path: Path) -> None:
    grid = GRIDS[name]
    tasks = [*planning.tuning(grid), *(Task(name, cell, 0) for cell in grid.cells)]
    for task in tasks:
        config = task.config(tmp_path / "base", tmp_path / "data.jsonl", tmp_path)
        assert (config.run.method, config.run.seed) == (task.cell.method, task.seed)
        assert config.run.prompts_per_step * config.sampling.group_size == 256
    files = [task.file(FACTS[task.cell.base]) for task in tasks]
    assert len(set(files)) == len(files)


def test_unknown_settings_are_refused(tmp_path: Path) -> None:
    task = Task("g", Cell("c", {"learner.lrr": 1.0}), 0)
    with pytest.raises(ConfigError, match=r"learner\.lr"):
        task.config(tmp_path, tmp_path, tmp_path)


def test_methods_of_a_grid_are_tuned_alike() -> None:
    tried = ({"learner.lr": 1e-3}, {"learner.lr": 1e-4})
    Grid("g", "", (Cell("a", candidates=tried), Cell("b", candidates=tried), Cell("c")))
    with pytest.raises(ValueError, match="same number of tuning runs"):
        Grid("g", "", (Cell("a", candidates=tried), Cell("b", candidates=tried[:1])))
    with pytest.raises(ValueError, match="same name"):
        Grid("g", "", (Cell("a"), Cell("a")))
    tuned = [cell for cell in GRIDS["demonstrations"].cells if cell.kind == "train"]
    assert {len(cell.candidates) for cell in tuned} == {4}


@pytest.mark.parametrize("name", GRIDS)
def test_every_grid_prints_real_against_real(name: str) -> None:
    grid = GRIDS[name]
    sources = {cell.data.source for cell in grid.cells if cell.kind == "reference"}
    judged = {"expert" if cell.data.source == "long" else cell.data.source for cell in grid.cells}
    assert sources == judged


def test_all_demonstrations_means_the_default_run() -> None:
    assert GRIDS["few"].cell("default, N = 128").settings["discriminator.batch_size"] == 128
    everything = GRIDS["demonstrations"].cell("rlgaf, N = 2048").settings
    assert everything["discriminator.batch_size"] == 256  # the example's


def test_a_result_belongs_to_exactly_what_it_was_run_with() -> None:
    task = Task("g", Cell("A cell, N = 3", {"learner.lr": 1e-3}), 1)
    facts = {"steps": 5}
    assert task.file(facts) == Task("g", Cell("A cell, N = 3", {"learner.lr": 1e-3}), 1).file(facts)
    assert task.file(facts).name.startswith("a-cell-n-3.")
    assert task.file(facts).name.endswith(".seed1.json")
    others = [
        replace(task, seed=2),
        replace(task, candidate=1),
        replace(task, chosen={"learner.lr": 1e-4}),
        replace(task, cell=replace(task.cell, method="gad")),
        replace(task, cell=replace(task.cell, guard=False)),
    ]
    names = {task.file(facts), task.file({"steps": 6}), *(other.file(facts) for other in others)}
    assert len(names) == 2 + len(others)


def test_an_interrupted_grid_goes_on_where_it_stopped(tmp_path: Path) -> None:
    grid = Grid("g", "", (Cell("a"), Cell("b", kind="reference")), seeds=(0, 1))
    tasks = planning.finals(grid, FACTS, tmp_path)
    assert [(task.cell.name, task.seed) for task in tasks] == [("a", 0), ("a", 1), ("b", 0)]
    left = planning.pending(tasks, FACTS, tmp_path)
    assert [task for task, _ in left] == tasks
    store.write(left[1][1], {"test": {}})
    half = left[0][1].with_name(left[0][1].name + ".77.tmp")  # what a kill in the middle of a write leaves
    half.write_text('{"test"')
    assert [task for task, _ in planning.pending(tasks, FACTS, tmp_path)] == [tasks[0], tasks[2]]
    changed = {**FACTS, "known-modes": {"steps": 2}}
    assert len(planning.pending(tasks, changed, tmp_path)) == 3


def test_tuning_takes_the_best_on_the_selection_split(tmp_path: Path) -> None:
    tried = ({"learner.lr": 1e-3}, {"learner.lr": 1e-4}, {"learner.lr": 1e-5})
    grid = Grid("g", "", (Cell("a", candidates=tried),), seeds=(0,))
    tasks = planning.tuning(grid)
    assert [task.settings["learner.lr"] for task in tasks] == [1e-3, 1e-4, 1e-5]
    for task, key in zip(tasks[:2], (None, 0.5), strict=True):
        store.write(tmp_path / task.file(FACTS["known-modes"]), {"selection": key})
    with pytest.raises(FileNotFoundError, match="candidate 2"):
        planning.finals(grid, FACTS, tmp_path)
    store.write(tmp_path / tasks[2].file(FACTS["known-modes"]), {"selection": 0.4})
    (final,) = planning.finals(grid, FACTS, tmp_path)
    assert final.settings["learner.lr"] == 1e-4


def test_parts_of_a_grid(tmp_path: Path) -> None:
    grid = planning.narrowed(GRIDS["demonstrations"], "4,5", "sft")
    assert [cell.method for cell in grid.cells] == ["sft"] * 4
    assert [grid.seeds_of(cell) for cell in grid.cells] == [(4, 5)] * 4
    cells = (Cell("a"), Cell("b", kind="reference"), Cell("c", seeds=(0,)))
    few = Grid("g", "", cells, seeds=(0, 1))
    for asked, runs in {"": "a0 a1 b0 c0", "1": "a1 c1", "0": "a0 b0 c0"}.items():
        tasks = planning.finals(planning.narrowed(few, asked, ""), FACTS, tmp_path)
        assert " ".join(f"{task.cell.name}{task.seed}" for task in tasks) == runs
    with pytest.raises(ValueError, match="no cell of default contains 'nothing'"):
        planning.narrowed(GRIDS["default"], "", "nothing")
    with pytest.raises(FileNotFoundError, match="--form merged --split"):
        planning.bases(planning.narrowed(GRIDS["artefacts"], "", "other tokens"), tmp_path)
    assert planning.progress(GRIDS["default"], tmp_path, tmp_path) == (0, 7)


def test_results_are_written_whole_and_strict(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "r.json"
    assert store.read(path) is None
    store.write(path, {"a": float("nan"), "rows": [{"x": 0.123456789}, {"x": 1}], "empty": []})
    assert store.read(path) == {"a": None, "rows": [{"x": 0.123457}, {"x": 1}], "empty": []}
    assert json.loads(path.read_text()) == store.read(path)
    assert [file.name for file in path.parent.iterdir()] == ["r.json"]


def test_packed_results_are_read_like_files_and_newer_files_win(tmp_path: Path) -> None:
    grid = tmp_path / "grid"
    files = [grid / "a.json", grid / "full-system" / "b.json"]
    for number, file in enumerate(files):
        store.write(file, {"number": number})
    packed = store.pack(grid)
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()] == [
        "grid.parquet"
    ]
    assert [store.read(file) for file in files] == [{"number": 0}, {"number": 1}]
    assert store.below(grid) == files
    assert store.read(grid / "c.json") is None
    store.write(files[0], {"number": 7})
    assert store.read(files[0]) == {"number": 7}
    assert store.pack(grid) == packed
    assert [store.read(file) for file in files] == [{"number": 7}, {"number": 1}]
