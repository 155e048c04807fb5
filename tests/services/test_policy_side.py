"""What happens and what is counted when rollout workers fail: in a sync, while they generate, and once too
often. Policy side and fleet are the real ones; workers and learner are in memory.
"""

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from rollout.prompts import PromptSource
from services.config import load
from services.fleet import RolloutFleet
from services.plan import resource_plan
from services.policy_side import PolicySide
from services.sampler_check import SamplerError

BROKEN: dict[str, Any] = {"replace": [1], "error": "worker 1: wrong checksum of layer 3"}
REQUESTS = pa.table({"group_id": ["a", "b", "c", "d"], "sample": [0] * 4, "seed": [1, 2, 3, 4], "n": [1] * 4})


class Worker:
    """A rollout worker, called as its actor handle is. It comes up with version 0 and answers with the
    version it has, and with log-probabilities of -1; once it is killed it fails, like an actor that is gone.
    """

    def __init__(self, index: int, starts: asyncio.Event, comes_up: bool = True) -> None:
        self.index = index
        self.logprob = -1.0
        self.starts = starts
        self.comes_up = comes_up
        self.up = self.dead = False
        self.version = 0
        self.start = SimpleNamespace(remote=self._start)
        self.generate = SimpleNamespace(remote=self._generate)
        self.sample = SimpleNamespace(
            remote=lambda requests, sampling, min_version: self._generate(requests, min_version)
        )

    async def _start(self) -> dict[str, int]:
        await self.starts.wait()
        if not self.comes_up:
            raise ConnectionError("out of memory")
        self.up = True
        return {"world_size": 1}

    async def _generate(self, requests: pa.Table, min_version: int) -> pa.Table:
        if self.dead or not self.up or self.version < min_version:
            raise ConnectionError(f"up {self.up}, dead {self.dead}, version {self.version}")
        columns = {"version": self.version, "policy_version": self.version, "worker": self.index}
        columns["response_logprobs"] = [self.logprob, self.logprob]
        for name, value in columns.items():
            requests = requests.append_column(name, pa.array([value] * requests.num_rows))
        if "sample" not in requests.column_names:
            requests = requests.append_column("sample", pa.array([0] * requests.num_rows))
        return requests


class Fleet(RolloutFleet):
    """Two workers in memory. `created` counts all there ever were; new ones are up once `starts` is set, but
    for those whose number in `stillborn` says that they never are.
    """

    created = 0
    stillborn: frozenset[int] = frozenset()

    def __init__(self, config: Any) -> None:
        self.starts = asyncio.Event()
        self.starts.set()
        super().__init__(config, resource_plan(config, gpus=0))

    def _create(self, index: int) -> Any:
        self.created += 1
        return Worker(index, self.starts, self.created not in self.stillborn)


