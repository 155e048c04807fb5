"""What is counted when rollout workers fail: in a sync, while they generate, and once too often."""

import asyncio
from typing import Any

import pyarrow as pa
import pytest

from rollout.prompts import PromptSource
from services.config import load
from services.fleet import FleetError
from services.policy_side import PolicySide

WELL: dict[str, Any] = {"replace": [], "total_s": 0.1}
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
        self.asked: list[int] = []
        self.failing = 0

    async def generate(self, requests: pa.Table, min_version: int) -> pa.Table:
        self.asked.append(requests.num_rows)
        if len(self.asked) == self.failing:
            raise FleetError("rollout worker 0 did not finish generate", [0])
        return requests.select(["prompt_id"])

    async def replace(self, indices: list[int]) -> None:
        self.replaced.append(indices)


def policy_side(*answers: dict[str, Any], prompts_per_step: int = 16) -> PolicySide:
    words = ["--policy.model=m", "--data.demonstrations=d", "--rollout.max_replacements=2"]
    config = load(None, [*words, f"--run.prompts_per_step={prompts_per_step}"])
    side = PolicySide(config, None, None, None)  # type: ignore[arg-type]
    side.learner, side.fleet = Learner(*answers), Fleet()  # type: ignore[assignment]
    return side


def requests_of(prompts: int, each: int) -> pa.Table:
    rows = {"prompt_id": [f"{i:04}" for i in range(prompts)], "prompt_text": ["x"] * prompts}
    return PromptSource(pa.table(rows), lambda text: [1], each, seed=0).next(prompts, 0)


def test_far_more_responses_than_a_step_has_are_asked_for_in_batches_with_a_deadline_each():
    """Base samples for the audit; of 16 x 8 in a step, one worker decodes 256 together."""
    side = policy_side()
    side.fleet.failing = 2
    requests = requests_of(700, each=3)
    answered = asyncio.run(side.generate(requests, 0))
    assert side.fleet.asked == [85, 85, *[85] * 7, 20]  # the failed one is asked again, the first is not
    assert answered["prompt_id"].to_pylist() == requests["prompt_id"].to_pylist()


def test_a_step_is_one_batch_however_large():
    side = policy_side(prompts_per_step=200)
    asyncio.run(side.generate(requests_of(200, each=8), 0))
    assert side.fleet.asked == [200]


def test_every_broken_broadcast_is_a_sync_failure():
    side = policy_side(BROKEN, BROKEN)
    assert asyncio.run(side.sync(3)) == {"total_s": 0.1}
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
