"""The Ray cluster that a run uses: a running one, or a local one that ends with it."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from services.jobs.stop_wait import ensure_stop_wait
from services.plan import local_gpus
from services.ray_access import guard


@contextmanager
def ray_cluster(address: str | None) -> Iterator[tuple[float, int]]:
    """Connect to the cluster at `address`, or start a local Ray that ends with this block; yields its CPUs
    and GPUs. A job that is stopped then has time for a checkpoint on any cluster. The local one listens on
    loopback and wants a token that only its own processes have.
    """
    import ray

    # More processes than CPUs are this system's normal state: they take turns. Ray would warn about it.
    os.environ.setdefault("RAY_worker_maximum_startup_concurrency", "32")
    os.environ.setdefault("RAY_SERVE_CONTROL_LOOP_INTERVAL_S", "0.5")
    os.environ.setdefault("RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS", "0")
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if local_gpus() else "cpu")
    guard(address)
    quiet: dict[str, Any] = {"logging_level": "error", "log_to_driver": False}
    if address:
        ray.init(address=address, **quiet)
        ensure_stop_wait()
    else:
        ray.init(
            address="local",
            num_cpus=os.cpu_count(),
            num_gpus=local_gpus(),
            object_store_memory=_object_store_bytes(),
            include_dashboard=False,
            **quiet,
        )
    try:
        resources = ray.cluster_resources()
        yield resources.get("CPU", 0.0), int(resources.get("GPU", 0))
    finally:
        ray.shutdown()


def _object_store_bytes() -> int:
    """A tenth of this machine's memory, 0.5 to 8 GiB, and no more than half of /dev/shm.

    It holds a few versions of the discriminator's weights; what does not fit goes to disk, at every step.
    """
    import psutil

    wanted = min(max(psutil.virtual_memory().total // 10, 512 * 2**20), 8 * 2**30)
    return min(wanted, shutil.disk_usage("/dev/shm").total // 2)