class Learner:
    """Executes one command at a time. The listed answers are those to the first syncs; the others bring the
    workers to the version that is named, or else to the learner's own. Every token's log-probability is -1.
    """

    def __init__(self, *answers: dict[str, Any]) -> None:
        self.answers = list(answers)
        self.turn = asyncio.Lock()
        self.workers: list[Worker] = []
        self.version = 0
        self.checks: list[int] = []
        """How many workers were compared with the learner, each time."""

    async def call(self, what: str, **arguments: Any) -> list[dict[str, Any]]:
        async with self.turn:
            await asyncio.sleep(0)
            if what == "connect":
                dead = [i for i, worker in enumerate(arguments["workers"]) if worker.dead]
                if dead:
                    return [{"replace": dead, "error": f"workers {dead} do not answer"}]
                self.workers = list(arguments["workers"])
            if what == "response_logprobs":
                table = arguments["table"]
                self.checks.append(len(set(table["worker"].to_pylist())))
                return [(self.version, [np.full(2, -1.0)] * table.num_rows)]
            if what == "sync" and self.answers:
                return [dict(self.answers.pop(0))]
            if what == "sync":
                self.version = self.version if arguments["version"] is None else arguments["version"]
                for worker in self.workers:
                    worker.version = self.version
            return [{"replace": [], "total_s": 0.1, "worker_memory_mib": 900.0}]


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`await start(answers to syncs …)`: a policy side whose two workers are up and at version 0."""
    monkeypatch.setattr("services.fleet.ray.kill", lambda worker: setattr(worker, "dead", True))

    async def started(*answers: dict[str, Any]) -> Any:
        words = ["--policy.model=m", "--data.demonstrations=d", "--rollout.workers=2"]
        config = load(None, [*words, "--rollout.max_replacements=2", "--policy.dtype=float32"])
        plan, prompts = resource_plan(config, gpus=0), {"prompt_id": ["a", "b"], "prompt_text": ["x", "y"]}
        splits, renderer = (
            SimpleNamespace(selection=pa.table(prompts)),
            SimpleNamespace(encode=lambda text: [1]),
        )
        side: Any = PolicySide(config, plan, splits, renderer)  # type: ignore[arg-type]
        side.learner, side.fleet = Learner(), Fleet(config)
        await side.fleet.start()
        await side._meet()
        side.learner.answers = list(answers)
        return side

    return started


async def settled() -> None:
    """Everything has run that does not wait for an event of the test."""
    for _ in range(100):
        await asyncio.sleep(0)


def versions(answers: pa.Table) -> list[int]:
    assert answers["group_id"].to_pylist() == REQUESTS["group_id"].to_pylist()
    return answers["version"].to_pylist()


def requests_of(prompts: int, each: int) -> pa.Table:
    rows = {"prompt_id": [f"{i:04}" for i in range(prompts)], "prompt_text": ["x"] * prompts}
    table = PromptSource(pa.table(rows), lambda text: [1], each, seed=0).next(prompts, 0)
    return table.append_column("sample", pa.array([0] * prompts))


def asked_of(side: Any, kills_at: int = 0) -> list[int]:
    """The sizes of the batches that the fleet will be asked for; a worker dies at the given one."""
    sizes: list[int] = []
    generate = side.fleet.generate

    async def counted(requests: pa.Table, min_version: int) -> pa.Table:
        sizes.append(requests.num_rows)
        if len(sizes) == kills_at:
            side.fleet.actors[0].dead = True
        return await generate(requests, min_version)

    side.fleet.generate = counted
    return sizes


def test_far_more_responses_than_a_step_has_are_asked_for_in_batches_with_a_deadline_each(start):
    """Base samples for the audit; of 16 x 8 in a step, two workers decode 512 together."""

    async def scenario() -> None:
        side = await start()
        asked = asked_of(side, kills_at=2)
        requests = requests_of(700, each=3)
        answered = await side.generate(requests, 0)
        assert asked == [170] * 5 + [20]  # the failed one is asked again, the first is not
        assert sorted(answered["prompt_id"].to_pylist()) == sorted(requests["prompt_id"].to_pylist())

    asyncio.run(scenario())


def test_a_step_is_one_batch_however_large(start):
    async def scenario() -> None:
        side = await start()
        side.config.run.prompts_per_step = 200
        asked = asked_of(side)
        await side.generate(requests_of(200, each=8), 0)
        assert asked == [200]

    asyncio.run(scenario())


def test_every_broken_broadcast_is_a_sync_failure(start):
    async def scenario() -> None:
        side = await start(BROKEN, BROKEN)
        first = side.fleet.actors[0]
        assert await side.sync(3) == {"total_s": 0.1}
        assert side.resident == {"rollout": 900.0}, "it is no time of the sync"
        assert (side.sync_failures, side.replacements) == (2, 2)
        assert side.fleet.created == 4
        assert side.fleet.actors[0] is first
        assert [worker.version for worker in side.fleet.actors] == [3, 3]

    asyncio.run(scenario())


def test_a_worker_that_dies_while_it_generates_is_none(start):
    async def scenario() -> None:
        side = await start()
        await side.sync(3)
        side.fleet.actors[0].dead = True
        assert versions(await side.generate(REQUESTS, min_version=3)) == [3] * 4
        assert (side.sync_failures, side.replacements, side.fleet.created) == (0, 1, 3)

    asyncio.run(scenario())


def test_workers_are_compared_with_the_learner_at_the_start_after_syncs_and_when_new(start):
    """As loaded, after the 1st, 2nd, 4th … sync, and where a worker is a new one."""

    async def scenario() -> None:
        side = await start()
        assert side.learner.checks == [2, 2], "as loaded, and after the first sync"
        for version in range(1, 8):
            await side.sync(version)
        assert len(side.learner.checks) == 5
        side.fleet.actors[1].dead = True
        await side.generate(REQUESTS, min_version=0)
        assert side.learner.checks == [2] * 6

    asyncio.run(scenario())


@pytest.mark.parametrize("logprob", [-1.3415, float("nan")])
def test_a_worker_that_computes_something_else_after_a_sync_ends_the_run(start, logprob):
    async def scenario() -> None:
        side = await start()
        side.fleet.actors[1].logprob = logprob
        said = r"rollout worker 1 is not .* after a weight sync: .*4 tokens differ by (0.341|nan) nats on .*"
        with pytest.raises(SamplerError, match=said + r"explains 0.001; .*policy.model = m"):
            await side.sync(1)

    asyncio.run(scenario())


def test_a_worker_that_dies_while_it_is_compared_is_replaced(start):
    async def scenario() -> None:
        side = await start()
        side.fleet.actors[1].dead = True
        await side.sync(1)
        assert [worker.version for worker in side.fleet.actors] == [1, 1]
        assert (side.replacements, side.fleet.created, side.learner.checks) == (1, 3, [2, 2, 2])

    asyncio.run(scenario())


def test_an_update_between_a_sync_and_the_comparison_puts_the_comparison_off(start):
    async def scenario() -> None:
        side = await start()
        await side.sync(1)
        side.fleet.actors[1].dead = True
        sample = side.fleet.sample

        async def overtaken(*arguments: Any) -> pa.Table:
            side.learner.version = 2
            return await sample(*arguments)

        side.fleet.sample = overtaken
        await side.generate(REQUESTS, min_version=1)
        side.fleet.actors[1].logprob = -2.0
        with pytest.raises(SamplerError):
            await side.sync(2)

    asyncio.run(scenario())


def test_a_second_worker_that_dies_while_the_first_is_replaced_is_replaced_too(start):
    async def scenario() -> None:
        side = await start()
        await side.sync(3)
        side.fleet.actors[0].dead = True
        side.fleet.starts.clear()
        asked = asyncio.create_task(side.generate(REQUESTS, min_version=3))
        await settled()
        side.fleet.actors[1].dead = True
        side.fleet.starts.set()
        assert versions(await asked) == [3] * 4
        assert (side.sync_failures, side.replacements, side.fleet.created) == (0, 2, 4)

    asyncio.run(scenario())


def test_a_worker_that_fails_while_it_is_replaced_is_replaced_again(start):
    """While it generates, in a broadcast, and where it does not answer the learner; the other one is kept."""

    async def scenario() -> None:
        side = await start()
        side.fleet.stillborn = {3}
        first, side.fleet.actors[1].dead = side.fleet.actors[0], True
        assert versions(await side.generate(REQUESTS, min_version=0)) == [0] * 4
        assert (side.replacements, side.fleet.created) == (2, 4)
        assert side.fleet.actors[0] is first

        side = await start(BROKEN)
        side.fleet.stillborn = {3}
        await side.sync(3)
        assert (side.replacements, side.sync_failures, side.fleet.created) == (2, 1, 4)
        assert [worker.version for worker in side.fleet.actors] == [3, 3]

        side = await start()
        side.fleet.stillborn = {3}
        side.fleet.actors[1].dead = True
        await side._connect()
        assert (side.replacements, side.fleet.created) == (2, 4)

    asyncio.run(scenario())


def test_of_two_workers_replaced_together_the_one_that_fails_again_is_replaced_again(start):
    async def scenario() -> None:
        side = await start()
        side.fleet.stillborn = {4}
        for worker in side.fleet.actors:
            worker.dead = True
        assert versions(await side.generate(REQUESTS, min_version=0)) == [0] * 4
        assert (side.replacements, side.fleet.created) == (2, 5)

    asyncio.run(scenario())


def test_workers_that_never_come_up_again_end_the_run_with_their_reason(start):
    async def scenario() -> None:
        side = await start()
        side.fleet.stillborn = {3, 4, 5}
        side.fleet.actors[1].dead = True
        with pytest.raises(RuntimeError, match=r"replaced 2 times.*worker 1 failed in start: out of memory"):
            await side.generate(REQUESTS, min_version=0)

    asyncio.run(scenario())


def test_a_worker_is_replaced_once_however_many_batches_it_held(start):
    async def scenario() -> None:
        side = await start()
        await side.sync(3)
        side.fleet.actors[1].dead = True
        answers = await asyncio.gather(*(side.generate(REQUESTS, min_version=v) for v in (1, 2, 3)))
        assert [versions(answer) for answer in answers] == [[3] * 4] * 3
        assert (side.replacements, side.fleet.created) == (1, 3)

    asyncio.run(scenario())


def test_who_asks_while_a_worker_is_replaced_waits_for_it(start):
    """Neither fails at a worker that is not up, nor reads one that still has the base's weights."""

    async def scenario() -> None:
        side = await start()
        await side.sync(3)
        side.fleet.actors[1].dead = True
        side.fleet.starts.clear()
        first = asyncio.create_task(side.generate(REQUESTS, min_version=2))
        await settled()
        second = asyncio.create_task(side.generate(REQUESTS, min_version=2))
        await settled()
        side.fleet.starts.set()
        assert versions(await first) == versions(await second) == [3] * 4
        assert (side.replacements, side.fleet.created) == (1, 3)

    asyncio.run(scenario())


