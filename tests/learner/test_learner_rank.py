"""The learner's rank as its training group drives it."""

import shutil
from pathlib import Path

import pytest
from transformers import GenerationConfig

from learner.config import LearnerConfig
from learner.rank import LearnerRank
from rollout.config import PolicyConfig, RolloutConfig
from rollout.templates import load_tokenizer


class Sender:
    """Remembers which versions the weights were sent as."""

    def __init__(self) -> None:
        self.sent: list[int] = []

    def send(self, version: int) -> dict[str, float]:
        self.sent.append(version)
        return {}


def learner_rank(model: Path) -> LearnerRank:
    return LearnerRank(
        rank=0,
        ranks=1,
        learner=LearnerConfig(),
        policy=PolicyConfig(model=str(model), dtype="float32"),
        rollout=RolloutConfig(),
        temperature=1.0,
        seed=0,
    )


def test_an_exported_model_stops_at_every_end_that_rollouts_stopped_at(tiny_model, tmp_path):
    base, out = tmp_path / "base", tmp_path / "out"
    shutil.copytree(tiny_model, base)
    end = load_tokenizer(PolicyConfig(model=str(base))).eos_token_id
    GenerationConfig(eos_token_id=[end, 7]).save_pretrained(base)
    learner_rank(base).export(str(out))
    assert sorted(GenerationConfig.from_pretrained(out).eos_token_id) == sorted([end, 7])


def test_weights_go_out_under_their_own_version(tiny_model, uneven_table, monkeypatch: pytest.MonkeyPatch):
    """Also where nobody names it, as after a worker was replaced during an update."""
    monkeypatch.setattr("learner.rank.ray.get", lambda table, timeout: table)
    rank = learner_rank(tiny_model)
    sender = Sender()
    rank.sender = sender  # type: ignore[assignment]
    rank.sync(None)
    rank.sync(6)  # a resumed run's first
    rank.sync(None)
    version, before = rank.response_logprobs(uneven_table)
    assert version == 6
    rank.train_step(uneven_table, step=6, lr_factor=1.0)
    version, after = rank.response_logprobs(uneven_table)
    assert version == 7
    lengths = [len(response) for response in uneven_table["response_ids"].to_pylist()]
    assert [len(row) for row in before] == [len(row) for row in after] == lengths
    assert any((old != new).any() for old, new in zip(before, after, strict=True))
    rank.sync(None)
    rank.sync(7)
    assert sender.sent == [0, 6, 6, 7, 7]
