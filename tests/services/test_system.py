"""What reaches the discriminator of a run: the words of the real `System`, with its processes in memory."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest

from discriminator.buffer import ReplayBuffer
from rollout.data import DataSplits, load_data
from rollout.templates import Renderer, load_tokenizer
from rollout.trajectory import trajectories, trajectory_id
from services.config import load
from services.system import System

GROUP = 2


class Actor:
    """An object in memory, called as an actor's handle is."""

    def __init__(self, held: Any) -> None:
        self.held = held

    def __getattr__(self, name: str) -> Any:
        async def call(*given: Any, **named: Any) -> Any:
            return getattr(self.held, name)(*given, **named)

        return SimpleNamespace(remote=call)


class Discriminator:
    """Remembers the tables it is given."""

    given: dict[str, pa.Table]

    async def call(
        self, what: str, *, timeout_s: float, step: int = 0, **tables: Any
    ) -> list[dict[str, Any]]:
        self.given = tables
        return [{"steps": 1.0, "accuracy": 0.8}]


async def answered(requests: pa.Table, min_version: int) -> pa.Table:
    """`GROUP` answers to each request."""
    shared = ("group_id", "prompt_id", "step", "prompt_text", "prompt_ids")
    return trajectories(
        [
            {
                **{name: request[name] for name in shared},
                "trajectory_id": trajectory_id(request["group_id"], sample),
                "sample": sample,
                "response_ids": [5],
                "response_logprobs": [-1.0],
                "response_text": "x",
                "token_ends": [1],
                "finish_reason": "stop",
                "policy_version": min_version,
                "policy_version_end": min_version,
                "worker": 0,
            }
            for request in requests.to_pylist()
            for sample in range(GROUP)
        ]
    )


class OneReplica:
    """Scores one request at a time, each for `SECONDS`; what is sent meanwhile waits for its turn."""

    SECONDS = 0.05

    def __init__(self) -> None:
        self.turn = asyncio.Lock()

    async def measured_score(self, version: int, groups: list[Any]) -> tuple[list[Any], float]:
        async with self.turn:
            await asyncio.sleep(self.SECONDS)
        return [[{"scores": [float(version)], "spans": []} for _ in texts] for _, texts in groups], 1.0


@pytest.fixture
def system(
    tiny_model: Path, tiny_demonstrations: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> System:
    """Some 110 prompts have a training demonstration, and 200 further ones have none."""
    monkeypatch.setattr("services.system.ray.put", lambda table: table)
    further = tmp_path / "further.jsonl"
    further.write_text("".join(f'{{"prompt": "further {i}"}}\n' for i in range(200)))
    words = {
        "policy.model": tiny_model,
        "data.demonstrations": tiny_demonstrations,
        "data.prompts": further,
        "run.prompts_per_step": 12,
        "sampling.group_size": GROUP,
        "discriminator.heldout_size": 16,
    }
    config = load(None, [f"--{name}={value}" for name, value in words.items()])
    renderer = Renderer(load_tokenizer(config.policy), config.data, config.policy)
    made: Any = System(config, None, load_data(config.data, renderer), renderer)  # type: ignore[arg-type]
    made.fleet = SimpleNamespace(generate=answered)
    made.discriminator = Discriminator()
    made.buffer = Actor(ReplayBuffer(config.discriminator.buffer))
    made.train_demonstrations = made.demonstrations.train
    return made


def without_demonstration(table: pa.Table, splits: DataSplits) -> set[str]:
    return set(table["prompt_id"].to_pylist()) - set(splits.train["prompt_id"].to_pylist())


def test_a_discriminator_sees_no_answer_to_a_prompt_without_demonstration(system: Any) -> None:
    """Or it would tell the sides by their prompts; such answers train the policy alone."""

    async def steps() -> None:
        await system.warm_up(lambda line: None)
        given = system.discriminator.given
        tables = [given["rollouts"], given["heldout_rollouts"]]
        assert not any(without_demonstration(table, system.splits) for table in tables)
        assert tables[0].num_rows > tables[1].num_rows > 0
        for step in range(5):
            batch = await system.generate(system.prompts.next(12, step), step)
            assert without_demonstration(batch, system.splits)
            await system.discriminate(batch, step)
            given = system.discriminator.given
            for name in ("rollouts", "fresh"):
                assert given[name].num_rows >= GROUP
                assert not without_demonstration(given[name], system.splits)
                assert set(given[name]["step"].to_pylist()) == {step}

    asyncio.run(steps())


def test_base_samples_for_the_audit_answer_prompts_with_demonstrations(system: Any) -> None:
    samples = asyncio.run(system.base_samples(64))
    assert not without_demonstration(samples, system.splits)


def test_a_batch_of_many_requests_does_not_time_out_by_itself(system: Any) -> None:
    """The deadline is each request's own, however many are scored before it."""
    settings = system.config.discriminator.scoring
    settings = settings.model_copy(update={"max_batch_groups": 1, "timeout_s": 8 * OneReplica.SECONDS})
    judge = system.config.discriminator.model_copy(update={"scoring": settings})
    system.config = system.config.model_copy(update={"discriminator": judge})
    requests = [{"group_id": f"g{i}", "prompt_id": f"p{i}", "step": 0} for i in range(24)]
    table = pa.Table.from_pylist([request | {"prompt_text": "p", "prompt_ids": [1]} for request in requests])

    async def scores() -> list[dict[str, Any]]:
        system.scorer = SimpleNamespace(measured_score=SimpleNamespace(remote=OneReplica().measured_score))
        batch = await answered(table, 0)
        both = await asyncio.gather(system.score(batch, 7), system.score(batch, 7))
        return both[0] + both[1]

    assert [item["scores"] for item in asyncio.run(scores())] == [[7.0]] * 24 * GROUP * 2


def test_two_runs_of_one_name_have_services_of_their_own(system: Any) -> None:
    again = System(system.config, system.plan, system.splits, system.renderer)
    assert again.app != system.app
    assert system.config.run.name in system.app
