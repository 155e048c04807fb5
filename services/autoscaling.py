"""A cluster that grows: the driver asks its autoscaler for the machines of the run's plan and waits for them.

A plan larger than the cluster is refused, so on a cluster that has yet to grow nothing would ever ask for
more. `RLGAF_AUTOSCALED` says how far it can grow; the Helm chart sets it on its pods.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

from services.config import ConfigError
from services.plan import ResourcePlan

VARIABLE = "RLGAF_AUTOSCALED"
POLL_S = 10.0


@dataclass(frozen=True)
class Largest:
    """What the cluster has when fully grown, and how long a run waits for its part of it."""

    gpus: int
    cpus: float
    seconds: float


def largest() -> Largest | None:
    """From the variable, `GPUS CPUS SECONDS`; None where it is not set.

    Raises:
        ConfigError: it is something else.
    """
    text = os.environ.get(VARIABLE)
    if not text:
        return None
    try:
        gpus, cpus, seconds = text.split()
        return Largest(int(gpus), float(cpus), float(seconds))
    except ValueError:
        raise ConfigError(f"{VARIABLE} = {text!r}: give GPUS CPUS SECONDS, as in '32 128 1800'") from None


def bundles(plan: ResourcePlan) -> list[dict[str, float]]:
    """One resource bundle for each process of the plan."""
    return [
        {"CPU": float(role.cpus)} | ({"GPU": float(role.gpus)} if role.gpus else {})
        for role in plan.roles
        for _ in range(role.count)
    ]


def bring_up(plan: ResourcePlan, limit: Largest, say: Callable[[str], None]) -> None:
    """Wait until the connected cluster has the plan's CPUs and GPUs.

    Raises:
        ConfigError: it can never have them, or has them not within `limit.seconds`.
    """
    plan.check(limit.cpus, limit.gpus, "the cluster at its largest")
    import ray
    from ray.autoscaler.sdk import request_resources

    deadline = time.monotonic() + limit.seconds
    try:
        while True:
            have = ray.cluster_resources()
            cpus, gpus = have.get("CPU", 0.0), have.get("GPU", 0.0)
            if cpus >= plan.cpus and gpus >= plan.gpus:
                return
            left = deadline - time.monotonic()
            if left <= 0:
                plan.check(cpus, gpus, f"the cluster, {limit.seconds:.0f} s after it was asked to grow,")
            say(f"waiting for machines: {cpus:g} of {plan.cpus:g} CPUs, {gpus:g} of {plan.gpus} GPUs")
            # Each time anew: another run takes back what was asked for when its own machines are there.
            request_resources(bundles=bundles(plan))
            time.sleep(max(0.0, min(POLL_S, left)))
    finally:
        # Left standing, the request would keep the machines after the run; idle ones stay long enough for it.
        request_resources(bundles=[])
