"""Deaths and silences: who is named, when, and what follows. Time is the test's own."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from services.last_words import Process
from services.liveness import RAY, SILENT_S, DeadProcess, LifeSigns, Roll


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def rank(dead: bool = False, cause: str = "worker process exited: SIGKILL") -> Process:
    return Process("a1", "RayTrainWorker", 4711, "node", dead, cause if dead else "")


def worker(dead: bool = False, cause: str = "worker process exited: SIGKILL") -> Process:
    return Process("b2", "RolloutWorker", 4712, "node", dead, cause if dead else "")


def handle(identity: str, answer: Any = None) -> Any:
    """An actor's handle; it answers once `answer` is set, or at once where there is none."""

    async def ready() -> bool:
        if answer is not None:
            await answer.wait()
        return True

    return SimpleNamespace(
        _actor_id=SimpleNamespace(hex=lambda: identity), __ray_ready__=SimpleNamespace(remote=ready)
    )


class Watched:
    """Life signs of a run whose table of processes the test writes."""

    def __init__(self, folder: Path, actors: dict[str, Any] | None = None) -> None:
        self.table: list[Process] = []
        self.said: list[str] = []
        self.ended = ""
        self.clock = Clock()
        named = actors or {"discriminator rank 0": handle("a1"), "rollout worker 0": handle("b2")}
        group = SimpleNamespace(ended_by=lambda: self.ended)
        self.signs = LifeSigns(
            lambda: named, lambda: [group], self.said.append, folder, lambda: self.table, self.clock
        )


def test_a_death_is_told_once_and_one_on_purpose_not_at_all():
    roll = Roll(Clock())
    assert roll.newly_dead([rank(), worker()]) == []
    assert roll.newly_dead([rank(dead=True), worker()]) == [rank(dead=True)]
    assert roll.newly_dead([rank(dead=True), worker(dead=True, cause="killed by `ray.kill`")]) == []


def test_silence_is_named_once_and_again_only_after_an_answer():
    clock = Clock()
    roll = Roll(clock, silent_s=60)
    roll.asked("learner")
    clock.now = 59
    roll.asked("learner")  # the open question keeps its time
    assert roll.newly_silent() == {}
    clock.now = 61
    assert roll.newly_silent() == {"learner": 61}
    clock.now = 999
    assert roll.newly_silent() == {}
    roll.answered("learner")
    roll.asked("learner")
    clock.now = 1060
    assert roll.newly_silent() == {"learner": 61}


def test_a_dead_rank_ends_the_run_at_every_look_and_is_named(tmp_path):
    watched = Watched(tmp_path)
    watched.table = [rank(dead=True)]
    for _ in range(2):  # the first may be a Ctrl-C's
        with pytest.raises(DeadProcess, match=r"discriminator rank 0 \(process 4711\) died: .*SIGKILL"):
            asyncio.run(watched.signs.look())


def test_a_rank_that_nobody_knows_yet_ends_the_run_too(tmp_path):
    watched = Watched(tmp_path, {"other": handle("c3")})
    watched.table = [rank(dead=True)]
    with pytest.raises(DeadProcess, match="RayTrainWorker"):
        asyncio.run(watched.signs.look())


def test_a_group_that_ended_by_itself_ends_the_run(tmp_path):
    watched = Watched(tmp_path)
    watched.ended = "learner worker group went down: no reason"
    with pytest.raises(DeadProcess, match="learner worker group went down"):
        asyncio.run(watched.signs.look())


def test_a_dead_rollout_worker_is_only_told(tmp_path):
    watched = Watched(tmp_path)
    watched.table = [worker(dead=True)]
    asyncio.run(watched.signs.look())
    assert watched.said == [
        "rollout worker 0 (process 4712) died: worker process exited: SIGKILL; "
        "it is replaced when it is needed"
    ]


def test_deaths_at_the_runs_own_end_are_none(tmp_path):
    watched = Watched(tmp_path)
    watched.signs.expect_ends()
    watched.table, watched.ended = [rank(dead=True)], "it ended"
    asyncio.run(watched.signs.look())


def test_who_does_not_answer_is_known_before_a_promise_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr("services.liveness.ANSWER_S", 0.1)

    async def scenario() -> list[str]:
        actors = {"learner rank 0": handle("a1", asyncio.Event()), "rollout worker 0": handle("b2")}
        return await Watched(tmp_path, actors).signs.unanswering()

    assert asyncio.run(scenario()) == ["learner rank 0"]


def test_a_ray_that_does_not_answer_holds_no_look_and_is_named(tmp_path, monkeypatch):
    import threading

    monkeypatch.setattr("services.liveness.ANSWER_S", 0.1)
    never = threading.Event()

    async def scenario() -> list[str]:
        watched = Watched(tmp_path)
        watched.signs._read_table = never.wait  # type: ignore[assignment]
        try:
            await asyncio.wait_for(watched.signs.look(), 2)
            watched.clock.now = SILENT_S + 1
            await asyncio.wait_for(watched.signs.look(), 2)
        finally:
            never.set()
        return watched.said

    [said] = asyncio.run(scenario())
    assert said.startswith(f"{RAY} has not answered for 61 s")
