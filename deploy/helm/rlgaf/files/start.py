"""Entrypoint of the job: `rlgaf train --auto-resume`, which starts the run or goes on with it.

With an autoscaler it first asks for the machines the plan needs and waits for them, because `rlgaf train`
refuses a plan larger than the cluster it finds.

    start.py CONFIG.toml OVERRIDES.json [--bring-up GPUS CPUS SECONDS]
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

from services.config import ConfigError, load
from services.plan import ResourcePlan, resource_plan


def command(toml: Path, overrides: list[str]) -> list[str]:
    """The `rlgaf train` line."""
    return ["rlgaf", "train", str(toml), *overrides, "--auto-resume"]


def bundles(plan: ResourcePlan) -> list[dict[str, float]]:
    """One resource bundle for each process of the plan."""
    return [
        {"CPU": float(role.cpus)} | ({"GPU": float(role.gpus)} if role.gpus else {})
        for role in plan.roles
        for _ in range(role.count)
    ]


def bring_up(plan: ResourcePlan, timeout_s: float) -> None:
    """Ask the autoscaler for the plan's machines and wait until the cluster has them.

    Raises:
        ConfigError: they are not there within `timeout_s`.
    """
    import ray
    from ray.autoscaler.sdk import request_resources

    ray.init(address="auto", logging_level="error", log_to_driver=False)
    request_resources(bundles=bundles(plan))
    deadline = time.monotonic() + timeout_s
    try:
        while True:
            have = ray.cluster_resources()
            cpus, gpus = have.get("CPU", 0.0), have.get("GPU", 0.0)
            if cpus >= plan.cpus and gpus >= plan.gpus:
                return
            if time.monotonic() > deadline:
                plan.check(cpus, gpus, f"the cluster, {timeout_s:.0f} s after it was asked to grow,")
            print(
                f"waiting for machines: {cpus:g} of {plan.cpus:g} CPUs, {gpus:g} of {plan.gpus} GPUs",
                flush=True,
            )
            time.sleep(10)
    finally:
        # Left standing, the request would keep the machines after the run; idle ones stay long enough for it.
        request_resources(bundles=[])
        ray.shutdown()


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser()
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", type=Path)
    parser.add_argument("--bring-up", nargs=3, type=float, metavar=("GPUS", "CPUS", "SECONDS"))
    arguments = parser.parse_args()
    overrides = json.loads(arguments.overrides.read_text())
    try:
        config = load(arguments.config, overrides)
        if arguments.bring_up is not None:
            gpus, cpus, seconds = arguments.bring_up
            plan = resource_plan(config, gpus=int(gpus))
            plan.check(cpus, gpus, "the chart's worker groups at their largest")
            bring_up(plan, seconds)
    except ConfigError as error:
        sys.exit("\n".join(f"rlgaf: {line}" for line in str(error).splitlines()))
    line = command(arguments.config, overrides)
    print(" ".join(line), flush=True)
    os.execvp(line[0], line)


if __name__ == "__main__":
    main()
