from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from discriminator.buffer import ReplayBuffer
from discriminator.config import BufferConfig
from rollout.trajectory import trajectories


def rollouts(step: int, prompts: int = 4, samples: int = 3, width: int = 10) -> pa.Table:
    rows = [(p, s) for p in range(prompts) for s in range(samples)]
    return pa.table(
        {
            "trajectory_id": [f"{step:06d}-{p:05d}/{s}" for p, s in rows],
            "prompt_id": [f"p{p}" for p, _ in rows],
            "step": pa.array([step] * len(rows), pa.int32()),
            "policy_version": pa.array([step] * len(rows), pa.int32()),
            "response_text": ["x" * width] * len(rows),
        }
    )


def filled(steps: int, **settings) -> ReplayBuffer:
    buffer = ReplayBuffer(BufferConfig(**settings))
    for step in range(steps):
        buffer.add(rollouts(step), step)
    return buffer


def test_a_repeated_delivery_changes_nothing() -> None:
    buffer = ReplayBuffer(BufferConfig())
    assert buffer.add(rollouts(0), 0)
    assert not buffer.add(rollouts(0), 0)
    assert (buffer.stats()["rows"], buffer.stats()["added"], buffer.stats()["repeated"]) == (12, 12, 1)


def test_age_bound() -> None:
    buffer = filled(6, max_age=2)
    assert buffer.stats()["steps"] == 3
    assert buffer.stats()["evicted_age"] == 3 * 12
    assert buffer.stats()["oldest_age"] == 2


def test_byte_bound_drops_the_oldest_and_holds_for_one_large_step() -> None:
    size = rollouts(0).nbytes
    buffer = filled(6, max_bytes=int(2.5 * size))
    assert buffer.stats()["steps"] == 2
    assert buffer.stats()["bytes"] <= 2.5 * size
    assert buffer.stats()["evicted_bytes"] == 4 * 12
    large = ReplayBuffer(BufferConfig(max_bytes=size))
    large.add(rollouts(0, prompts=40), 0)
    assert 0 < large.stats()["bytes"] <= size
    assert large.stats()["rows"] + large.stats()["evicted_bytes"] == 120


def test_sample_is_deterministic_and_free_of_arrival_order() -> None:
    first, second = ReplayBuffer(BufferConfig()), ReplayBuffer(BufferConfig())
    for step in (0, 1, 2):
        first.add(rollouts(step), step)
        second.add(rollouts(step).take(np.arange(12)[::-1].copy()), step)
    draw = {"step": 2, "seed": 5, "replay_fraction": 0.25}
    one, two = first.sample(8, **draw), second.sample(8, **draw)
    assert one.equals(two)
    assert first.sample(8, **draw).equals(one)
    assert not first.sample(8, step=2, seed=6, replay_fraction=0.25).equals(one)


def test_fraction_of_replay_and_no_row_twice() -> None:
    table = filled(4).sample(8, step=3, seed=0, replay_fraction=0.25)
    assert Counter(s == 3 for s in table["step"].to_pylist()) == {True: 6, False: 2}
    assert len(set(table["trajectory_id"].to_pylist())) == 8
    fresh_only = filled(4).sample(8, step=3, seed=0)
    assert set(fresh_only["step"].to_pylist()) == {3}


def test_replay_never_fills_in_for_fresh_rows() -> None:
    """Of twelve rows a step; a turn that wants more makes do with them, and with its share of replay."""
    assert Counter(filled(4).sample(100, step=3, seed=0)["step"].to_pylist()) == {3: 12}
    table = filled(4).sample(100, step=3, seed=0, replay_fraction=0.25)
    assert Counter(s == 3 for s in table["step"].to_pylist()) == {True: 12, False: 4}
    assert filled(1).sample(8, step=0, seed=0, replay_fraction=0.25).num_rows == 8


def test_later_steps_are_not_drawn() -> None:
    drawn = filled(4).sample(50, step=1, seed=0, replay_fraction=0.25)
    assert set(drawn["step"].to_pylist()) == {0, 1}
    with pytest.raises(LookupError, match="step -1"):
        filled(4).sample(50, step=-1, seed=0)


