"""Advantage estimators against slow loops over trajectories and groups."""

import statistics
from itertools import pairwise

import pytest
import torch

from learner.advantages import (
    discounted_returns,
    estimate_advantages,
    going_on,
    group_standardised,
    importance_weights,
    leave_one_out,
    undiscounted,
)

LENGTHS = [3, 0, 4, 1, 5, 2, 6]
OFFSETS = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()])
GROUPS = torch.tensor([0, 0, 1, 1, 1, 2, 0])
N = sum(LENGTHS)


def parts(flat):
    return [flat[lo:hi].tolist() for lo, hi in pairwise(OFFSETS.tolist())]


def members(trajectory):
    """Trajectories with tokens of the same group."""
    return [j for j in range(len(LENGTHS)) if LENGTHS[j] and GROUPS[j] == GROUPS[trajectory]]


@pytest.fixture
def returns():
    torch.manual_seed(5)
    return torch.randn(N)


def last_of(rewards: torch.Tensor) -> torch.Tensor:
    """Each trajectory's last reward, 0 where it has none."""
    return torch.tensor([float(row[-1]) if len(row) else 0.0 for row in parts(rewards)])


def test_a_last_reward_goes_on_as_in_a_long_sum(returns):
    expected = [
        sum(0.6**k * row[min(t + k, len(row) - 1)] for k in range(200))
        for row in parts(returns)
        for t in range(len(row))
    ]
    found = discounted_returns(going_on(returns, OFFSETS, 0.6, last_of(returns)), OFFSETS, 0.6)
    torch.testing.assert_close(found, torch.tensor(expected))


def test_what_goes_on_is_the_last_judged_reward_whatever_tokens_complete_it():
    """Two prefixes of .5 completed by one sampled token, the third by none: as if each had its own."""
    rewards, last = torch.tensor([0.5, 1.0, 0.0]), torch.tensor([0.5])
    offsets = torch.tensor([0, 3])
    found = discounted_returns(going_on(rewards, offsets, 0.25, last), offsets, 0.25)
    forever = 0.5 * 0.25 / 0.75
    torch.testing.assert_close(found, torch.tensor([0.5 + 0.25 + forever / 16, 1 + forever / 4, forever]))


def test_equal_rewards_that_go_on_pay_for_no_length():
    equal = torch.full((N,), 0.7)
    paid, _ = estimate_advantages("return", equal, OFFSETS, GROUPS, gamma=0.25)
    assert paid.abs().max() > 0.1, "the end would be discouraged"
    even, _ = estimate_advantages(
        "return", going_on(equal, OFFSETS, 0.25, last_of(equal)), OFFSETS, GROUPS, gamma=0.25
    )
    torch.testing.assert_close(even, torch.zeros(N))
    with pytest.raises(ValueError, match="gamma < 1"):
        going_on(equal, OFFSETS, 1.0, last_of(equal))


@pytest.mark.parametrize("gamma", [0.0, 0.25, 0.9, 1.0])
def test_what_a_response_earns_as_a_whole_reaches_every_token_undiscounted(gamma):
    whole = torch.arange(1.0, 1 + len(LENGTHS))
    rewards = undiscounted(whole, OFFSETS, gamma)
    found = discounted_returns(rewards, OFFSETS, gamma)
    torch.testing.assert_close(found, torch.repeat_interleave(whole, torch.tensor(LENGTHS)))
    if gamma == 1.0:
        assert [sum(x != 0 for x in row) for row in parts(rewards)] == [min(n, 1) for n in LENGTHS]


def test_leave_one_out_by_a_slow_loop(returns):
    rows = parts(returns)
    expected = []
    for i, row in enumerate(rows):
        others = [statistics.fmean(rows[j]) for j in members(i) if j != i]
        expected += [g - statistics.fmean(others) if others else 0.0 for g in row]
    torch.testing.assert_close(leave_one_out(returns, OFFSETS, GROUPS), torch.tensor(expected))


def test_group_standardised_by_a_slow_loop(returns):
    rows = parts(returns)
    expected = []
    for i, row in enumerate(rows):
        group = [rows[j] for j in members(i)]
        mean = statistics.fmean(map(statistics.fmean, group))
        squares = sum(statistics.fmean((g - mean) ** 2 for g in other) for other in group)
        expected += [(g - mean) / (squares / (len(group) - 1)) ** 0.5 if len(group) > 1 else 0.0 for g in row]
    torch.testing.assert_close(
        group_standardised(returns, OFFSETS, GROUPS), torch.tensor(expected), rtol=1e-4, atol=1e-5
    )


