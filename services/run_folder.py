"""What may be done with a run's folder before anything is written to it."""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from pydantic import BaseModel, ConfigDict, NonNegativeInt

from rollout.data import SPLITS, DataError, DataSplits
from rollout.files import parsed, read_record
from rollout.prompts import PromptSource
from rollout.templates import Renderer
from services.checkpoint import CONFIG, STATE, Checkpoints, Found, read_manifest, require_room
from services.code_version import code_version
from services.config import Config, ConfigError
from services.lease import LEASE, wait_until_free
from services.metrics import read_metrics
from services.resume_rules import compare, flat_config, settled_by
from services.wandb_run import known_id

Say = Callable[[str], None]
LEFT_BY_A_FAILED_START = {"config.toml", "ray", "tensorboard", LEASE}
BEST_RECORD = "samples/best.json"
"""Which policy `best/` and its test responses are; they are whole where it is."""
BEGIN_ANEW = "start it with --auto-resume, which renames what an earlier attempt left and begins anew"


class Best(BaseModel):
    """Step, selection key and test NLL of the best policy."""

    model_config = ConfigDict(ser_json_inf_nan="constants")

    step: NonNegativeInt
    key: float
    nll: float


class _Summary(BaseModel):
    steps: int


class _Early(BaseModel):
    looks: NonNegativeInt = 0


class _Cursor(BaseModel):
    epoch: NonNegativeInt
    position: NonNegativeInt
    seed: int
    prompts: str


class _Loop(BaseModel):
    step: NonNegativeInt
    early: _Early = _Early()
    prompts: _Cursor | None = None


class _State(BaseModel):
    """What is read of a checkpoint's state before the run's processes are there."""

    controller: _Loop
    data: dict[str, str] = {}


def checkpoints_of(config: Config) -> Checkpoints:
    """The run's checkpoints."""
    return Checkpoints(config.folder / "checkpoints", config.run.keep_checkpoints)


def check_folder(config: Config, *, resume: bool, auto: bool) -> None:
    """The run's folder can be written to, by this driver, and a new run writes over no other.

    Raises:
        ConfigError: another driver writes to it, it cannot be made or written, there is nothing to resume, or
            another run's folder would be written over.
    """
    _check_place(config.folder)
    wait_until_free(config.folder)
    held = {path.name for path in config.folder.iterdir()} if config.folder.exists() else set()
    newest = checkpoints_of(config).newest()
    if resume and not auto and newest is None and not config.run.mirror:
        raise ConfigError(f"--resume: {config.folder} has no finished checkpoint; {BEGIN_ANEW}")
    if not resume and held - LEFT_BY_A_FAILED_START:
        go_on = "use --resume to go on with it" if newest else f"it has no finished checkpoint; {BEGIN_ANEW}"
        raise ConfigError(
            f"{config.folder} exists already and nothing was overwritten; {go_on}, or choose another run.name"
        )


def check_resume(config: Config, found: Found, say: Say) -> Config:
    """The configuration with which the run goes on from `found`; what changes by that is said.

    Raises:
        ConfigError: nothing is left to do (all steps done, evaluated and reported), the checkpoint does not
            fit the configuration, or what the run recorded beside it is damaged.
    """
    try:
        _check_records(config.folder, found)
        _check_open(config, found)
        before = flat_config((found.folder / CONFIG).read_text(encoding="utf-8"))
        config = settled_by(before, config)
        differences = compare(before, config)
    except FileNotFoundError as error:
        raise ConfigError(f"--resume: {error.filename} is missing") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"--resume: {error}") from None
    if differences.refused:
        raise ConfigError(
            "\n".join(f"--resume: {line}; use a new run.name for that" for line in differences.refused)
        )
    for line in (*differences.named, *_other_code(found)):
        say(f"changed: {line}")
    return config


def check_data_of(config: Config, splits: DataSplits, renderer: Renderer, found: Found) -> None:
    """The data are those the checkpoint was made with.

    Raises:
        DataError: they are others.
    """
    if cursor := _loop(found).prompts:
        prompts, run = splits.rollout_prompts(), config.run
        source = PromptSource(prompts, renderer.encode, config.sampling.group_size, run.seed)
        source.load_state(cursor.model_dump())
    before, now = _state(found).data, data_digests(splits)
    if others := [name for name in now if before.get(name, now[name]) != now[name]]:
        raise DataError(
            f"the data of the splits {', '.join(others)} are not those of the checkpoint; resume with the "
            "data it was made with"
        )


def data_digests(splits: DataSplits) -> dict[str, str]:
    """A digest of each split's prompts and answers, whatever their order."""
    found = {}
    for name in SPLITS:
        table = getattr(splits, name)
        pairs = sorted(zip(table["prompt_id"].to_pylist(), table["response"].to_pylist(), strict=True))
        found[name] = hashlib.blake2b(json.dumps(pairs).encode(), digest_size=8).hexdigest()
    return found


def read_best(folder: Path) -> Best | None:
    """The record of the run's best policy. Raises ValueError when it is damaged."""
    file = folder / BEST_RECORD
    return read_record(file, Best) if file.exists() else None


def _check_place(folder: Path) -> None:
    """Something can be written where the run's folder is, or will be made."""
    place = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    try:
        with suppress(FileNotFoundError):
            os.stat(folder)
        with tempfile.TemporaryFile(dir=place) as probe:
            probe.write(b"x")
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        raise ConfigError(f"run.output: {folder} cannot be written: {place}: {error.strerror}") from None


def _check_records(folder: Path, found: Found) -> None:
    """What a resumed run reads beside the checkpoint is readable, and there is room for the next one."""
    read_best(folder)
    known_id(folder)
    read_metrics(folder / "metrics.jsonl", found.step)
    require_room(folder, read_manifest(found.folder).size)


def _check_open(config: Config, found: Found) -> None:
    """There is something left to do."""
    folder, step = config.folder, found.step
    if _loop(found).step != step:
        raise ValueError(f"{found.folder}: its state is that of step {_loop(found).step}")
    if step != _summed_up(folder):
        return
    if step >= config.run.steps:
        raise ValueError(f"{folder} has done {step} of {config.run.steps} steps; raise run.steps to go on")
    if _loop(found).early.looks >= config.learner.sft.patience:
        raise ValueError(
            f"{folder} has ended by early stopping at step {step}; raise learner.sft.patience to go on"
        )


def _state(found: Found) -> _State:
    return parsed(str(found.folder / STATE), lambda: _State.model_validate(found.state))


def _loop(found: Found) -> _Loop:
    return _state(found).controller


def _summed_up(folder: Path) -> int | None:
    """Step at which the run was evaluated and reported to its end; a run whose last step is beyond it has
    this still to do, which a resume then does.
    """
    file = folder / "summary.json"
    return read_record(file, _Summary).steps if file.exists() else None


def _other_code(found: Found) -> list[str]:
    before, now = read_manifest(found.folder).code, code_version()
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return [f"{name} {now.get(name)}, the checkpoint was written by {before.get(name)}" for name in names]