def test_stratified_by_prompt() -> None:
    others = rollouts(0).filter(pc.field("prompt_id") != "p0")
    many = pa.concat_tables([rollouts(0, prompts=1, samples=30), others])
    buffer = ReplayBuffer(BufferConfig())
    buffer.add(many, 0)
    counts = Counter(buffer.sample(10, step=0, seed=1)["prompt_id"].to_pylist())
    assert sorted(counts.values()) == [2, 2, 3, 3]


def test_recency_prefers_young_rows_by_its_half_life() -> None:
    buffer = ReplayBuffer(BufferConfig(max_age=10))
    for step in range(3):
        buffer.add(rollouts(step, prompts=1, samples=40), step)
    # One replayed row of two ages with equal counts, a version apart: the younger one wins 2 times of 3.
    young = sum(
        buffer.sample(44, step=2, seed=s, replay_fraction=0.025, recency=1.0)["step"].to_pylist().count(1)
        for s in range(300)
    )
    old = sum(
        buffer.sample(44, step=2, seed=s, replay_fraction=0.025, recency=1.0)["step"].to_pylist().count(0)
        for s in range(300)
    )
    assert 0.58 < young / (young + old) < 0.75


def test_dump_and_load_give_the_same_buffer(tmp_path: Path) -> None:
    buffer = filled(5, max_age=2)
    buffer.sample(4, step=4, seed=0)
    buffer.dump(tmp_path / "buffer.parquet")
    other = ReplayBuffer(BufferConfig(max_age=2))
    other.load(tmp_path / "buffer.parquet")
    assert other.stats() == buffer.stats()
    assert not other.add(rollouts(0), 0), "steps that were evicted stay known"
    draw = {"step": 4, "seed": 3, "replay_fraction": 0.25}
    assert other.sample(12, **draw).equals(buffer.sample(12, **draw))


def test_dump_of_an_empty_buffer(tmp_path: Path) -> None:
    ReplayBuffer(BufferConfig()).dump(tmp_path / "empty.parquet")
    other = filled(2)
    other.load(tmp_path / "empty.parquet")
    assert other.stats()["rows"] == 0
    assert other.add(rollouts(1), 1)


def test_missing_column_and_foreign_file_are_named(tmp_path: Path) -> None:
    buffer = ReplayBuffer(BufferConfig())
    with pytest.raises(ValueError, match="prompt_id"):
        buffer.add(rollouts(0).drop_columns(["prompt_id"]), 0)
    pa.parquet.write_table(rollouts(0), tmp_path / "other.parquet")
    with pytest.raises(ValueError, match=r"other\.parquet"):
        buffer.load(tmp_path / "other.parquet")


def test_real_trajectories_survive_dump_and_go_on(tmp_path: Path) -> None:
    def trajectory(step: int) -> pa.Table:
        row = {
            "trajectory_id": f"{step:06d}-00000/0",
            "group_id": f"{step:06d}-00000",
            "prompt_id": "p",
            "step": step,
            "sample": 0,
            "prompt_text": "a",
            "prompt_ids": [1, 2],
            "response_ids": [3],
            "response_logprobs": [-0.5],
            "response_text": "b",
            "token_ends": [1],
            "finish_reason": "stop",
            "policy_version": step,
            "policy_version_end": step,
            "worker": 0,
        }
        return trajectories([row])

    buffer = ReplayBuffer(BufferConfig())
    buffer.add(trajectory(0), 0)
    buffer.dump(tmp_path / "buffer.parquet")
    other = ReplayBuffer(BufferConfig())
    other.load(tmp_path / "buffer.parquet")
    for each in (buffer, other):
        each.add(trajectory(1), 1)
    draw = {"step": 1, "seed": 0, "replay_fraction": 0.25}
    assert other.sample(4, **draw).equals(buffer.sample(4, **draw))
    assert other.stats() == buffer.stats()
