"""What an evaluation keeps of the best policy, wherever the run is killed over it."""

import asyncio
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rollout.data import DEMONSTRATION_SCHEMA, DataSplits
from services.answers import HumanNLL
from services.config import load
from services.evaluator import Evaluator


class Killed(BaseException):
    """The process is gone."""


class Policy:
    """The system around a policy whose weights are one number, which its files, answers and likelihood say.
    It is killed when it has been asked or has changed the disk `left` times more.
    """

    def __init__(self) -> None:
        rows = [
            {"prompt_id": f"{i}", "prompt": "say", "prompt_text": "say", "response": "a"} for i in range(4)
        ]
        table = pa.Table.from_pylist(rows, schema=DEMONSTRATION_SCHEMA)
        self.splits = DataSplits(
            train=table, heldout=table, selection=table, test=table, extra_prompts=table[:0]
        )
        self.renderer = SimpleNamespace(shown=str)
        self.weights = 0
        self.left = 10**9

    def act(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise Killed

    async def export(self, folder: Path) -> None:
        self.act()
        folder.mkdir(parents=True)
        (folder / "config.json").touch()
        (folder / "weights").write_text(f"{self.weights}")

    async def sample(self, split: pa.Table, prompts: int, step: int) -> pa.Table:
        self.act()
        return pa.table(
            {"prompt_id": split["prompt_id"], "response_text": [f"{self.weights}"] * split.num_rows}
        )

    async def human_nll(self, split: pa.Table, prompts: int) -> HumanNLL:
        self.act()
        return HumanNLL(per_token=float(self.weights), tail=float(self.weights))


def mortal_disk(policy: Policy, patch: pytest.MonkeyPatch) -> None:
    """What changes the disk can be the last thing a process does, also when it has only begun."""
    rename, write_text, rmtree, write_table = Path.rename, Path.write_text, shutil.rmtree, pq.write_table

    def renaming(path: Path, target: Path) -> Path:
        policy.act()
        return rename(path, target)

    def writing(path: Path, text: str) -> int:
        policy.act()
        path.open("w").close()
        policy.act()
        return write_text(path, text)

    def removing(folder: Path, ignore_errors: bool = False) -> None:
        policy.act()
        for path in sorted(folder.rglob("*"))[:1]:
            if path.is_file():
                path.unlink()
                policy.act()
        rmtree(folder, ignore_errors=ignore_errors)

    def writing_table(table: pa.Table, path: Path) -> None:
        policy.act()
        write_table(table, path)

    patch.setattr(Path, "rename", renaming)
    patch.setattr(Path, "write_text", writing)
    patch.setattr(shutil, "rmtree", removing)
    patch.setattr(pq, "write_table", writing_table)


@pytest.fixture
def evaluations_are_cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """The likelihood is the whole measure."""
    monkeypatch.setattr("services.evaluator.evaluation_monitors", lambda *_, **__: {})
    monkeypatch.setattr("services.evaluator.evaluate_texts", lambda *args: {"nll": args[4]})
    monkeypatch.setattr("services.evaluator.selection_key", lambda row: row["nll"])
    monkeypatch.setattr("services.evaluator.write_samples", lambda *_: None)


def evaluator(folder: Path, policy: Any) -> Evaluator:
    words = ["--policy.model=m", "--data.demonstrations=d", "--evaluation.embedding_model=none"]
    return Evaluator(load(None, [*words, f"--run.output={folder}"]), policy, lambda line: None)


def kept(folder: Path, found: Evaluator) -> list[float]:
    """The policy that each part of what is kept belongs to."""
    answers = set(pq.read_table(folder / "run" / "samples" / "test-best.parquet")["model"].to_pylist())
    weights = [(folder / "run" / "best" / "weights").read_text(), *answers]
    return [*map(float, weights), found.best_step / 10, found.best_key, found.test_nll["best"]]


def test_what_is_kept_of_the_best_is_of_one_policy_wherever_it_is_killed(tmp_path, evaluations_are_cheap):
    """Policies 1, 2 and 3 are evaluated at steps 10, 20 and 30; the run is killed at the second, resumed from
    the state before it, and goes on."""
    outcomes: list[float] = []
    for moment in range(100):
        folder, policy = tmp_path / str(moment), Policy()
        first = evaluator(folder, policy)
        asyncio.run(first.selection(0))
        policy.weights = 1
        asyncio.run(first.selection(10))
        assert kept(folder, first) == [1] * 5
        state = json.loads(json.dumps(first.state()))
        policy.weights = 2
        policy.left = moment
        with pytest.MonkeyPatch.context() as patch:
            mortal_disk(policy, patch)
            try:
                asyncio.run(first.selection(20))
            except Killed:
                pass
            else:
                break
        policy.left = 10**9
        resumed = evaluator(folder, policy)
        resumed.load_state(state)
        found = kept(folder, resumed)
        assert found == [found[0]] * 5, f"killed at moment {moment}"
        outcomes.append(found[0])
        policy.weights = 3
        asyncio.run(resumed.selection(30))
        assert kept(folder, resumed) == [3] * 5
        assert {path.name for path in (folder / "run").iterdir()} == {"best", "samples"}
    assert kept(folder, first) == [2] * 5
    assert outcomes == sorted(outcomes)
    assert set(outcomes) == {1, 2}


def test_without_a_record_the_next_policy_is_the_best(tmp_path, evaluations_are_cheap):
    """As in a folder from a copy that was cut off while a new best was sent."""
    policy = Policy()
    first = evaluator(tmp_path, policy)
    asyncio.run(first.selection(0))
    policy.weights = 2
    asyncio.run(first.selection(10))
    (tmp_path / "run" / "samples" / "best.json").unlink()
    resumed = evaluator(tmp_path, policy)
    resumed.load_state(json.loads(json.dumps(first.state())))
    policy.weights = 1
    asyncio.run(resumed.selection(20))
    assert kept(tmp_path, resumed) == [1, 1, 2, 1, 1]
