"""Entrypoint of the job: start the run, or go on with it where it has a finished checkpoint.

Started again after a failure, a preemption or by hand, it does the right thing: with a checkpoint it adds
`--resume`; a folder that an earlier attempt left without any checkpoint is renamed, not deleted, because the
run would refuse to overwrite it. With an autoscaler it first asks for the machines the plan needs and waits
for them, because `rlgaf train` refuses a plan larger than the cluster it finds.

    start.py CONFIG.toml OVERRIDES.json [--set-aside] [--bring-up GPUS CPUS SECONDS]
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

from services.checkpoint import Checkpoints
from services.config import Config, ConfigError, load
from services.plan import ResourcePlan, resource_plan
from services.run import LEFT_BY_A_FAILED_START


def command(config: Config, toml: Path, overrides: list[str]) -> list[str]:
    """The `rlgaf train` line for this run, with `--resume` when there is a finished checkpoint."""
    newest = Checkpoints(config.folder / "checkpoints", config.run.keep_checkpoints).newest()
    return ["rlgaf", "train", str(toml), *overrides, *(["--resume"] if newest else [])]


def set_aside(folder: Path, now: float) -> Path | None:
    """Rename a run folder that holds no finished checkpoint; None when there is nothing to rename."""
    if not folder.exists() or Checkpoints(folder / "checkpoints", 1).newest() is not None:
        return None
    if {path.name for path in folder.iterdir()} <= LEFT_BY_A_FAILED_START:
        return None
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime(now))
    return folder.rename(folder.with_name(f"{folder.name}.no-checkpoint-{stamp}"))


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
    parser.add_argument("--set-aside", action="store_true")
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
    if arguments.set_aside and (moved := set_aside(config.folder, time.time())):
        print(f"an earlier attempt left no checkpoint; its folder is now {moved}", flush=True)
    line = command(config, arguments.config, overrides)
    print(" ".join(line), flush=True)
    os.execvp(line[0], line)


if __name__ == "__main__":
    main()
