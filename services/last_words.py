"""What a run's processes said last, and where they stand: the end of their logs and their threads' stacks.

Every actor of the run is in Ray's own table, also one that died before it could report. Its log, which its
child processes share (vLLM's engine), lies on its node in Ray's session folder, which nobody looks at and
which is gone with a pod: so what ends a run quotes it. Stacks are asked for by a signal, and only of
processes that have a handler for it (`rollout.stacks`): any other process would die of it.
"""

import contextlib
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil
import ray

from rollout.credentials import redacted
from rollout.stacks import STACKS

LINES = 30
DUMP_S = 0.5
"""How long processes have to write their stacks."""
NODE_S = 5.0
"""Deadline of another node's answer."""


@dataclass(frozen=True)
class Process:
    """An actor of this run, as Ray's table has it. `kind` is its class, `cause` what it died of."""

    id: str
    kind: str
    pid: int
    node: str
    dead: bool = False
    cause: str = ""


@dataclass(frozen=True)
class Words:
    """State of a process as the kernel names it, the last lines of its log, and its stacks."""

    state: str
    log: str
    stacks: str


def processes() -> list[Process]:
    """All actors that this driver's job ever had; blocks."""
    from ray._private.state import state

    job = ray.JobID(bytes.fromhex(ray.get_runtime_context().get_job_id()))
    table = state.actor_table(None, job_id=job)
    return [
        Process(
            id=actor["ActorID"],
            kind=actor["ActorClassName"].rpartition(".")[2],
            pid=actor["Pid"],
            node=actor["Address"]["NodeID"],
            dead=actor["State"] == "DEAD",
            cause=_cause(actor["DeathCause"]),
        )
        for actor in table.values()
    ]


def _cause(given: object) -> str:
    context = given.WhichOneof("context")  # type: ignore[attr-defined]
    if context is None:
        return ""
    message = getattr(getattr(given, context), "error_message", "") or context.replace("_", " ")
    return " ".join(message.split())


def last_words(asked: Iterable[Process], lines: int = LINES) -> dict[str, Words]:
    """By actor id, from all nodes; a node that does not answer within NODE_S is left out. Blocks."""
    nodes: dict[str, list[Process]] = {}
    for process in asked:
        if process.pid and process.node:
            nodes.setdefault(process.node, []).append(process)
    if not nodes:
        return {}
    here = ray.get_runtime_context().get_node_id()
    found = _words_here(nodes.pop(here, []), lines)
    away = [_words_on(node, there, lines) for node, there in nodes.items()]
    answered, _ = ray.wait(away, num_returns=len(away), timeout=NODE_S) if away else ([], [])
    for reference in answered:
        with contextlib.suppress(ray.exceptions.RayError):  # its node is gone
            found |= ray.get(reference, timeout=NODE_S)
    return found


def _words_on(node: str, there: list[Process], lines: int) -> "ray.ObjectRef[dict[str, Words]]":
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(_words_here)
    place = NodeAffinitySchedulingStrategy(node, soft=False)
    return task.options(num_cpus=0, scheduling_strategy=place, max_retries=0).remote(there, lines)


def _words_here(there: list[Process], lines: int) -> dict[str, Words]:
    if not there:
        return {}
    from ray._private.worker import _global_node

    assert _global_node is not None, "Ray is connected"
    return words(there, Path(_global_node.get_logs_dir_path()), lines)


def words(there: list[Process], logs: Path, lines: int) -> dict[str, Words]:
    """Of processes of this node whose logs are in `logs`."""
    files = {process.id: sorted(logs.glob(f"worker-*-{process.pid}.*")) for process in there}
    sizes = {file: file.stat().st_size for found in files.values() for file in found}
    for process in there:
        ask_for_stacks(process.pid)
    time.sleep(DUMP_S)
    return {
        process.id: Words(
            _state(process.pid),
            "\n".join(_tail(file, sizes[file], lines) for file in files[process.id] if sizes[file]),
            "\n".join(filter(None, (_after(file, sizes[file]) for file in files[process.id]))),
        )
        for process in there
    }


def ask_for_stacks(pid: int) -> None:
    """Have a process and those below it write their stacks to their logs, where they know how to."""
    with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError, FileNotFoundError, PermissionError):
        for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
            if _handles(process.pid):
                os.kill(process.pid, STACKS)


def _handles(pid: int) -> bool:
    """Whether the process has a handler for STACKS."""
    status = Path(f"/proc/{pid}/status").read_text()
    [caught] = (line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught, 16) >> (STACKS - 1) & 1)


def _state(pid: int) -> str:
    try:
        return psutil.Process(pid).status()
    except psutil.NoSuchProcess:
        return "gone"


def _tail(file: Path, size: int, lines: int) -> str:
    with file.open("rb") as log:
        log.seek(max(0, size - 512 * lines))
        text = log.read(size - log.tell()).decode(errors="replace")
    return redacted("\n".join(text.splitlines()[-lines:]))


def _after(file: Path, size: int) -> str:
    with file.open("rb") as log:
        log.seek(size)
        return redacted(log.read(1 << 20).decode(errors="replace").strip())
