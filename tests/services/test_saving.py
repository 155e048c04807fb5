"""A checkpoint that cannot be written is cleaned up and tried again, and the run goes on."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from run_folders import full_disk

from learner.written import written
from services.checkpoint import CheckpointError, Checkpoints
from services.saving import Saver, all_written


async def write(folder: Path) -> dict[str, Any]:
    (folder / "learner").mkdir()
    problem = written(lambda: (folder / "learner" / "weights").write_bytes(bytes(100_000)) and None)
    await all_written(asyncio.sleep(0, [problem, ""]), asyncio.sleep(0))
    return {"of": "this"}


def test_a_run_outlives_a_disk_that_was_full_for_a_while(tmp_path):
    said: list[str] = []
    checkpoints = Checkpoints(tmp_path, keep=2)
    saver = Saver(checkpoints, 5, said.append)
    tries = []
    for step in range(1, 16):
        if saver.due(step):
            tries.append(step)
            if 5 <= step <= 8:
                with full_disk():
                    assert not asyncio.run(saver.save(step, write))
                assert list(tmp_path.iterdir()) == [], "what was written has its space back"
            else:
                assert asyncio.run(saver.save(step, write))
    assert tries == [5, 6, 8, 10, 15], "after one step, after two, and when one is due"
    assert checkpoints.steps() == [10, 15]
    assert len(said) == 3
    assert all("could not be written: [Errno 27] File too large" in line for line in said)
    assert said[0].endswith("training goes on, and the next try is after step 6")


def test_what_is_there_stays_when_the_next_one_fails(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    saver = Saver(checkpoints, 1, print)
    assert asyncio.run(saver.save(1, write))
    with full_disk():
        assert not asyncio.run(saver.save(2, write))
        with pytest.raises(CheckpointError, match=r"of step 3 could not be written: .*last one is of step 1"):
            asyncio.run(saver.save(3, write, must=True))
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
    found = checkpoints.newest_whole()
    assert found is not None
    assert found.skipped == []


def test_no_checkpoint_is_begun_without_room_for_one_like_the_last(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, keep=1)
    assert asyncio.run(Saver(checkpoints, 1, print).save(1, write))
    said: list[str] = []
    monkeypatch.setattr("shutil.disk_usage", lambda place: type("Usage", (), {"free": 99_999}))
    assert not asyncio.run(Saver(checkpoints, 1, said.append).save(2, write))
    assert "0 MiB free, and a checkpoint takes 0" in said[0]
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]


def test_other_failures_are_the_runs_end(tmp_path):
    async def fails(folder: Path) -> dict[str, Any]:
        raise FloatingPointError("weights are not finite")

    with pytest.raises(FloatingPointError):
        asyncio.run(Saver(Checkpoints(tmp_path, keep=1), 1, print).save(1, fails))


def test_all_parts_have_ended_before_one_is_told_of():
    ended = []

    async def slow() -> list[str]:
        await asyncio.sleep(0.05)
        ended.append(True)
        return ["no room", "no room"]

    async def fails() -> None:
        raise OSError("no storage")

    async def both() -> None:
        await all_written(slow(), fails())

    with pytest.raises(CheckpointError, match=r"^no room; no storage$"):
        asyncio.run(both())
    assert ended == [True]
