"""What may be done with a run's folder before anything is written to it."""

import json
from pathlib import Path

from pydantic import BaseModel, ConfigDict, NonNegativeInt

from rollout.data import DataSplits
from rollout.files import read_record
from rollout.prompts import PromptSource
from rollout.templates import Renderer
from services.checkpoint import CheckpointError, Checkpoints, verify
from services.config import Config, ConfigError
from services.lease import LEASE, wait_until_free

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


def prepare_folder(config: Config, resume: bool) -> Checkpoints:
    """The checkpoints of a run that may begin in its folder, or go on there.

    Raises:
        ConfigError: another driver writes to it, there is nothing to resume, nothing left to do (all steps
            done, evaluated and reported), a broken checkpoint, or another run's folder would be written over.
    """
    wait_until_free(config.folder)
    checkpoints = Checkpoints(config.folder / "checkpoints", config.run.keep_checkpoints)
    newest = checkpoints.newest()
    if resume and newest is None:
        raise ConfigError(f"--resume: {config.folder} has no finished checkpoint; {BEGIN_ANEW}")
    closed = resume and checkpoints.steps()[-1] == _summed_up(config.folder)
    if closed and checkpoints.steps()[-1] >= config.run.steps:
        raise ConfigError(
            f"--resume: {config.folder} has done {checkpoints.steps()[-1]} of {config.run.steps} steps; "
            "raise run.steps to go on"
        )
    if resume and newest is not None:
        try:
            loop = verify(newest).get("controller", {})
        except CheckpointError as error:
            raise ConfigError(f"--resume: {error}") from None
        patience = config.learner.sft.patience
        if closed and loop.get("early", {}).get("looks", 0) >= patience:
            raise ConfigError(
                f"--resume: {config.folder} has ended by early stopping at step {loop['step']}; raise "
                "learner.sft.patience to go on"
            )
    held = {path.name for path in config.folder.iterdir()} if config.folder.exists() else set()
    if not resume and held - LEFT_BY_A_FAILED_START:
        go_on = "use --resume to go on with it" if newest else f"it has no finished checkpoint; {BEGIN_ANEW}"
        raise ConfigError(
            f"{config.folder} exists already and nothing was overwritten; {go_on}, or choose another run.name"
        )
    return checkpoints


def check_cursor(config: Config, splits: DataSplits, renderer: Renderer, checkpoints: Checkpoints) -> None:
    """Seed and training prompts are those the newest checkpoint was made with; `sft` keeps no cursor.

    Raises:
        DataError: names which of them is another.
    """
    newest = checkpoints.newest()
    assert newest is not None, "prepare_folder has verified it"
    loop = json.loads((newest / "state.json").read_text()).get("controller", {})
    if cursor := loop.get("prompts"):
        prompts, run = splits.rollout_prompts(), config.run
        PromptSource(prompts, renderer.encode, config.sampling.group_size, run.seed).load_state(cursor)


def _summed_up(folder: Path) -> int | None:
    """Step at which the run was evaluated and reported to its end; a run whose last step is beyond it has
    this still to do, which a resume then does.
    """
    file = folder / "summary.json"
    step: int | None = json.loads(file.read_text())["steps"] if file.exists() else None
    return step


def read_best(folder: Path) -> Best | None:
    """The record of the run's best policy. Raises ValueError when it is damaged."""
    file = folder / BEST_RECORD
    return read_record(file, Best) if file.exists() else None
