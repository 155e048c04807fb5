"""`rlgaf doctor`: versions, devices, what is missing and how to mend it."""

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from learner.environment import jemalloc
from rollout.engine import check_vllm_version
from services.plan import cpu_torch, machine_gpus

PACKAGES = ("torch", "transformers", "ray", "deepspeed", "pyarrow", "peft", "pydantic")
CUDA_ONLY = ("torchvision", "torchaudio", "torchcodec", "triton")


@dataclass(frozen=True)
class Finding:
    """One line of the report; `remedy` is empty when all is well."""

    what: str
    value: str
    remedy: str = ""


def findings() -> Iterator[Finding]:
    """All checks, in the order they are printed. Imports none of the packages it reports on."""
    yield Finding("python", platform.python_version())
    yield Finding(
        "machine", f"{os.cpu_count()} cores, {_memory_gib():.0f} GiB memory, {_shm_gib():.1f} GiB /dev/shm"
    )
    for name in PACKAGES:
        version = _version(name)
        yield Finding(name, version or "missing", "" if version else "run make setup")
    try:
        yield Finding("vllm", check_vllm_version())
    except RuntimeError as error:
        yield Finding("vllm", "unusable", str(error))
    gpus = machine_gpus()
    yield Finding("GPUs", str(gpus))
    if gpus and cpu_torch():
        yield Finding(
            "torch build",
            "CPU: runs leave this machine's GPUs alone",
            "run make clean and make setup DEVICE=gpu to use them",
        )
    for name in CUDA_ONLY:
        if cpu_torch() and (version := _version(name)):
            remedy = f"pip uninstall -y {name}: it is a CUDA build and breaks transformers beside a CPU torch"
            yield Finding(name, version, remedy)
    compiler = shutil.which("g++")
    yield Finding(
        "g++", compiler or "missing", "" if compiler else "install g++ (Debian: apt-get install g++)"
    )
    library = jemalloc()
    yield Finding("allocator", f"jemalloc, {library}" if library else "glibc's: Ray brings no jemalloc here")
    yield Finding("free disk here", f"{shutil.disk_usage('.').free / 2**30:.0f} GiB")
    address = os.environ.get("RAY_ADDRESS")
    yield Finding("RAY_ADDRESS", address or "not set: a local Ray is started and stopped with each run")
    yield Finding(
        "model hub", "off (HF_HUB_OFFLINE)" if os.environ.get("HF_HUB_OFFLINE") == "1" else "allowed"
    )


def diagnose() -> bool:
    """Print the report; True when nothing needs mending."""
    table = Table(show_header=False, box=None)
    healthy = True
    for finding in findings():
        healthy &= not finding.remedy
        mark = "[red]x[/red]" if finding.remedy else "[green]ok[/green]"
        table.add_row(mark, finding.what, finding.value)
        if finding.remedy:
            table.add_row("", "", f"-> {finding.remedy}")
    Console().print(table)
    return healthy


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def _shm_gib() -> float:
    try:
        status = os.statvfs("/dev/shm")
    except FileNotFoundError:
        return 0.0
    return status.f_frsize * status.f_blocks / 2**30
