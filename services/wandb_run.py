"""A run in Weights & Biases, beside its own files; off unless `run.wandb` names a project.

tracker = WandbRun(config)                      # a resumed run goes on in the W&B run of its folder
tracker.step(row)                               # rows as MetricsLog.log returns them
tracker.alarms(raised)                          # W&B sends its messages for them
tracker.closing(evaluation)                     # base, best, last, human
tracker.finish(code)

Account, server and mode come from wandb's own variables and login (WANDB_API_KEY, WANDB_BASE_URL,
WANDB_MODE=offline). Charts have the step on their axis: steps made again after a resume are drawn over the
earlier ones.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from rollout.files import read_record, write_whole
from services.config import Config, ConfigError
from services.metrics import Row, flatten
from services.watching.alarms import Alarm

IDENTITY = "wandb.json"
"""File of the run's folder that says which W&B run is its own."""
FINISH_DEADLINE_S = 300.0


class _Identity(BaseModel):
    id: str
    url: str | None = None


def known_id(folder: Path) -> str | None:
    """The W&B run of a run's folder, where it has one. Raises ValueError when the file is damaged."""
    file = folder / IDENTITY
    return read_record(file, _Identity).id if file.exists() else None


class WandbRun:
    """The W&B run that belongs to the run's folder.

    Raises:
        ConfigError: wandb is not installed, or does not begin a run: no account, no project, no server.
    """

    def __init__(self, config: Config) -> None:
        try:
            import wandb
        except ImportError:
            raise ConfigError("run.wandb needs wandb: pip install wandb") from None
        file = config.folder / IDENTITY
        entity, _, project = config.run.wandb.rpartition("/")
        known = known_id(config.folder)
        config.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._run = wandb.init(
                entity=entity or None,
                project=project,
                name=config.run.name,
                id=known,
                resume="allow",
                dir=config.folder,
                config=config.model_dump(mode="json"),
                settings=wandb.Settings(console="off", finish_timeout=FINISH_DEADLINE_S),
            )
        except wandb.Error as error:
            raise ConfigError(f'run.wandb = "{config.run.wandb}": {error}') from None
        write_whole(file, _Identity(id=self._run.id, url=self._run.url).model_dump_json())
        self._run.define_metric("*", step_metric="step")

    @property
    def address(self) -> str:
        """Where to look at it."""
        return self._run.url or f"offline, {self._run.dir}"

    def step(self, row: Row) -> None:
        """Send every number of the row that is finite."""
        numbers = {
            key: value
            for key, value in row.items()
            if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        }
        self._run.log(numbers)

    def alarms(self, raised: Sequence[Alarm]) -> None:
        """Tell of new alarms."""
        for alarm in raised:
            self._run.alert(alarm.name, f"step {alarm.step}: {alarm.message}", level="WARN")

    def closing(self, evaluation: dict[str, dict[str, Any]]) -> None:
        """Put the closing table into the summary."""
        self._run.summary.update(flatten(evaluation))

    def finish(self, code: int) -> None:
        """End with the run's exit code; what cannot be sent by the deadline stays in the run's folder."""
        self._run.finish(exit_code=code)
