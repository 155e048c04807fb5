"""Losses, KL estimators, returns, baselines and importance weights against slow loops and closed forms."""

import math
from itertools import pairwise

import pytest
import torch

from learner.advantages import advantages, discounted_returns, importance_weights
from learner.kl import kl_estimate
from learner.losses import PolicyLossInputs, policy_loss

OFFSETS = torch.tensor([0, 3, 3, 7, 8, 13])
GROUPS = torch.tensor([0, 0, 1, 1, 1])


def slow_returns(rewards, gamma):
    out = []
    for lo, hi in pairwise(OFFSETS):
        r = rewards[lo:hi].tolist()
        out += [sum(gamma ** (k - t) * r[k] for k in range(t, len(r))) for t in range(len(r))]
    return torch.tensor(out)


@pytest.mark.parametrize("gamma", [0.0, 0.25, 1.0])
def test_discounted_returns(gamma):
    rewards = torch.randn(13)
    torch.testing.assert_close(discounted_returns(rewards, OFFSETS, gamma), slow_returns(rewards, gamma))


def test_baselines_by_a_slow_loop():
    returns = torch.randn(13)
    parts = [returns[lo:hi] for lo, hi in pairwise(OFFSETS)]
    means = {i: float(p.mean()) for i, p in enumerate(parts) if len(p)}
    batch = sum(means.values()) / len(means)
    per_group = {g: [m for i, m in means.items() if GROUPS[i] == g] for g in (0, 1)}
    expected = torch.cat(
        [p - sum(per_group[int(GROUPS[i])]) / len(per_group[int(GROUPS[i])]) for i, p in enumerate(parts)]
    )
    torch.testing.assert_close(advantages(returns, OFFSETS, GROUPS, baseline="group"), expected)
    torch.testing.assert_close(advantages(returns, OFFSETS, GROUPS, baseline="batch"), returns - batch)
    torch.testing.assert_close(advantages(returns, OFFSETS, GROUPS, baseline="none"), returns)


def test_sequence_reward_with_gamma_one_gives_reward_minus_mean():
    rewards = torch.zeros(13)
    rewards[[2, 6, 7, 12]] = torch.tensor([1.0, 2.0, 4.0, 9.0])
    returns = discounted_returns(rewards, OFFSETS, 1.0)
    adv = advantages(returns, OFFSETS, GROUPS, baseline="group")
    torch.testing.assert_close(adv, torch.tensor([0.0] * 3 + [2.0 - 5] * 4 + [4.0 - 5] + [9.0 - 5] * 5))


def test_whitening():
    adv = advantages(torch.randn(13), OFFSETS, GROUPS, baseline="batch", whiten=True)
    assert adv.mean().item() == pytest.approx(0, abs=1e-6)
    assert adv.std(unbiased=False).item() == pytest.approx(1, abs=1e-5)


def test_importance_weights_are_truncated_and_constant():
    old = torch.tensor([-1.0, -1.0], requires_grad=True)
    weights = importance_weights(old, torch.tensor([-1.5, -3.0]), 2.0)
    torch.testing.assert_close(weights, torch.tensor([math.exp(0.5), 2.0]))
    assert not weights.requires_grad
    assert importance_weights(old, torch.tensor([-1.5, -3.0]), None).tolist() == [1, 1]


def test_kl_estimators_average_to_the_exact_kl():
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    q = torch.tensor([0.4, 0.35, 0.25], dtype=torch.float64)
    exact = (p * (p / q).log()).sum()
    for estimator in ("k1", "k3"):
        torch.testing.assert_close((p * kl_estimate(p.log(), q.log(), estimator)).sum(), exact)
    assert (p * kl_estimate(p.log(), q.log(), "k2")).sum().item() == pytest.approx(exact.item(), rel=0.05)
    assert (kl_estimate(p.log(), q.log(), "k3") >= 0).all()


def test_k2_as_a_loss_has_the_gradient_of_the_exact_kl():
    logits = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64, requires_grad=True)
    q = torch.tensor([0.4, 0.35, 0.25], dtype=torch.float64)
    log_p = torch.log_softmax(logits, -1)
    exact = torch.autograd.grad((log_p.exp() * (log_p - q.log())).sum(), logits, retain_graph=True)[0]
    sampled = torch.autograd.grad((log_p.exp().detach() * kl_estimate(log_p, q.log(), "k2")).sum(), logits)[0]
    torch.testing.assert_close(sampled, exact)


def inputs(**changes):
    torch.manual_seed(3)
    n = 11
    base = {
        name: torch.randn(n) * 0.4 - 2
        for name in ("logprob", "old_logprob", "sampler_logprob", "reference_logprob")
    }
    base |= {"advantage": torch.randn(n), "importance": torch.rand(n) + 0.5, "entropy": torch.rand(n)}
    base["weight"] = torch.rand(n)
    return PolicyLossInputs(**(base | changes))


def test_reinforce_by_a_slow_loop():
    x = inputs()
    expected = sum(
        x.weight[i] * (-x.importance[i] * x.advantage[i] * x.logprob[i] - 0.1 * x.entropy[i])
        for i in range(11)
    )
    torch.testing.assert_close(policy_loss(x, entropy_coef=0.1).loss, expected)


def test_ppo_clip_by_a_slow_loop():
    x = inputs()
    total, clipped = 0.0, 0.0
    for i in range(11):
        ratio = math.exp(x.logprob[i] - x.old_logprob[i])
        a, bounded = float(x.advantage[i]), min(max(ratio, 0.8), 1.3)
        surrogate = min(ratio * a, bounded * a)
        clipped += float(x.weight[i]) * (surrogate != ratio * a)
        log_r = float(x.reference_logprob[i] - x.logprob[i])
        total += float(x.weight[i]) * (-float(x.importance[i]) * surrogate + 0.05 * log_r**2 / 2)
    out = policy_loss(x, loss="ppo_clip", clip_low=0.2, clip_high=0.3, kl_coef=0.05, kl_estimator="k2")
    assert out.loss.item() == pytest.approx(total, abs=1e-5)
    assert out.sums["clip_fraction"].item() == pytest.approx(clipped, abs=1e-5)


def test_both_losses_have_the_same_gradient_on_policy():
    grads = []
    for name in ("reinforce", "ppo_clip"):
        logprob = torch.linspace(-3, -1, 11).requires_grad_()
        policy_loss(inputs(logprob=logprob, old_logprob=logprob.detach()), loss=name).loss.backward()
        grads.append(logprob.grad)
    torch.testing.assert_close(grads[0], grads[1])


def test_unknown_loss_is_refused():
    with pytest.raises(ValueError, match="ppo_clip"):
        policy_loss(inputs(), loss="dpo")
