"""What a step's metrics say about its rewards."""

import numpy as np
import pyarrow as pa
import pytest

from services.batch_metrics import reward_metrics


def test_a_responses_reward_is_the_discriminators_and_what_it_earns_as_a_whole() -> None:
    scored = pa.table(
        {
            "token_rewards": pa.array([[1.0, 2.0], [0.5], [0.0, 0.0, 1.0]], pa.list_(pa.float32())),
            "response_ids": pa.array([[5, 6], [5], [5, 6, 7]], pa.list_(pa.int32())),
            "last_reward": pa.array([2.0, 0.5, 1.0], pa.float32()),
            "score": [0.1, 0.2, 0.6],
        }
    )
    alone = reward_metrics(scored, 1.0)
    assert [alone["mean"], alone["min"], alone["max"]] == pytest.approx([1.5, 0.5, 3.0])
    assert alone["score_mean"] == pytest.approx(0.3)
    whole = scored.append_column("response_reward", pa.array([-4.0, 0.0, 2.0], pa.float32()))
    mixed = reward_metrics(whole, 0.0)
    assert [mixed["mean"], mixed["min"], mixed["max"]] == pytest.approx([2.5 / 3, -1.0, 3.0])
    paid = np.array([1.5 - 4.0, 0.5, 1 / 3 + 2.0])  # mean of the tokens' own rewards, and the whole's
    assert mixed["length_correlation"] == pytest.approx(np.corrcoef(paid, [2, 1, 3])[0, 1])
    assert mixed["std"] == pytest.approx(paid.std())


def test_length_that_the_discriminator_does_not_care_for_is_no_pull() -> None:
    """Rewards of one sign drawn alike at any length: their sum is length, what is paid is not."""
    rng = np.random.default_rng(0)
    rewards = [rng.uniform(0.2, 0.8, rng.integers(5, 25)).tolist() for _ in range(400)]
    scored = pa.table(
        {
            "token_rewards": pa.array(rewards, pa.list_(pa.float32())),
            "last_reward": pa.array([row[-1] for row in rewards], pa.float32()),
            "response_ids": pa.array([[5] * len(row) for row in rewards], pa.list_(pa.int32())),
            "score": [0.0] * len(rewards),
        }
    )
    assert abs(reward_metrics(scored, 0.25, absorbing_end=True)["length_spearman"]) < 0.15
    assert reward_metrics(scored, 1.0)["length_spearman"] > 0.95
