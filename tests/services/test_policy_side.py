"""What is counted when rollout workers fail: in a sync, while they generate, and once too often."""

import asyncio
from typing import Any

import pytest

from services.config import load
from services.fleet import FleetError
from services.policy_side import PolicySide

WELL: dict[str, Any] = {"replace": [], "total_s": 0.1, "worker_memory_mib": 900.0}
BROKEN: dict[str, Any] = {"replace": [1], "error": "worker 1: wrong checksum of layer 3"}


class Learner:
    """Gives the listed answers to syncs, then good ones."""

    def __init__(self, *answers: dict[str, Any]) -> None:
        self.answers = list(answers)

    async def call(self, what: str, **arguments: Any) -> list[dict[str, Any]]:
        return [dict(self.answers.pop(0) if what == "sync" and self.answers else WELL)]


class Fleet:
    """Two workers; remembers which were replaced."""

    actors: tuple[str, ...] = ("a", "b")
    info: tuple[dict[str, int], ...] = ({"world_size": 1}, {"world_size": 1})

    def __init__(self) -> None:
        self.replaced: list[list[int]] = []

    async def replace(self, indices: list[int]) -> None:
        self.replaced.append(indices)


def policy_side(*answers: dict[str, Any]) -> PolicySide:
    config = load(None, ["--policy.model=m", "--data.demonstrations=d", "--rollout.max_replacements=2"])
    side = PolicySide(config, None, None, None)  # type: ignore[arg-type]
    side.learner, side.fleet = Learner(*answers), Fleet()  # type: ignore[assignment]
    return side


def test_every_broken_broadcast_is_a_sync_failure():
    side = policy_side(BROKEN, BROKEN)
    assert asyncio.run(side.sync(3)) == {"total_s": 0.1}
    assert side.resident == {"rollout": 900.0}, "it is no time of the sync"
    assert (side.sync_failures, side.replacements) == (2, 2)
    assert side.fleet.replaced == [[1], [1]]


def test_a_worker_that_dies_while_it_generates_is_none():
    side = policy_side()
    failures = [FleetError("rollout worker 0 failed in generate", [0])]

    async def ask() -> str:
        if failures:
            raise failures.pop()
        return "table"

    assert asyncio.run(side._asked(ask)) == "table"
    assert (side.sync_failures, side.replacements) == (0, 1)
    assert side.fleet.replaced == [[0]]


def test_too_many_replacements_end_the_run_with_the_last_reason():
    side = policy_side(BROKEN, BROKEN, BROKEN)
    with pytest.raises(RuntimeError, match=r"replaced 2 times.*wrong checksum of layer 3"):
        asyncio.run(side.sync(3))
    assert side.sync_failures == 3
