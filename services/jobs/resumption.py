"""`--auto-resume`: whoever starts a run again need not know how far it came.

With a finished checkpoint the run goes on from it. Without one it begins; what an earlier attempt left in the
run's folder is renamed, not deleted, because a run never writes over another. An earlier driver that still
stops (a job was stopped and started again at once) is waited for.
"""

import os
import time
from pathlib import Path

from services.checkpoint import CheckpointError, Found
from services.config import Config, ConfigError
from services.jobs.cluster import STOP_WAIT_S
from services.lease import STALE_S, wait_until_free
from services.mirror import fetch_newer
from services.run_folder import BEGIN_ANEW, LEFT_BY_A_FAILED_START, Say, checkpoints_of


def find_checkpoint(config: Config, *, auto: bool, step: int | None, say: Say) -> Found | None:
    """The checkpoint that a run goes on from: the newest whole one, or that of `step`, here or in the run's
    copy, from where it is fetched. None where there is none and `auto`; what an attempt left is set aside
    then.

    Raises:
        ConfigError: there is none, or none of them is whole.
    """
    if auto and (moved := set_aside(config, time.time())) is not None:
        say(f"an earlier attempt left no checkpoint; its folder is now {moved}")
    if config.run.mirror and (fetched := fetch_newer(config, step)) is not None:
        say(f"checkpoint of step {fetched} fetched from {config.run.mirror}")
    checkpoints = checkpoints_of(config)
    try:
        found = checkpoints.newest_whole(step)
    except CheckpointError as error:
        raise ConfigError(f"--resume: no whole checkpoint: {error}") from None
    if found is None and not auto:
        if step is None:
            raise ConfigError(f"--resume: {config.folder} has no finished checkpoint; {BEGIN_ANEW}")
        there = ", ".join(map(str, checkpoints.steps())) or "none"
        raise ConfigError(f"--from-step {step}: {config.folder} has checkpoints of the steps: {there}")
    for reason in found.skipped if found is not None else ():
        say(f"passed over: {reason}")
    return found


def wait_for_an_earlier_driver(config: Config, say: Say) -> None:
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
    wait_until_free(folder)
    if not folder.exists() or checkpoints_of(config).newest() is not None:
        return None
    if {path.name for path in folder.iterdir()} <= LEFT_BY_A_FAILED_START:
        return None
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime(now))
    return folder.rename(folder.with_name(f"{folder.name}.no-checkpoint-{stamp}"))