def test_a_worker_replaced_during_an_update_gets_the_version_of_its_weights(start):
    async def scenario() -> None:
        side = await start()
        await side.sync(3)
        side.fleet.actors[1].dead = True
        async with side.learner.turn:  # the learner is busy with the update of step 3
            asked = asyncio.create_task(side.generate(REQUESTS, min_version=3))
            await settled()
            side.learner.version = 4
        assert versions(await asked) == [4] * 4

    asyncio.run(scenario())


def test_an_evaluation_reads_no_worker_that_missed_a_sync(start, monkeypatch):
    monkeypatch.setattr("services.policy_side.first_prompts", lambda split, prompts: split)
    monkeypatch.setattr("services.policy_side.evaluation_requests", lambda split, *_: split)

    async def scenario() -> None:
        side = await start()
        await side.sync(3)
        side.fleet.actors[1].version = 2
        assert versions(await side.sample(REQUESTS, 4, step=3)) == [3] * 4

    asyncio.run(scenario())


def test_too_many_replacements_end_the_run_with_the_last_reason(start):
    async def scenario() -> None:
        side = await start(BROKEN, BROKEN, BROKEN)
        with pytest.raises(RuntimeError, match=r"replaced 2 times.*wrong checksum of layer 3"):
            await side.sync(3)
        assert side.sync_failures == 3

    asyncio.run(scenario())


