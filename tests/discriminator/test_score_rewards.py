import numpy as np
import pyarrow as pa
import pytest

from discriminator.config import RewardConfig
from discriminator.rewards import FORMS, reward, stamp, token_rewards

SCORES = np.array([-3.0, -0.5, 0.0, 0.7, 4.0])


@pytest.mark.parametrize(
    ("form", "naive"),
    [
        ("prob", lambda d: d),
        ("logit", lambda d: np.log(d) - np.log(1 - d)),
        ("log_d", np.log),
        ("neg_log_one_minus_d", lambda d: -np.log(1 - d)),
    ],
)
def test_forms_equal_their_formula_in_d(form, naive) -> None:
    d = 1 / (1 + np.exp(-SCORES))
    np.testing.assert_allclose(FORMS[form](SCORES), naive(d), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", list(FORMS))
def test_forms_are_stable_and_clipped_at_the_ends(form) -> None:
    values = reward([-1e4, 1e4], RewardConfig(form=form, clip=5.0))
    expected = {"prob": [0, 1], "logit": [-5, 5], "log_d": [-5, 0], "neg_log_one_minus_d": [0, 5]}
    np.testing.assert_allclose(values, expected[form], atol=1e-12)


def test_a_score_that_is_not_finite_is_an_error() -> None:
    with pytest.raises(ValueError, match="finite"):
        reward([0.0, float("nan")], RewardConfig())


def test_sequence_level_rewards_the_last_token_only() -> None:
    out = token_rewards(
        [5.0, -1.0], [(0, 2), (2, 2)], [1, 2, 2], level="sequence", config=RewardConfig(form="logit")
    )
    np.testing.assert_allclose(out, [0, 0, -1])


def test_token_level_spreads_clipped_prefix_rewards() -> None:
    config = RewardConfig(form="logit", clip=2.0)
    out = token_rewards([5.0, -1.0, 0.5], [(0, 1), (1, 2), (2, 2)], [2, 2], level="token", config=config)
    np.testing.assert_allclose(out, [2.0 - 1.0, 0.5])


def test_stamped_table_carries_version_score_and_rewards() -> None:
    table = pa.table(
        {"trajectory_id": ["a", "b"], "token_ends": pa.array([[1, 2], [1]], pa.list_(pa.int32()))}
    )
    out = table
    for version in (6, 7):
        out = stamp(
            out,
            version,
            [[1.0, 2.0], [3.0]],
            [[(0, 1), (1, 2)], [(0, 1)]],
            level="sequence",
            config=RewardConfig(form="logit"),
        )
    assert out["disc_version"].to_pylist() == [7, 7]
    assert out["score"].to_pylist() == [2.0, 3.0]
    assert out["token_rewards"].to_pylist() == [[0.0, 2.0], [3.0]]
    assert out.schema.field("token_rewards").type == pa.list_(pa.float32())
