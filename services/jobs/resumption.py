"""`--auto-resume`: whoever starts a run again need not know how far it came.

With a finished checkpoint the run goes on from it. Without one it begins; what an earlier attempt left in the
run's folder is renamed, not deleted, because a run never writes over another. An earlier driver that still
stops (a job was stopped and started again at once) is waited for.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path

from services.checkpoint import Checkpoints
from services.config import Config
from services.jobs.cluster import STOP_WAIT_S
from services.lease import STALE_S, wait_until_free
from services.run_folder import LEFT_BY_A_FAILED_START


def goes_on(config: Config) -> bool:
    """Whether the run has a finished checkpoint to go on from."""
    return Checkpoints(config.folder / "checkpoints", config.run.keep_checkpoints).newest() is not None


def wait_for_an_earlier_driver(config: Config, say: Callable[[str], None]) -> None:
    """Wait while another driver writes to the run's folder: as long as a job that was told to stop may take,
    or as one that was killed elsewhere is taken to live.

    Raises:
        ConfigError: it goes on for longer.
    """
    stopping_s = float(os.environ.get("RAY_JOB_STOP_WAIT_TIME_S", STOP_WAIT_S))
    wait_until_free(config.folder, max(stopping_s, STALE_S), say)


def set_aside(config: Config, now: float) -> Path | None:
    """Rename the folder of an attempt without a finished checkpoint; None when there is nothing to keep."""
    folder = config.folder
    if not folder.exists() or goes_on(config):
        return None
    if {path.name for path in folder.iterdir()} <= LEFT_BY_A_FAILED_START:
        return None
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime(now))
    return folder.rename(folder.with_name(f"{folder.name}.no-checkpoint-{stamp}"))
