"""Runs kept by the real wandb, offline, and read back from the files that `wandb sync` would send."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from services.config import Config, ConfigError, load
from services.wandb_run import IDENTITY, WandbRun
from services.watching.alarms import Alarm

wandb = pytest.importorskip("wandb")
FILE_HEADER, BLOCK, RECORD_HEADER = 7, 32 * 1024, struct.Struct("<IHB")


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Config]:
    monkeypatch.setenv("WANDB_MODE", "offline")
    words = ["--policy.model=m", "--data.demonstrations=d", "--run.name=tiny", "--run.wandb=team/project"]
    yield load(None, [*words, f"--run.output={tmp_path}", "--learner.lr=0.125"])
    wandb.teardown()  # or the next test finds this one's environment


def records(config: Config) -> list[list[Any]]:
    """What each W&B run file of the run's folder holds, oldest file first, once wandb's process has ended."""
    wandb.teardown()
    files = sorted(config.folder.glob("wandb/offline-run-*/*.wandb"))
    return [list(parsed(file.read_bytes())) for file in files]


def parsed(data: bytes) -> Iterator[Any]:
    """Records of a file in LevelDB's log format: blocks of 32 KiB, records in one part or several."""
    from wandb.proto.wandb_internal_pb2 import Record

    at, parts = FILE_HEADER, b""
    while at + RECORD_HEADER.size <= len(data):
        if BLOCK - at % BLOCK < RECORD_HEADER.size:  # padding
            at += BLOCK - at % BLOCK
            continue
        _, size, kind = RECORD_HEADER.unpack_from(data, at)
        at += RECORD_HEADER.size
        parts += data[at : at + size]
        at += size
        if kind in (1, 4):  # whole, or its last part
            record = Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def history(found: list[Any]) -> list[dict[str, Any]]:
    rows = [record.history.item for record in found if record.WhichOneof("record_type") == "history"]
    return [
        {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in row} for row in rows
    ]


def test_numbers_alarms_and_the_closing_table_are_kept(config: Config) -> None:
    tracker = WandbRun(config)
    tracker.step({"step": 0, "evaluation/c2st": 0.9, "evaluation/c2st_classifier": "ngram"})
    tracker.step({"step": 1, "reward/mean": 0.25, "policy/kl": float("nan"), "lag/policy": {"0": 4}})
    tracker.alarms([Alarm(1, "mode_collapse", "few modes are left")])
    tracker.closing({"base": {"c2st": 0.9}, "best": {"c2st": 0.6}})
    tracker.finish(0)
    (found,) = records(config)
    (begun,) = [record.run for record in found if record.WhichOneof("record_type") == "run"][:1]
    assert (begun.entity, begun.project, begun.display_name) == ("team", "project", "tiny")
    settings = {item.key: json.loads(item.value_json) for item in begun.config.update}
    assert settings["learner"]["lr"] == 0.125
    own = [{k: v for k, v in row.items() if not k.startswith("_")} for row in history(found)]
    assert own == [{"step": 0, "evaluation/c2st": 0.9}, {"step": 1, "reward/mean": 0.25}]
    (alert,) = [record.alert for record in found if record.WhichOneof("record_type") == "alert"]
    assert (alert.title, alert.text) == ("mode_collapse", "step 1: few modes are left")
    summary = {
        "/".join(item.nested_key) or item.key: json.loads(item.value_json)
        for record in found
        if record.WhichOneof("record_type") == "summary"
        for item in record.summary.update
    }
    assert (summary["base/c2st"], summary["best/c2st"]) == (0.9, 0.6)


def test_a_resumed_run_goes_on_in_the_same_one(config: Config) -> None:
    for _ in range(2):
        tracker = WandbRun(config)
        tracker.step({"step": 1})
        tracker.finish(0)
    first, second = (
        {record.run.run_id for record in found if record.WhichOneof("record_type") == "run"}
        for found in records(config)
    )
    assert first == second == {json.loads((config.folder / IDENTITY).read_text())["id"]}


def test_no_account_is_said_before_training(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("HOME", str(config.folder))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(ConfigError, match=r'run\.wandb = "team/project": '):
        WandbRun(config)
