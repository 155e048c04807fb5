"""Configuration of a run as a whole: its name and place, its length, its checkpoints and copies."""

import re
from pathlib import Path

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt, field_validator

from rollout.config import Section, Seed
from rollout.printable import one_line
from services.methods import Method

NAME = re.compile("[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class RunSection(Section):
    """What is run, for how long, and where it is written."""

    name: str = "run"
    """The run's folder is output/name.
    At most 64 letters, digits, ".", "_" and "-", beginning with a letter or a digit."""

    output: str = "runs"
    """Folder that holds run folders."""

    seed: Seed = 0
    """Seed of everything that is drawn."""

    method: Method = "rlgaf"
    """Preset for all fields that are not given: `rlgaf` (the defaults), `gad` (Bradley-Terry discriminator
    with GRPO), or a baseline: `sft` (supervised fine-tuning with early stopping, see learner.sft) or `rlhf`
    (a reward model, trained on data.preferences or else on demonstrations against base samples, then frozen;
    PPO). A file may say what one method needs otherwise: where this is `rlhf`, what stands under
    `[method.rlhf.learner]` overrides `[learner]`, and so for every section; the command line overrides
    both."""

    steps: PositiveInt = 100
    """Learner steps in all (a resumed run goes on to this number)."""

    prompts_per_step: PositiveInt = 16
    """Prompt groups per step; a step trains on prompts_per_step * sampling.group_size responses."""

    max_policy_lag: NonNegativeInt = 0
    """Oldest policy version a trained response may come from, in versions behind the learner; 0 is
    synchronous.
    """

    max_disc_lag: NonNegativeInt = 0
    """Oldest discriminator version a score may come from, in versions behind the newest due; 0 waits for each
    update.
    """

    checkpoint_every: NonNegativeInt = 50
    """Steps between checkpoints (0: only at the end and on Ctrl-C)."""

    keep_checkpoints: PositiveInt = 2
    """Newest checkpoints kept."""

    max_skipped: PositiveInt = 5
    """Steps in a row whose loss or gradient may be not finite. Such a step is left out and its samples are
    kept in `not-finite/`; at this many the run ends with a report and `--resume` goes on from the last
    checkpoint."""

    rollbacks: NonNegativeInt = 0
    """Times that a run loads its last checkpoint's weights at `max_skipped` instead, and goes on with the
    next prompts."""

    mirror: str = ""
    """URL of a folder in object storage (s3://bucket/runs, gs://…; options such as ?region=… belong to it,
    credentials to the environment). The run's folder is copied to it after each checkpoint and at the end,
    and `--resume` goes on from the copy where it is newer. The run's folder itself must still be shared by
    the machines of a cluster."""

    mirror_timeout_s: PositiveFloat = 1800.0
    """Deadline of one copy. Training waits for it; one that fails is tried again at the next checkpoint, and
    the run fails if the last one does."""

    wandb: str = ""
    """Weights & Biases project, or entity/project, that metrics, alarms and the closing table are sent to;
    account and server come from wandb's own variables."""

    exact: bool = False
    """Number-for-number repeatable and resumable: needs both lags 0; costs some generation speed."""

    @field_validator("name")
    @classmethod
    def _is_a_name(cls, name: str) -> str:
        if not NAME.fullmatch(name):
            raise ValueError(
                f"{one_line(name)!r} is no name: give at most 64 of the letters a to z, A to Z, digits, "
                '".", "_" and "-", beginning with a letter or a digit'
            )
        return name

    @field_validator("output")
    @classmethod
    def _is_a_folder(cls, output: str) -> str:
        try:
            Path(output).expanduser()
        except RuntimeError as error:
            raise ValueError(f"{one_line(output)!r} is no folder: {error}") from None
        if not output.isprintable():
            raise ValueError(f"{one_line(output)!r} is no folder: it has control characters")
        return output