def test_rewards_at_the_end_give_the_published_formulas():
    """One group of four rewards: RLOO is n / (n - 1) of the centred reward, GRPO its standard score."""
    reward = torch.tensor([1.0, 2.0, 4.0, 9.0])
    offsets = torch.tensor([0, 2, 5, 6, 9])
    token = torch.zeros(9).index_put((offsets[1:] - 1,), reward)
    length, groups = offsets.diff(), torch.zeros(4, dtype=torch.int64)
    centred = reward - 4.0
    for name, expected in {
        "rloo": centred * 4 / 3,
        "grpo": centred / torch.std(reward),
        "dr_grpo": centred,
    }.items():
        actual, returns = estimate_advantages(name, token, offsets, groups)
        torch.testing.assert_close(actual, expected.repeat_interleave(length), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(returns, reward.repeat_interleave(length))


def test_a_group_of_equal_rewards_teaches_nothing():
    rewards = torch.zeros(N).index_fill(0, OFFSETS[1:][OFFSETS.diff() > 0] - 1, 0.7)
    for name in ("rloo", "grpo", "dr_grpo"):
        actual, _ = estimate_advantages(name, rewards, OFFSETS, GROUPS)
        assert actual.abs().max() < 1e-6, name


def test_equal_trajectories_whose_returns_vary_keep_a_bounded_scale():
    """Identical answers judged per token: their means agree, their tokens' returns do not."""
    rewards, offsets = torch.tensor([0.9, 0.1, -0.4, 0.9, 0.1, -0.4]), torch.tensor([0, 3, 6])
    actual, _ = estimate_advantages("grpo", rewards, offsets, torch.zeros(2, dtype=torch.int64), gamma=0.25)
    assert 0.5 < actual.abs().max() < 3.0


@pytest.mark.parametrize("value", [0.1, 2.7, 5.0])
def test_whitening_does_not_blow_up_the_rounding_of_equal_returns(value):
    actual, _ = estimate_advantages(
        "reinforce_plus_plus", torch.full((1000,), value), torch.arange(1001), torch.zeros(1000)
    )
    assert actual.abs().max() < 1e-6


def test_reinforce_plus_plus_whitens_over_the_step(returns):
    actual, _ = estimate_advantages("reinforce_plus_plus", returns, OFFSETS, GROUPS, gamma=0.0)
    flat = returns.tolist()
    mean, std = statistics.fmean(flat), statistics.pstdev(flat)
    torch.testing.assert_close(actual, torch.tensor([(g - mean) / std for g in flat]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (0.25, 0.0), (1.0, 1.0)])
def test_gae_by_a_slow_double_sum(returns, gamma, lam):
    values = torch.randn(N)
    expected = []
    for r, v in zip(parts(returns), parts(values), strict=True):
        delta = [r[t] + gamma * (v[t + 1] if t + 1 < len(v) else 0.0) - v[t] for t in range(len(r))]
        for t in range(len(r)):
            expected.append(sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, len(r))))
    arguments = {"gamma": gamma, "gae_lambda": lam, "values": values}
    actual, targets = estimate_advantages("gae", returns, OFFSETS, GROUPS, **arguments)
    torch.testing.assert_close(actual, torch.tensor(expected), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(targets, actual + values)
    whitened, same_targets = estimate_advantages("gae", returns, OFFSETS, GROUPS, whiten=True, **arguments)
    assert whitened.std(unbiased=False).item() == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(same_targets, targets)


def test_gae_with_lambda_one_is_the_return_minus_the_value(returns):
    values = torch.randn(N)
    plain, _ = estimate_advantages("return", returns, OFFSETS, GROUPS, gamma=0.8, baseline="none")
    actual, targets = estimate_advantages(
        "gae", returns, OFFSETS, GROUPS, gamma=0.8, gae_lambda=1.0, values=values
    )
    torch.testing.assert_close(actual, plain - values)
    torch.testing.assert_close(targets, plain)


@pytest.mark.parametrize("name", ["rloo", "grpo", "dr_grpo", "reinforce_plus_plus", "return"])
def test_order_of_groups_and_names_of_groups_do_not_matter(returns, name):
    """The same trajectories in another order, with other group numbers, have the same advantages."""
    order = [4, 0, 6, 2, 5, 1, 3]
    rows = parts(returns)
    shuffled = torch.tensor([g for i in order for g in rows[i]])
    offsets = torch.tensor([0, *torch.tensor([LENGTHS[i] for i in order]).cumsum(0).tolist()])
    groups = torch.tensor([7, 2, 5])[GROUPS[order]]
    straight, _ = estimate_advantages(name, returns, OFFSETS, GROUPS, gamma=0.5)
    other, _ = estimate_advantages(name, shuffled, offsets, groups, gamma=0.5)
    expected = torch.tensor([a for i in order for a in parts(straight)[i]])
    torch.testing.assert_close(other, expected, rtol=1e-4, atol=1e-6)


def test_unknown_names_and_a_missing_critic_are_refused(returns):
    with pytest.raises(ValueError, match="return, rloo, grpo, dr_grpo, reinforce_plus_plus, gae"):
        estimate_advantages("vtrace", returns, OFFSETS, GROUPS)
    with pytest.raises(ValueError, match="critic"):
        estimate_advantages("gae", returns, OFFSETS, GROUPS)


def test_masked_importance_sampling_leaves_out_what_is_outside_the_band():
    sampler = torch.linspace(-4, -1, 31)
    old = torch.full((31,), -2.0)
    expected = [r if 0.5 <= r <= 2.0 else 0.0 for r in (old - sampler).exp().tolist()]
    assert 0.0 in expected[:8]
    assert 0.0 in expected[-8:]
    actual = importance_weights(old, sampler, 2.0, masked=True, floor=0.5)
    torch.testing.assert_close(actual, torch.tensor(expected))
