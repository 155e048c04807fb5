"""The resource plan: which processes a run needs and whether a machine or cluster has room for them.

Pure arithmetic on the configuration; nothing here starts or imports a heavy library.
"""

import importlib.metadata
import os
from dataclasses import dataclass
from typing import Literal

from learner.cpu import cpu_computes_bfloat16
from services.config import Config, ConfigError

Device = Literal["cpu", "cuda"]
Dtype = Literal["float32", "bfloat16"]
JUDGES = ("discriminator", "scoring")
"""Roles that compute where `discriminator.device` says."""


@dataclass(frozen=True)
class Role:
    """`count` processes with `cpus` logical CPUs, `gpus` GPUs and `threads` compute threads each."""

    name: str
    what: str
    count: int
    cpus: float
    gpus: int
    threads: int
    field: str


@dataclass(frozen=True)
class ResourcePlan:
    """All roles of a run, the device each computes on, and the policy's dtype there."""

    roles: tuple[Role, ...]
    devices: dict[str, Device]
    dtype: Dtype

    def settle(self, config: Config) -> Config:
        """The configuration with `policy.dtype` as planned instead of `auto`."""
        return config.model_copy(update={"policy": config.policy.model_copy(update={"dtype": self.dtype})})

    def role(self, name: str) -> Role:
        """The role called `name`."""
        return next(role for role in self.roles if role.name == name)

    @property
    def cpus(self) -> float:
        """Logical CPUs in all."""
        return sum(role.count * role.cpus for role in self.roles)

    @property
    def gpus(self) -> int:
        """GPUs in all."""
        return sum(role.count * role.gpus for role in self.roles)

    def lines(self) -> list[str]:
        """The plan as text, one role a line."""
        rows = [
            f"{role.name:<14} {role.count} x {role.cpus:g} CPU, {role.gpus} GPU, "
            f"{role.threads} thread(s)  {role.what}"
            for role in self.roles
        ]
        return [*rows, f"{'total':<14} {self.cpus:g} CPU, {self.gpus} GPU, {self.dtype}"]

    def check(self, cpus: float, gpus: float, where: str) -> None:
        """Refuse a plan larger than what there is.

        Raises:
            ConfigError: names what is missing, by how much, and the fields that ask for most.
        """
        if self.cpus > cpus:
            asks = ", ".join(f"{role.field} ({role.count} x {role.cpus:g})" for role in self.roles)
            raise ConfigError(
                f"the plan needs {self.cpus:g} CPUs and {where} has {cpus:g}; "
                f"lower one of {asks}, or use a larger machine"
            )
        if self.gpus > gpus:
            raise ConfigError(f"the plan needs {self.gpus} GPUs and {where} has {gpus:g}; {self._gpu_ways()}")

    def _gpu_ways(self) -> str:
        """What to do where there are too few GPUs."""
        if cpu_torch():
            return "this torch is a CPU build and uses none: make clean, then make setup DEVICE=gpu"
        asking = [role for role in self.roles if role.gpus]
        asks = ", ".join(f"{role.field} ({role.count} x {role.gpus})" for role in asking)
        judging = sum(role.count * role.gpus for role in asking if role.name in JUDGES)
        ways = [
            f"each process takes its own: {asks}; lower what is above 1 x 1",
            *([f'set discriminator.device = "cpu" (needs {judging} fewer)'] if judging else []),
            "use a larger machine",
            "or train on the CPU (make clean, then make setup DEVICE=cpu)",
        ]
        return ", ".join(ways)


def resource_plan(config: Config, *, gpus: int, cores: int | None = None) -> ResourcePlan:
    """The processes `config` asks for on a cluster with `gpus` GPUs and nodes of `cores` cores (None: this
    one's).
    """
    cores = cores or os.cpu_count() or 1

    def device(choice: str) -> Device:
        if choice == "auto":
            return "cuda" if gpus else "cpu"
        return "cuda" if choice == "cuda" else "cpu"

    devices: dict[str, Device] = {
        "rollout": device(config.rollout.device),
        "learner": device(config.learner.device),
        "discriminator": device(config.discriminator.device),
    }
    if devices["rollout"] != devices["learner"]:
        raise ConfigError(
            f"rollout.device is {devices['rollout']} and learner.device {devices['learner']}: "
            "weights travel by gloo between CPUs or by NCCL between GPUs, so both need the same kind"
        )
    rollout, learner, disc = config.rollout, config.learner, config.discriminator
    scoring = disc.scoring

    def role(
        name: str, what: str, count: int, cpus: float, threads: int | None, field: str, gpus: int = 1
    ) -> Role:
        device = devices["discriminator" if name in JUDGES else name]
        settled = threads or max(1, cores // count)
        return Role(name, what, count, cpus, gpus if device == "cuda" else 0, settled, field)

    roles: tuple[Role, ...] = (
        role(
            "rollout",
            f"vLLM worker, {config.policy.model}",
            rollout.workers,
            rollout.cpus_per_worker,
            rollout.threads,
            "rollout.workers",
            rollout.tensor_parallel,
        ),
        role(
            "learner",
            f"policy, DeepSpeed ZeRO-{learner.zero_stage}",
            learner.ranks,
            learner.cpus_per_rank,
            learner.threads,
            "learner.ranks",
        ),
        role(
            "discriminator",
            f"trainer, DeepSpeed ZeRO-{disc.zero_stage}",
            disc.ranks,
            disc.cpus_per_rank,
            disc.threads,
            "discriminator.ranks",
        ),
        role(
            "scoring",
            "Ray Serve replica",
            scoring.replicas,
            scoring.cpus,
            scoring.threads,
            "discriminator.scoring.replicas",
        ),
    )
    if config.run.method == "sft":  # workers for its evaluations, and nobody who judges
        roles = tuple(role for role in roles if role.name in ("rollout", "learner"))
    dtype: Dtype = "float32"
    if config.policy.dtype == "bfloat16" or (
        config.policy.dtype == "auto" and (devices["rollout"] == "cuda" or cpu_computes_bfloat16())
    ):
        dtype = "bfloat16"
    return ResourcePlan(roles, devices, dtype)


def cpu_torch() -> bool:
    """Whether the installed torch is a CPU build, by its version: importing it takes seconds."""
    try:
        return importlib.metadata.version("torch").endswith("+cpu")
    except importlib.metadata.PackageNotFoundError:
        return False


def local_gpus() -> int:
    """GPUs of this machine that a run can use: none with a CPU build of torch."""
    return 0 if cpu_torch() else machine_gpus()


def machine_gpus() -> int:
    """NVIDIA GPUs of this machine, counted from their device files (respects CUDA_VISIBLE_DEVICES)."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([entry for entry in visible.split(",") if entry.strip() not in ("", "-1")])
    try:
        return len([name for name in os.listdir("/proc/driver/nvidia/gpus")])
    except FileNotFoundError:
        return 0
