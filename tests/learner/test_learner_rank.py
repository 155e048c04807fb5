"""The learner's rank as its training group drives it."""

import pytest

from learner.config import LearnerConfig
from learner.rank import LearnerRank
from rollout.config import PolicyConfig, RolloutConfig


class Sender:
    """Remembers which versions the weights were sent as."""

    def __init__(self) -> None:
        self.sent: list[int] = []

    def send(self, version: int) -> dict[str, float]:
        self.sent.append(version)
        return {}


def test_weights_go_out_under_their_own_version(tiny_model, uneven_table, monkeypatch: pytest.MonkeyPatch):
    """Also where nobody names it, as after a worker was replaced during an update."""
    monkeypatch.setattr("learner.rank.ray.get", lambda table: table)
    rank = LearnerRank(
        rank=0,
        ranks=1,
        learner=LearnerConfig(),
        policy=PolicyConfig(model=str(tiny_model), dtype="float32"),
        rollout=RolloutConfig(),
        temperature=1.0,
        seed=0,
    )
    sender = Sender()
    rank.sender = sender  # type: ignore[assignment]
    rank.sync(None)
    rank.sync(6)  # a resumed run's first
    rank.sync(None)
    rank.train_step(uneven_table, step=6, lr_factor=1.0)
    rank.sync(None)
    rank.sync(7)
    assert sender.sent == [0, 6, 6, 7, 7]
