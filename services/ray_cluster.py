"""The Ray cluster that a run uses: a running one, or a local one that ends with it."""

import logging
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psutil

from services.config import ConfigError
from services.jobs.stop_wait import ensure_stop_wait
from services.plan import local_gpus
from services.ray_access import guard
from services.waiting import bounded

JOIN_S = 60.0
LEAVE_S = 10.0
STARTS = 3
QUIET: dict[str, Any] = {"logging_level": "error", "log_to_driver": False}


@contextmanager
def ray_cluster(address: str | None) -> Iterator[tuple[float, int]]:
    """Connect to the cluster at `address`, or start a local Ray that ends with this block; yields its CPUs
    and GPUs. A job that is stopped then has time for a checkpoint on any cluster. The local one listens on
    loopback and wants a token that only its own processes have.

    Raises:
        ConfigError: the cluster does not let this process join, or Ray does not start.
    """
    import ray

    # More processes than CPUs are this system's normal state: they take turns. Ray would warn about it.
    os.environ.setdefault("RAY_worker_maximum_startup_concurrency", "32")
    os.environ.setdefault("RAY_SERVE_CONTROL_LOOP_INTERVAL_S", "0.5")
    os.environ.setdefault("RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS", "0")
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if local_gpus() else "cpu")
    guard(address)
    logging.getLogger("ray").setLevel(logging.ERROR)
    if address:
        join(address)
    else:
        start()
    try:
        resources = ray.cluster_resources()
        yield resources.get("CPU", 0.0), int(resources.get("GPU", 0))
    finally:
        leave()


def join(address: str, deadline_s: float = JOIN_S) -> None:
    """Connect to a running cluster.

    Raises:
        ConfigError: it does not answer within the deadline, or refuses.
    """
    import ray

    def joined() -> None:
        ray.init(address=address, **QUIET)
        ensure_stop_wait()

    try:
        bounded(deadline_s, "joining it", joined)
    except (RuntimeError, OSError, ValueError) as error:
        raise ConfigError(
            f"RAY_ADDRESS = {address}: {error}; is that cluster up (`ray status --address {address}`)? "
            "Without RAY_ADDRESS a run starts a Ray of its own"
        ) from None


def start() -> None:
    """Start a local Ray; on a busy machine its processes may miss Ray's own deadlines, so up to STARTS times.

    Raises:
        ConfigError: with Ray's last reason.
    """
    others = psutil.Process().children()
    for attempt in range(1, STARTS + 1):
        try:
            return _start()
        except (RuntimeError, OSError) as error:  # a TimeoutError is an OSError
            leave()
            _kill([child for child in psutil.Process().children() if child not in others])
            if attempt == STARTS:
                raise ConfigError(
                    f"Ray did not start here in {STARTS} attempts: {error}. On a slow or full machine end "
                    "other work, or start Ray once with `rlgaf up` and train with RAY_ADDRESS; its logs are "
                    f"in {os.environ.get('RAY_TMPDIR', '/tmp')}/ray/session_latest/logs"
                ) from None
            print(f"Ray did not start ({error}); attempt {attempt + 1} of {STARTS}", file=sys.stderr)
    return None


def _start() -> None:
    import ray

    # A terminal that closes hangs up on every process it started. Ray's must live on for the checkpoint.
    with ignored(signal.SIGHUP):
        ray.init(
            address="local",
            num_cpus=os.cpu_count(),
            num_gpus=local_gpus(),
            object_store_memory=_object_store_bytes(),
            include_dashboard=False,
            **QUIET,
        )


@contextmanager
def ignored(number: signal.Signals) -> Iterator[None]:
    """Processes that are started within the block ignore the signal, and so do those that they start."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(number, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(number, before)


def leave() -> None:
    """Leave Ray within LEAVE_S. Of a Ray of this process's own nothing stays, whatever state it is in."""
    import ray

    own = _own_processes()
    if not any(thread.name.startswith("rlgaf-fit-") for thread in threading.enumerate()):
        try:
            bounded(LEAVE_S, "leaving Ray", ray.shutdown)
        except TimeoutError as error:
            print(f"at the end: {error}", file=sys.stderr)
    _kill(own)


def _kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def _own_processes() -> list[psutil.Process]:
    """Of the Ray that this process started; what its raylet started comes before the raylet."""
    from ray._private.worker import _global_node

    if _global_node is None:
        return []
    own: list[psutil.Process] = []
    for _, started in _global_node.live_processes():
        with suppress(psutil.NoSuchProcess):
            head = psutil.Process(started.pid)
            own = [*head.children(recursive=True), *own, head]
    return own


def _object_store_bytes() -> int:
    """A tenth of this machine's memory, 0.5 to 8 GiB, and no more than half of /dev/shm.

    It holds a few versions of the discriminator's weights; what does not fit goes to disk, at every step.
    """
    import psutil

    wanted = min(max(psutil.virtual_memory().total // 10, 512 * 2**20), 8 * 2**30)
    return min(wanted, shutil.disk_usage("/dev/shm").total // 2)
