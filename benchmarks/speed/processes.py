"""Peak memory and processor time of a process and of everything that it started.

Memory is the kernel's high-water mark (`VmHWM`), so nothing has to watch the process while it works.
"""

from pathlib import Path

import psutil

SMALLEST_MIB = 50.0
RAY_SERVICES = ("gcs_server", "raylet", "dashboard", "monitor", "agent", "log_monitor", "idle", "tail")


Peaks = dict[int, tuple[str, float]]
"""Title and peak resident memory in MiB, by process id."""


def peaks(name: str, pid: int | None = None) -> Peaks:
    """Of the process `pid` (None: this one), as `name`, and of its living descendants."""
    own = psutil.Process(pid)
    found = {own.pid: (name, _high_water(own.pid))}
    for process in own.children(recursive=True):
        try:
            found[process.pid] = (_title(process), _high_water(process.pid))
        except (psutil.Error, FileNotFoundError, ProcessLookupError):
            continue
    return found


def by_title(found: Peaks) -> dict[str, float]:
    """Peaks in MiB by title. Processes below SMALLEST_MIB are left out and Ray's own ones added up as
    `ray services`.
    """
    told: dict[str, float] = {}
    for title, size in found.values():
        if any(word in title.lower() for word in RAY_SERVICES):
            told["ray services"] = told.get("ray services", 0.0) + size
        elif size >= SMALLEST_MIB:
            while title in told:
                title += "'"
            told[title] = size
    return {title: round(size, 1) for title, size in told.items()}


def cpu_seconds() -> float:
    """Processor seconds, user and system, of this process and its living descendants."""
    own = psutil.Process()
    total = 0.0
    for process in [own, *own.children(recursive=True)]:
        try:
            times = process.cpu_times()
        except psutil.Error:
            continue
        total += times.user + times.system
    return total


def _title(process: psutil.Process) -> str:
    words = process.cmdline()
    if not words:
        return process.name()
    if words[0].startswith("ray::"):
        return words[0].split(".")[0]  # without the method that the actor is in
    first = words[0].rsplit("/", 1)[-1]
    if not first.startswith("python"):
        return first
    script = next((word for word in words[1:] if not word.startswith("-")), first)
    return script.rsplit("/", 1)[-1][:40]


def _high_water(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    return 0.0