def test_no_worker_draws_the_noise_of_one_before_it(monkeypatch):
    """Not after a replacement, nor in a resumed run, nor in a run with the next seed."""
    given: list[int] = []

    async def seeds(seed: int, start: int) -> list[int]:
        up = asyncio.Event()
        up.set()

        def created(index: int, *_: Any, seed: int, **__: Any) -> Worker:
            given.append(seed)
            return Worker(index, up)

        actor = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=created))
        monkeypatch.setattr("services.fleet.ray.remote", lambda _: actor)
        monkeypatch.setattr("services.fleet.ray.kill", lambda worker: None)
        monkeypatch.setattr("services.policy_side.TrainerGroup", lambda *_: SimpleNamespace(start=settled))
        given.clear()
        words = ["--policy.model=m", "--data.demonstrations=d", "--rollout.workers=2", f"--run.seed={seed}"]
        config = load(None, words)
        side = PolicySide(config, resource_plan(config, gpus=0, cores=2), None, None, start)  # type: ignore[arg-type]
        await asyncio.gather(*side._start_policy(lambda line: None))
        await side.fleet.replace([1])
        await side.fleet.replace([1, 0])
        return list(given)

    begun = asyncio.run(seeds(0, 0))
    others = [asyncio.run(seeds(*which)) for which in ((0, 50), (0, 100), (1, 0))]
    assert asyncio.run(seeds(0, 0)) == begun, "the same run begins alike"
    drawn = [seed for run in (begun, *others) for seed in run]
    assert len(set(drawn)) == len(drawn) == 4 * 5
    assert all(0 <= seed < 2**32 for seed in drawn), "what numpy takes, which the engine seeds too"
