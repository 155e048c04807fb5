"""`--auto-resume`: whoever starts a run again need not know how far it came.

With a finished checkpoint the run goes on from it. Without one it begins; what an earlier attempt left in the
run's folder is renamed, not deleted, because a run never writes over another.
"""

import time
from pathlib import Path

from services.checkpoint import Checkpoints
from services.config import Config
from services.run_folder import LEFT_BY_A_FAILED_START


def goes_on(config: Config) -> bool:
    """Whether the run has a finished checkpoint to go on from."""
    return Checkpoints(config.folder / "checkpoints", config.run.keep_checkpoints).newest() is not None


def set_aside(config: Config, now: float) -> Path | None:
    """Rename the folder of an attempt without a finished checkpoint; None when there is nothing to keep."""
    folder = config.folder
    if not folder.exists() or goes_on(config):
        return None
    if {path.name for path in folder.iterdir()} <= LEFT_BY_A_FAILED_START:
        return None
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime(now))
    return folder.rename(folder.with_name(f"{folder.name}.no-checkpoint-{stamp}"))
