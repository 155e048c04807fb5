"""Losses, KL estimators, returns, baselines and importance weights against slow loops and closed forms."""

import math
from itertools import pairwise

import pytest
import torch

from learner.advantages import advantages, discounted_returns, importance_weights
from learner.kl import adapted_coefficient, kl_estimate
from learner.losses import PolicyLossInputs, policy_loss, value_loss

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


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_ppo_clip_by_a_slow_loop(estimator):
    x = inputs()
    total, clipped = 0.0, 0.0
    for i in range(11):
        ratio = math.exp(x.logprob[i] - x.old_logprob[i])
        a, bounded = float(x.advantage[i]), min(max(ratio, 0.8), 1.3)
        surrogate = min(ratio * a, bounded * a)
        clipped += float(x.weight[i]) * (surrogate != ratio * a)
        log_r = float(x.reference_logprob[i] - x.logprob[i])
        kl = log_r**2 / 2 if estimator == "k2" else math.exp(log_r) - 1 - log_r
        total += float(x.weight[i]) * float(x.importance[i]) * (0.05 * kl - surrogate)
    out = policy_loss(x, loss="ppo_clip", clip_low=0.2, clip_high=0.3, kl_coef=0.05, kl_estimator=estimator)
    assert out.loss.item() == pytest.approx(total, abs=1e-5)
    assert out.sums["clip_fraction"].item() == pytest.approx(clipped, abs=1e-5)


def test_the_kls_gradient_is_the_learners_though_the_tokens_are_the_samplers():
    """One token of three: over all tokens that a sampler draws, k2's gradient adds up to that of the KL."""
    logits = torch.tensor([0.3, -0.4, 0.1], dtype=torch.float64, requires_grad=True)
    reference, sampler = (
        torch.tensor(x, dtype=torch.float64).log_softmax(0) for x in ([0.0, 0.5, -0.2], [0.9, -1.0, 0.0])
    )
    logprob = logits.log_softmax(0)
    zeros = torch.zeros(3, dtype=torch.float64)
    x = PolicyLossInputs(
        logprob=logprob,
        entropy=zeros,
        old_logprob=logprob.detach(),
        sampler_logprob=sampler,
        advantage=zeros,
        importance=importance_weights(logprob, sampler, 100.0),
        weight=sampler.exp(),
        reference_logprob=reference,
    )
    out = policy_loss(x, kl_coef=1.0, kl_estimator="k2")
    exact = (logprob.exp() * (logprob - reference)).sum()
    for one, other in zip(
        torch.autograd.grad(out.loss, logits, retain_graph=True),
        torch.autograd.grad(exact, logits),
        strict=True,
    ):
        torch.testing.assert_close(one, other)
    assert float(out.sums["kl"]) == pytest.approx(exact.item())


def test_dual_clip_by_a_slow_loop():
    x = inputs(logprob=torch.linspace(-4, 1, 11), old_logprob=torch.full((11,), -1.5))
    total, clipped = 0.0, 0.0
    for i in range(11):
        ratio = math.exp(x.logprob[i] - x.old_logprob[i])
        a = float(x.advantage[i])
        surrogate = min(ratio * a, min(max(ratio, 0.8), 1.2) * a)
        if a < 0:
            surrogate = max(surrogate, 3.0 * a)
        clipped += float(x.weight[i]) * (surrogate != ratio * a)
        total -= float(x.weight[i]) * float(x.importance[i]) * surrogate
    out = policy_loss(x, loss="ppo_clip", dual_clip=3.0)
    assert out.loss.item() == pytest.approx(total, abs=1e-4)
    assert out.sums["clip_fraction"].item() == pytest.approx(clipped, abs=1e-5)
    assert out.loss.item() != pytest.approx(policy_loss(x, loss="ppo_clip").loss.item(), abs=1e-2)


TRAJECTORY = torch.tensor([4, 4, 4, 0, 2, 2, 2, 2, 9, 9, 9])


def gspo_by_definition(logprob, old, advantage, trajectory, low, high):
    """Zheng et al. 2025, eq. 5 and 7: mean over sequences of min(s A, clip(s) A), one A a sequence."""
    gains = []
    for name in trajectory.unique():
        own = trajectory == name
        s = ((logprob[own] - old[own]).sum() / own.sum()).exp()
        a = advantage[own][0]
        gains.append(torch.minimum(s * a, s.clamp(1 - low, 1 + high) * a))
    return -torch.stack(gains).mean()


