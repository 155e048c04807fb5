"""`rlgaf checkpoint ls | verify | prune`: a run's checkpoints, looked at and cleared up by hand."""

import shutil
import time
from pathlib import Path
from typing import Annotated

import typer

from services.checkpoint import MANIFEST, CheckpointError, Checkpoints, read_manifest, verify
from services.config import ConfigError
from services.lease import wait_until_free

checkpoints = typer.Typer(help="List, verify and prune a run's checkpoints.", no_args_is_help=True)
Run = Annotated[Path, typer.Argument(help="Run folder")]


@checkpoints.command()
def ls(run: Run) -> None:
    """List the checkpoints: size, time, and the code that wrote them. Contents are not read: see `verify`."""
    of_run = _of(run)
    for folder in of_run.folders().values():
        try:
            typer.echo(f"{folder.name}  {_described(folder)}")
        except CheckpointError as error:
            typer.echo(f"{folder.name}  broken: {error}")
    for left in of_run.leftovers():
        typer.echo(f"{left.name}  given up or unfinished; `rlgaf checkpoint prune` removes it")


@checkpoints.command("verify")
def verify_all(run: Run) -> None:
    """Compare every file with its checkpoint's manifest; exit code 1 when a checkpoint is not whole."""
    broken = 0
    for folder in _of(run).folders().values():
        try:
            verify(folder)
            typer.echo(f"{folder.name}  whole")
        except CheckpointError as error:
            broken += 1
            typer.echo(f"{folder.name}  broken: {error}")
    raise typer.Exit(1 if broken else 0)


@checkpoints.command()
def prune(
    run: Run, keep: Annotated[int, typer.Option(min=1, help="Newest whole checkpoints that stay")] = 1
) -> None:
    """Remove all checkpoints but the newest whole ones, and what interrupted attempts left."""
    of_run = _of(run)
    wait_until_free(run)
    of_run.finish()
    whole = [folder for _, folder in sorted(of_run.folders().items(), reverse=True) if _is_whole(folder)]
    if not whole:
        raise ConfigError(f"{run} has no whole checkpoint; nothing was removed")
    for folder in (*of_run.folders().values(), *of_run.leftovers()):
        if folder not in whole[:keep]:
            of_run.remove(folder)
            typer.echo(f"{folder.name}  removed")
    for left in of_run.leftovers():
        shutil.rmtree(left)


def _of(run: Path) -> Checkpoints:
    root = run / "checkpoints"
    if not root.is_dir():
        raise ConfigError(f"{run} has no folder of checkpoints")
    return Checkpoints(root, keep=1)


def _described(folder: Path) -> str:
    manifest = read_manifest(folder)
    written = time.strftime("%Y-%m-%d %H:%M", time.localtime((folder / MANIFEST).stat().st_mtime))
    return f"{manifest.size / 2**20:,.1f} MiB  {written}  rlgaf {manifest.code.get('rlgaf')}"


def _is_whole(folder: Path) -> bool:
    try:
        verify(folder)
    except CheckpointError:
        return False
    return True
