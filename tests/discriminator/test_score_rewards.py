import numpy as np
import pyarrow as pa
import pytest

from discriminator.reward_config import RewardConfig
from discriminator.rewards import (
    FORMS,
    demonstration_score,
    length_penalty,
    reward,
    stamp,
    token_rewards,
    whitened,
)

SCORES = np.array([-3.0, -0.5, 0.0, 0.7, 4.0])


@pytest.mark.parametrize(
    ("form", "naive"),
    [
        ("prob", lambda d: d),
        ("logit", lambda d: np.log(d) - np.log(1 - d)),
        ("log_d", np.log),
        ("neg_log_one_minus_d", lambda d: -np.log(1 - d)),
        ("bradley_terry", lambda d: np.log(d / (1 - d))),
    ],
)
def test_forms_equal_their_formula_in_d(form, naive) -> None:
    d = 1 / (1 + np.exp(-SCORES))
    np.testing.assert_allclose(FORMS[form](SCORES), naive(d), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", list(FORMS))
def test_forms_are_stable_and_clipped_at_the_ends(form) -> None:
    reference = 1.0 if form == "relativistic" else None
    values = reward([-1e4, 1e4], RewardConfig(form=form, clip=5.0), reference)
    expected = {"prob": [0, 1], "logit": [-5, 5], "log_d": [-5, 0], "neg_log_one_minus_d": [0, 5]}
    expected |= {"bradley_terry": [-5, 5], "relativistic": [-5, 5]}
    np.testing.assert_allclose(values, expected[form], atol=1e-12)


def test_a_score_that_is_not_finite_is_an_error() -> None:
    with pytest.raises(ValueError, match="finite"):
        reward([0.0, float("nan")], RewardConfig())


def test_sequence_level_rewards_the_last_token_only() -> None:
    out = token_rewards(
        [5.0, -1.0], [(0, 2), (2, 2)], [1, 2, 2], level="sequence", config=RewardConfig(form="logit")
    )
    np.testing.assert_allclose(out, [0, 0, -1])


def test_without_a_clip_a_raw_score_stays_what_it_is() -> None:
    config = RewardConfig(form="bradley_terry", clip=None)
    assert reward([-40.0, 0.0, 1e4], config).tolist() == [-40.0, 0.0, 1e4]


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


def batch(*lengths: int) -> pa.Table:
    ends = [list(range(1, n + 1)) for n in lengths]
    return pa.table({"token_ends": pa.array(ends, pa.list_(pa.int32()))})


def stamped(config: RewardConfig, scores, lengths, *, level="sequence", **given) -> list[list[float]]:
    spans = [[(i, i + 1) for i in range(len(s))] for s in scores]
    return stamp(batch(*lengths), 0, scores, spans, level=level, config=config, **given)[
        "token_rewards"
    ].to_pylist()


def test_relativistic_counts_from_the_demonstrations_score() -> None:
    config = RewardConfig(form="relativistic", clip=3.0)
    references = [demonstration_score(s, "sequence") for s in ([9.0, 0.5], [9.0, -1.0])]
    assert references == [0.5, -1.0]
    out = stamped(config, [[0.0, 2.0], [4.0]], [2, 1], references=references)
    assert out == [[0.0, 1.5], [3.0]]  # 5 is clipped
    mean = demonstration_score([1.0, 3.0], "token")
    out = stamped(config, [[1.0, 4.0]], [2], level="token", references=[mean])
    assert out == [[-1.0, 2.0]]


@pytest.mark.parametrize(
    ("fields", "given", "message"),
    [
        ({"form": "relativistic"}, {}, "needs references"),
        ({"form": "relativistic"}, {"references": [0.0]}, "1 references for 2"),
        ({"form": "relativistic"}, {"references": [0.0, float("nan")]}, "row 1 is nan"),
        ({}, {"references": [0.0, 0.0]}, "takes no references"),
        ({"user_reward": "m:f"}, {}, "needs user_rewards"),
        ({"user_reward": "m:f"}, {"user_rewards": [1.0, float("inf")]}, "row 1 is inf"),
        ({}, {"user_rewards": [1.0, 2.0]}, "takes no user_rewards"),
    ],
)
def test_columns_that_do_not_fit_the_configuration_are_refused(fields, given, message) -> None:
    with pytest.raises(ValueError, match=message):
        stamped(RewardConfig(**fields), [[1.0], [2.0]], [1, 1], **given)


def test_whitening_takes_the_moments_of_the_whole_step() -> None:
    rng = np.random.default_rng(0)
    scores = [rng.normal(3.0, 2.0, size=n).tolist() for n in (3, 1, 5)]
    flat = np.concatenate(scores)
    full = stamped(RewardConfig(form="logit", clip=99, whiten="full"), scores, [3, 1, 5], level="token")
    np.testing.assert_allclose(np.concatenate(full), (flat - flat.mean()) / flat.std(), rtol=1e-5)
    scaled = stamped(RewardConfig(form="logit", clip=99, whiten="scale"), scores, [3, 1, 5], level="token")
    np.testing.assert_allclose(np.concatenate(scaled), flat / flat.std(), rtol=1e-5)
    last = np.array([s[-1] for s in scores])
    sequence = stamped(RewardConfig(form="logit", clip=99, whiten="full"), scores, [3, 1, 5])
    np.testing.assert_allclose([r[-1] for r in sequence], (last - last.mean()) / last.std(), rtol=1e-5)
    np.testing.assert_allclose(whitened(np.full(4, 2.0), RewardConfig(whiten="full")), 0.0)
    np.testing.assert_allclose(whitened(np.full(4, 2.0), RewardConfig(whiten="scale")), 2.0)


def test_length_control_follows_its_formulas() -> None:
    deviation = RewardConfig(length_control="deviation", length_coefficient=2.0, length_target=10)
    assert [length_penalty(n, deviation) for n in (5, 10, 20)] == [-1.0, 0.0, -2.0]
    overlong = RewardConfig(length_control="overlong", length_target=10, length_slack=4)
    assert [length_penalty(n, overlong) for n in (1, 6, 7, 9, 10, 30)] == [0, 0, -0.25, -0.75, -1, -1]
    assert length_penalty(10**6, RewardConfig()) == 0.0


def test_the_users_reward_and_length_control_stay_apart_from_the_discriminators() -> None:
    config = RewardConfig(
        form="logit", clip=1.0, whiten="scale", user_reward="m:f", user_weight=-0.5,
        length_control="overlong", length_target=2, length_slack=1,
    )  # fmt: skip
    scores = [[4.0, 1.0], [-4.0]]  # clipped to 1 and -1, spread 1
    table = stamp(
        batch(2, 1),
        3,
        scores,
        [[(0, 1), (1, 2)], [(0, 1)]],
        level="sequence",
        config=config,
        user_rewards=[10.0, 2.0],
    )
    assert table["token_rewards"].to_pylist() == [[0.0, 1.0], [-1.0]]
    assert table["user_reward"].to_pylist() == [10.0, 2.0]
    assert table["response_reward"].to_pylist() == [-5.0 - 1.0, -1.0]
    plain = stamp(batch(1), 3, scores[:1], [[(0, 1)]], level="sequence", config=RewardConfig())
    assert "response_reward" not in plain.column_names
