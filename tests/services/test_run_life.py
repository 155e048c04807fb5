"""How a run ends: what is written before its processes are ended, what a stop promises, how long an end may
take. The life, the systems' ends and Ray's start are the real ones; what they end is in memory.
"""

import ast
import asyncio
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from services import ray_cluster
from services.config import ConfigError
from services.liveness import DeadProcess
from services.run_life import INTERRUPTED, RunLife
from services.system import System
from services.waiting import DaemonThreads, bounded

ROOT = Path(__file__).parents[2]


async def nothing(*_: Any, **__: Any) -> None:
    pass


async def measured(*_: Any) -> dict[str, Any]:
    return {"base": {}}


def life(done: list[str], **system: Any) -> Any:
    """A run whose training is over; `done` is told of its report, its copy and its end."""
    made: Any = RunLife.__new__(RunLife)
    made.display = _Display(done)
    made.console = SimpleNamespace(print=lambda text, **_: done.append(str(text)))
    made.exported = SimpleNamespace(begin=lambda: None, watch_workers=nothing)
    made.signs = SimpleNamespace(expect_ends=lambda: None)
    made.found = object()
    made._load, made._export_discriminator = nothing, nothing
    made.controller = SimpleNamespace(run=nothing, step=3, stopping=False, finished=True, running=True)
    made.checkpoints = SimpleNamespace(steps=lambda: [3])
    made.evaluator = SimpleNamespace(finish=measured)
    made.config = SimpleNamespace(folder="there")
    made._report = lambda evaluation, memory: done.append(f"report {memory}")
    made.mirror = None
    made.system = SimpleNamespace(
        **{"start": nothing, "stop": nothing, "memory": measured, "abort": nobody, "fleet": None} | system
    )
    return made


class _Display:
    def __init__(self, done: list[str]) -> None:
        self.note = done.append

    def training(self) -> None:
        pass

    def __enter__(self) -> "_Display":
        return self

    def __exit__(self, *_: object) -> None:
        pass


async def nobody() -> list[str]:
    return []


async def hangs_at_the_end() -> None:
    raise RuntimeError("learner did not finish stop within 30 s")


def test_an_end_that_fails_costs_neither_report_nor_success():
    done: list[str] = []
    assert asyncio.run(life(done, stop=hangs_at_the_end)._work()) == 0
    assert done == ["report {'base': {}}", "at the end: learner did not finish stop within 30 s"]


def test_memory_that_nobody_tells_costs_no_report():
    async def late() -> None:
        raise RuntimeError("learner did not finish memory within 30 s")

    done: list[str] = []
    assert asyncio.run(life(done, memory=late)._work()) == 0
    assert "report {}" in done


def test_a_stop_whose_end_fails_is_a_stop_with_its_checkpoint():
    done: list[str] = []
    run = life(done, stop=hangs_at_the_end)
    run.controller.stopping = True
    assert asyncio.run(run._work()) == INTERRUPTED
    assert done[0] == "stopped at step 3; go on with --resume"


@pytest.mark.parametrize(
    ("silent", "promise"),
    [
        ([], "stopping after this step with a checkpoint; once more to stop at once"),
        (
            ["learner rank 0"],
            "stopping after this step with a checkpoint, if learner rank 0 answers in time; "
            "once more to stop at once",
        ),
        (None, None),
    ],
)
def test_a_stop_promises_no_checkpoint_that_it_cannot_write(silent, promise):
    async def unanswering() -> list[str]:
        if silent is None:
            raise DeadProcess("discriminator rank 0 died")
        return silent

    async def scenario() -> list[str]:
        done: list[str] = []
        run = life(done)
        run.interrupted, run.signs = False, SimpleNamespace(unanswering=unanswering)
        run._interrupt(asyncio.get_running_loop().create_future(), signal.SIGHUP)
        assert run.controller.stopping
        await run.promising
        return done

    assert asyncio.run(scenario()) == [promise] * (promise is not None)


def test_a_serve_that_hangs_does_not_hold_an_abort(monkeypatch):
    from ray import serve

    never = threading.Event()
    monkeypatch.setattr(serve, "delete", lambda name, _blocking=True: never.wait())
    monkeypatch.setattr("services.system.ABORT_S", 0.3)

    async def scenario() -> list[str]:
        asyncio.get_running_loop().set_default_executor(DaemonThreads())
        system: Any = System.__new__(System)
        system._groups, system._deployed, system.app = [], True, "rlgaf-x"
        return await system.abort()

    began = time.monotonic()
    assert asyncio.run(scenario()) == ["ending the scoring service rlgaf-x did not finish within 0 s"]
    assert time.monotonic() - began < 5
    never.set()


def test_a_call_that_hangs_is_left_behind_and_one_that_fails_is_not_late():
    never = threading.Event()
    with pytest.raises(TimeoutError, match=r"asking did not finish within 0\.1 s"):
        bounded(0.1, "asking", never.wait)
    never.set()

    def fails() -> None:
        raise TimeoutError("its own")

    with pytest.raises(TimeoutError, match="its own"):
        bounded(5, "asking", fails)
    assert bounded(5, "asking", lambda: 7) == 7


@pytest.mark.parametrize("failures", [0, 2, 3])
def test_ray_is_started_again_and_the_last_reason_comes_with_a_hint(monkeypatch, capsys, failures):
    """What a slow machine meets: https://github.com/ray-project/ray/issues/65983."""
    tried: list[str] = []

    def init(**given: Any) -> None:
        tried.append(given["address"])
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN, "Ray's processes outlive a terminal"
        if tried.count("local") <= failures:
            raise RuntimeError("Timed out waiting for file metrics_agent_port")

    monkeypatch.setattr("ray.init", init)
    monkeypatch.setattr(ray_cluster, "leave", lambda: tried.append("leave"))
    before = signal.getsignal(signal.SIGHUP)
    if failures < 3:
        ray_cluster.start()
    else:
        with pytest.raises(ConfigError, match=r"in 3 attempts: Timed out .*metrics_agent_port.*rlgaf up"):
            ray_cluster.start()
    assert tried == ["local", "leave"] * failures + ["local"] * (failures < 3)
    assert signal.getsignal(signal.SIGHUP) == before
    assert capsys.readouterr().err.count("attempt") == min(failures, 2)


def test_no_process_waits_for_ray_without_a_deadline():
    """`ray.get` waits for ever unless it is told otherwise, in drivers and in actors alike."""
    without = [
        f"{file.relative_to(ROOT)}:{node.lineno}"
        for folder in ("rollout", "learner", "discriminator", "services")
        for file in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in ("ray.get", "ray.wait")
        and not any(keyword.arg == "timeout" for keyword in node.keywords)
    ]
    assert without == []
