"""One contender in a process of its own, driven turn by turn: contenders alternate and share nothing.

Protocol, one JSON object a line. The parent writes {"turn": n} or {"end": true} to stdin; the child answers
on the file descriptor it was given: {"ready": true} once built, {"seconds": ..., "cpu_s": ...} and more after
a turn, and {"peak_mib": {...}} at the end. Everything that libraries print goes to the log file.

    python -m benchmarks.speed.contender learning:Ours WORKLOAD.json REPLY_FD
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from benchmarks.speed.workload import Workload
from learner.environment import worker_environment

Result = dict[str, Any]


class Competitor(Protocol):
    """What a contender class has; its constructor takes the Workload and makes everything ready."""

    def turn(self, number: int) -> Result:
        """Do the work once; returns at least `seconds`. Turn 0 is for warming up."""

    def close(self) -> None:
        """End what was started."""


class ContenderError(RuntimeError):
    """A contender's process ended; the message holds the end of its log."""


class Contender:
    """The parent's side of a contender's process."""

    def __init__(self, name: str, kind: str, workload: Path, log: Path, python: str = sys.executable) -> None:
        self.name = name
        self.log = log
        threads = str(Workload.read(workload).threads)
        # The allocator's and OpenMP's settings that rlgaf gives its own processes, for all contenders.
        environment = (
            os.environ
            | worker_environment()
            | {"OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}
        )
        reply, write = os.pipe()
        with log.open("w") as output:
            self._process = subprocess.Popen(
                [python, "-m", "benchmarks.speed.contender", kind, str(workload), str(write)],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=[write],
                env=environment,
                cwd=Path(__file__).parents[2],
                text=True,
            )
        os.close(write)
        self._replies = os.fdopen(reply)
        self._answer()

    def turn(self, number: int) -> Result:
        """Let it work once; raises ContenderError when it fails."""
        self._tell({"turn": number})
        return self._answer()

    def end(self) -> dict[str, float]:
        """End it; returns the peak memory of its processes in MiB."""
        self._tell({"end": True})
        peaks = self._answer()["peak_mib"]
        self._process.wait(timeout=120)
        return peaks

    def _tell(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()

    def _answer(self) -> Result:
        line = self._replies.readline()
        if not line:
            code = self._process.wait()
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-25:])
            raise ContenderError(f"{self.name} ended with code {code}; the end of {self.log}:\n{tail}")
        return json.loads(line)


def turns() -> Iterator[int]:
    """Turn numbers as the parent sends them, until it says that it was the last."""
    for line in sys.stdin:
        message = json.loads(line)
        if "end" in message:
            return
        yield message["turn"]


class Timer:
    """Seconds of a with-block."""

    def __enter__(self) -> "Timer":
        self._began = time.perf_counter()
        return self

    def __exit__(self, *exception: object) -> None:
        self.seconds = time.perf_counter() - self._began


def main() -> None:
    kind, path, descriptor = sys.argv[1:]
    module, _, name = kind.partition(":")
    from benchmarks.speed.processes import by_title, cpu_seconds, peaks

    with os.fdopen(int(descriptor), "w") as replies:

        def reply(message: dict[str, Any]) -> None:
            replies.write(json.dumps(message) + "\n")
            replies.flush()

        workload = Workload.read(path)
        competitor: Competitor = getattr(import_module(f"benchmarks.speed.{module}"), name)(workload)
        reply({"ready": True})
        for number in turns():
            before = cpu_seconds()
            result = competitor.turn(number)
            reply(result | {"cpu_s": cpu_seconds() - before})
        peak_mib = by_title(peaks(name.lower()))
        competitor.close()
        reply({"peak_mib": peak_mib})


if __name__ == "__main__":
    main()
