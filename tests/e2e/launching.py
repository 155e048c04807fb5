"""Starts `rlgaf train` as a process of its own, waits for its end and finds what it left behind."""

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[2]
STEPS = 8
START_S = 900  # a busy machine may take its time; a run alone on two cores is up in one minute
PROMPTS, SAMPLES = 4, 4
PR_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True)
class Finished:
    """A run that has ended."""

    folder: Path
    code: int
    output: str
    left: list[str]
    """Command lines of processes that outlived it."""

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The steps' metrics, without the base's evaluation."""
        return self.metrics[1:]

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """All rows of metrics.jsonl; the first is the base's evaluation."""
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    @property
    def summary(self) -> dict[str, Any]:
        return json.loads((self.folder / "summary.json").read_text())


Launch = Callable[..., Finished]


def launch(
    configuration: Path,
    name: str,
    overrides: dict[str, str],
    *,
    resume: bool = False,
    meanwhile: Callable[["subprocess.Popen[str]", Path], None] | None = None,
    variables: dict[str, str] | None = None,
) -> Finished:
    """Run `rlgaf train configuration` with overrides to its end; `meanwhile(process, folder)` acts on it,
    `variables` are added to its environment."""
    libc = ctypes.CDLL(None, use_errno=True)
    folder = configuration.parent / name
    log = configuration.parent / f"{name}{'-resumed' if resume else ''}.log"
    words = [f"--run.name={name}", *(f"--{field}={value}" for field, value in overrides.items())]
    command = [sys.executable, "-m", "services.cli", "train", str(configuration), *words]
    before = set(psutil.Process().children(recursive=True))
    # What the run leaves behind becomes a child of this process instead of init's, and is found.
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        with log.open("w") as out:
            process = subprocess.Popen(
                command + ["--resume"] * resume,
                cwd=ROOT,
                env=environment() | (variables or {}),
                stdout=out,
                stderr=subprocess.STDOUT,
                text=True,
            )
            try:
                if meanwhile is not None:
                    meanwhile(process, folder)
                code = process.wait(timeout=1500)
            finally:
                if process.poll() is None:
                    process.send_signal(signal.SIGTERM)
                    process.wait(timeout=60)
        left = alive([p for p in psutil.Process().children(recursive=True) if p not in before])
    finally:
        libc.prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
    return Finished(folder, code, log.read_text(), left)


def environment() -> dict[str, str]:
    """This process's environment without a Ray cluster that the run would join, and without Ray's memory
    monitor, which would end the run for the memory of others."""
    own = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return own | {"OMP_NUM_THREADS": "1", "RAY_memory_monitor_refresh_ms": "0"}


def alive(processes: list[psutil.Process], grace_s: float = 10.0) -> list[str]:
    """Command lines of those that do not end within the grace period; zombies have ended."""
    deadline = time.monotonic() + grace_s
    while True:
        running = []
        for process in processes:
            try:
                if process.status() != psutil.STATUS_ZOMBIE:
                    running.append(" ".join(process.cmdline()))
            except psutil.NoSuchProcess:
                continue
        if not running or time.monotonic() > deadline:
            return running
        time.sleep(0.5)


def steps_done(folder: Path) -> int:
    """Steps in the metrics of the run in this folder."""
    file = folder / "metrics.jsonl"
    return max(0, file.read_text().count("\n") - 1) if file.exists() else 0


def interrupt_after_a_step(process: "subprocess.Popen[str]", folder: Path) -> None:
    """Ctrl-C as soon as the first step is in the metrics; the SIGTERM after it takes no checkpoint away."""
    deadline = time.monotonic() + 1200
    while process.poll() is None and time.monotonic() < deadline:
        if steps_done(folder) > 0:
            process.send_signal(signal.SIGINT)
            time.sleep(0.2)  # signals that are due at once come in the order of their numbers
            process.send_signal(signal.SIGTERM)
            return
        time.sleep(0.05)


def kill_a_rollout_worker(process: "subprocess.Popen[str]", folder: Path) -> None:
    """SIGKILL for one of them as soon as the first step is in the metrics."""
    deadline = time.monotonic() + 1200
    while process.poll() is None and time.monotonic() < deadline:
        if steps_done(folder) > 0:
            workers = [
                child
                for child in psutil.Process(process.pid).children(recursive=True)
                if child.status() != psutil.STATUS_ZOMBIE and "RolloutWorker" in " ".join(child.cmdline())
            ]
            assert workers
            workers[0].send_signal(signal.SIGKILL)
            return
        time.sleep(0.05)
