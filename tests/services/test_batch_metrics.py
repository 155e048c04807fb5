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
            "score": [0.1, 0.2, 0.6],
        }
    )
    alone = reward_metrics(scored)
    assert [alone["mean"], alone["min"], alone["max"]] == pytest.approx([1.5, 0.5, 3.0])
    assert alone["score_mean"] == pytest.approx(0.3)
    mixed = reward_metrics(scored.append_column("response_reward", pa.array([-4.0, 0.0, 2.0], pa.float32())))
    assert [mixed["mean"], mixed["min"], mixed["max"]] == pytest.approx([2.5 / 3, -1.0, 3.0])
    assert mixed["length_correlation"] == pytest.approx(np.corrcoef([-1.0, 0.5, 3.0], [2, 1, 3])[0, 1])
