"""The known-modes benchmark: `python -m benchmarks.methods run GRID`, `... report`. See benchmarks/README.md.

Protocol: every run is a process with one thread and leaves one file under `benchmarks/results`; what has its
file is not run again, so an interrupted grid goes on where it stopped. `report` rewrites, from those files
alone, the part of docs/results.md between its markers and the figures.
"""

import multiprocessing
import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Annotated

import typer

from benchmarks import store
from benchmarks.grids import GRIDS
from benchmarks.known_modes import full_system, planning
from benchmarks.known_modes.cells import Grid, Task
from benchmarks.known_modes.reporting import REPORT, write_report
from learner.environment import worker_environment

ONE_THREAD = worker_environment() | {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "DS_ACCELERATOR": "cpu",
    "TQDM_DISABLE": "1",
}
app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)

Assets = Annotated[
    Path, typer.Option(help="Folder with known-modes/, which examples.known_modes.make writes")
]
Results = Annotated[Path, typer.Option(help="Folder of the raw results")]


@app.command()
def run(
    grid: Annotated[str, typer.Argument(help=f"One of {', '.join(GRIDS)}")],
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time")] = 2,
    seeds: Annotated[str, typer.Option(help="Seeds, e.g. 0,1,2 (empty: the grid's)")] = "",
    only: Annotated[str, typer.Option(help="Only cells whose name contains this")] = "",
    assets: Assets = Path("assets"),
    results: Results = store.RESULTS,
) -> None:
    """Carry out what a grid still lacks: first its tuning runs, then its seeds."""
    chosen = planning.narrowed(_grid(grid), seeds, only)
    facts = planning.bases(chosen, assets)
    failed = _carry_out(planning.tuning(chosen), facts, jobs, assets, results)
    if not failed:
        failed = _carry_out(planning.finals(chosen, facts, results), facts, jobs, assets, results)
    if failed:
        typer.echo(f"{len(failed)} of the runs broke; the others are kept: " + "; ".join(failed))
        raise typer.Exit(1)


@app.command()
def keep(
    run_folder: Annotated[Path, typer.Argument(help="Finished run of `rlgaf train`, e.g. runs/known-modes")],
    grid: Annotated[str, typer.Argument(help="Grid whose table it joins")] = "default",
    cell: Annotated[str, typer.Argument(help="Cell that it repeats")] = "rlgaf",
    results: Results = store.RESULTS,
) -> None:
    """Take a run of the full system into a grid's table, to be compared with the runs in one process."""
    _grid(grid)
    typer.echo(f"kept as {full_system.keep(run_folder, grid, cell, results)}")


@app.command("list")
def list_grids(assets: Assets = Path("assets"), results: Results = store.RESULTS) -> None:
    """What is declared, and how much of it is there."""
    for grid in GRIDS.values():
        done, all_of_it = planning.progress(grid, assets, results)
        typer.echo(f"{grid.name:<15} {done:>3} of {all_of_it:>3} runs  {grid.question}")


@app.command()
def pack(results: Results = store.RESULTS) -> None:
    """Move finished runs' JSON files into one Parquet file a grid, to be committed."""
    for folder in sorted(path for path in results.iterdir() if path.is_dir()):
        typer.echo(f"{store.pack(folder)}")


@app.command()
def report(
    results: Results = store.RESULTS,
    assets: Assets = Path("assets"),
    out: Annotated[Path, typer.Option(help="Markdown file with the markers")] = REPORT,
) -> None:
    """Write tables and figures from the raw results."""
    for line in write_report(GRIDS.values(), assets, results, out):
        typer.echo(line)


def _grid(name: str) -> Grid:
    if name not in GRIDS:
        raise typer.BadParameter(f"no grid {name!r}; there are {', '.join(GRIDS)}")
    return GRIDS[name]


def _carry_out(
    tasks: Iterable[Task], facts: planning.Facts, jobs: int, assets: Path, results: Path
) -> list[str]:
    """Run the tasks without a result, `jobs` at a time; returns the labels of those that broke."""
    left = planning.pending(tasks, facts, results)
    if not left:
        return []
    typer.echo(f"{len(left)} runs to do, {jobs} at a time")
    os.environ.update(ONE_THREAD)
    context = multiprocessing.get_context("forkserver")
    # Twelve seconds of imports, once.
    context.set_forkserver_preload(["benchmarks.known_modes.task", "deepspeed"])
    broken = []

    def one(task: Task, file: Path) -> tuple[Task, str]:
        """Run a task in a process of its own: the engine's process group and random states are of the
        process.
        """
        began = time.monotonic()
        process = context.Process(target=_carry_out_one, args=(task, assets, file), daemon=True)
        process.start()
        process.join()
        result = store.read(file)
        said = f"broke with exit code {process.exitcode}" if result is None else planning.summary(result)
        return task, f"{said}  {time.monotonic() - began:.0f} s"

    with ThreadPoolExecutor(jobs) as pool:
        running = [pool.submit(one, *item) for item in left]
        try:
            for number, future in enumerate(as_completed(running), start=1):
                task, said = future.result()
                typer.echo(f"[{number}/{len(left)}] {task.label}: {said}")
                broken += [task.label] if said.startswith("broke") else []
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            typer.echo("stopped; the same command goes on")
            raise typer.Exit(130) from None
    return broken


def _carry_out_one(task: Task, assets: Path, file: Path) -> None:
    from benchmarks.known_modes.task import carry_out

    store.write(file, carry_out(task, assets))


if __name__ == "__main__":
    app()