def gspo_inputs(logprob, order=slice(None)):
    """One advantage a sequence, and the weights of a mean over sequences."""
    advantage = torch.tensor([-2.0, 0, 1.5, 0, -0.7, 0, 0, 0, 0, 0.4])[TRAJECTORY]
    weight = 0.25 / torch.bincount(TRAJECTORY)[TRAJECTORY].float()
    old = torch.linspace(-2.5, -1.2, 11)
    ones = torch.ones(11)
    return PolicyLossInputs(
        logprob=logprob[order],
        entropy=ones[order],
        old_logprob=old[order],
        sampler_logprob=old[order],
        advantage=advantage[order],
        importance=ones[order],
        weight=weight[order],
        trajectory=TRAJECTORY[order],
    )


@pytest.mark.parametrize("seed", range(4))
def test_gspo_has_value_and_gradient_of_its_definition(seed):
    torch.manual_seed(seed)
    shift = 0.3 * torch.randn(11)
    direct = (gspo_inputs(torch.zeros(11)).old_logprob + shift).requires_grad_()
    ours = direct.detach().clone().requires_grad_()
    x = gspo_inputs(direct)
    expected = gspo_by_definition(direct, x.old_logprob, x.advantage, TRAJECTORY, 0.05, 0.1)
    expected.backward()
    out = policy_loss(gspo_inputs(ours), loss="gspo", clip_low=0.05, clip_high=0.1)
    out.loss.backward()
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(ours.grad, direct.grad)


def test_gspo_does_not_depend_on_the_order_of_tokens_or_on_whole_sequences_being_split_off():
    torch.manual_seed(2)
    logprob = gspo_inputs(torch.zeros(11)).old_logprob + 0.2 * torch.randn(11)
    settings = {"loss": "gspo", "clip_low": 0.05, "clip_high": 0.1}
    whole = policy_loss(gspo_inputs(logprob), **settings)
    mixed = policy_loss(gspo_inputs(logprob, torch.randperm(11)), **settings)
    torch.testing.assert_close(mixed.loss, whole.loss)
    halves = [policy_loss(gspo_inputs(logprob, part), **settings) for part in (slice(0, 4), slice(4, 11))]
    torch.testing.assert_close(halves[0].loss + halves[1].loss, whole.loss)
    for name, value in whole.sums.items():
        torch.testing.assert_close(halves[0].sums[name] + halves[1].sums[name], value)


def test_gspo_without_trajectories_is_refused():
    with pytest.raises(ValueError, match="trajectory"):
        policy_loss(inputs(), loss="gspo")


@pytest.mark.parametrize("clip", [0.2, None])
def test_value_loss_by_a_slow_loop(clip):
    torch.manual_seed(1)
    value, old, target = torch.randn(20), torch.randn(20), torch.randn(20)
    expected = []
    for v, o, t in zip(value.tolist(), old.tolist(), target.tolist(), strict=True):
        bounded = v if clip is None else min(max(v, o - clip), o + clip)
        expected.append(max((v - t) ** 2, (bounded - t) ** 2) / 2)
    torch.testing.assert_close(value_loss(value, old, target, clip), torch.tensor(expected))


@pytest.mark.parametrize(
    ("kl", "factor"),
    [(0.0, 0.98), (0.5, 0.98), (0.95, 0.995), (1.0, 1.0), (1.1, 1.01), (1.2, 1.02), (9, 1.02)],
)
def test_adaptive_coefficient_follows_the_published_controller(kl, factor):
    """Target 1 and gain .1: e is bounded by .2 on either side."""
    assert adapted_coefficient(0.5, kl, 1.0) == pytest.approx(0.5 * factor)
    assert adapted_coefficient(0.5, kl * 3, 3.0) == pytest.approx(0.5 * factor)


def test_diagnostics_have_weights_of_their_own():
    x = inputs(metric_weight=torch.full((11,), 1 / 11))
    assert policy_loss(x).sums["entropy"].item() == pytest.approx(float(x.entropy.mean()), rel=1e-5)
    torch.testing.assert_close(policy_loss(x).loss, policy_loss(inputs()).loss)


def test_all_losses_have_the_same_gradient_on_policy():
    """gspo too, although the advantages differ within its sequences."""
    grads = []
    for name in ("reinforce", "ppo_clip", "gspo"):
        logprob = torch.linspace(-3, -1, 11).requires_grad_()
        x = inputs(logprob=logprob, old_logprob=logprob.detach(), trajectory=torch.arange(11) // 3)
        policy_loss(x, loss=name).loss.backward()
        grads.append(logprob.grad)
    torch.testing.assert_close(grads[0], grads[1])
    torch.testing.assert_close(grads[0], grads[2])


def test_unknown_loss_is_refused():
    with pytest.raises(ValueError, match="reinforce, ppo_clip, gspo"):
        policy_loss(inputs(), loss="dpo")
