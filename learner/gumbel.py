"""Straight-through Gumbel-Softmax in two passes (Jang et al. 2017, arXiv 1611.01144; Maddison et al. 2017,
arXiv 1611.00712).

With logits z and independent Gumbel noise g, y = argmax(z + g) is a sample of softmax(z), and
s = softmax((z + g) / tau) its relaxation. A straight-through row is onehot(y) + s - stopgrad(s): its value is
onehot(y), its derivative that of s.

Responses are drawn first, token by token and without gradients (`learner.drawing`). One pass over the drawn
tokens then recomputes every z, and with the same noise forms every row. In value that is the recursion that
would form the rows while it draws: the value of a row is the hard token, so a token's past is the same
in both. The gradient goes from each row into the logits of its own position, and through them into all the
weights that made them from the *hard* past. It does not go through the past tokens: how an earlier choice
would have changed later logits is left out, which keeps one pass, and the chain of relaxations short.

Noise is no state: it is a function of (seed, step, sample, position), so both passes, and any split over
micro-batches and ranks, see the same.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear, logsigmoid, softplus

from learner.config import GumbelConfig, GumbelObjective
from learner.logprobs import ScoredModel, run_body
from learner.packing import PackedBatch

OBJECTIVES: dict[GumbelObjective, Callable[[Tensor], Tensor]] = {
    "neg_log_one_minus_d": softplus,
    "log_d": logsigmoid,
    "logit": lambda score: score,
    "prob": torch.sigmoid,
}
"""What the policy raises, as a function of the judge's scores s with D = sigmoid(s): the reward forms of the
same names, differentiable."""

POLICY, SOFT, MISMATCHED = range(3)


def gumbel_noise(key: Sequence[int], vocabulary: int, device: torch.device | str) -> Tensor:
    """float32 [vocabulary] of standard Gumbel noise, -log E with E ~ Exp(1); the same for the same `key` of
    integers on the same kind of device."""
    seed = np.random.SeedSequence([word % 2**64 for word in key]).generate_state(1, np.uint64)[0]
    generator = torch.Generator(device).manual_seed(int(seed))
    waits = torch.empty(vocabulary, device=device).exponential_(generator=generator)
    return -waits.clamp_min_(torch.finfo(torch.float32).tiny).log_()


def relaxed(logits: Tensor, noise: Tensor, tau: float) -> Tensor:
    """softmax((z + g) / tau) over the last dimension (Jang et al. 2017, eq. 2)."""
    return torch.softmax((logits + noise) / tau, dim=-1)


def tau_at(cfg: GumbelConfig, step: int) -> float:
    """Temperature of policy step `step` (from 0): from tau_start to tau_end over tau_steps, in equal
    differences ("linear") or equal ratios ("exponential"; Jang et al. 2017, sec. 2.2), then tau_end.

    Raises ValueError without tau_steps, unless the schedule is constant.
    """
    if cfg.schedule == "constant":
        return cfg.tau_start
    if cfg.tau_steps is None:
        raise ValueError(f'gumbel: schedule = "{cfg.schedule}" needs tau_steps, the steps until tau_end')
    done = min(1.0, step / cfg.tau_steps)
    if cfg.schedule == "linear":
        return cfg.tau_start + done * (cfg.tau_end - cfg.tau_start)
    return cfg.tau_start * (cfg.tau_end / cfg.tau_start) ** done


@dataclass(frozen=True)
class SoftBatch:
    """Drawn responses, as the policy and as the judge read them: the same tokens behind two spellings of the
    prompt, perhaps packed differently.

    Columns of `policy`: `sample` and `place`, the noise's key. Columns of `judged`: `share`, a score's part
    in the step's objective, and `last`, its part in the mean of the sequence scores.
    """

    policy: PackedBatch
    judged: PackedBatch
    order: Tensor  # [N]
    """Token i of `judged` is token order[i] of `policy`."""
    table: Tensor  # [V H]
    """Each token of the vocabulary as the judge's body reads it; a constant."""
    seed: tuple[int, int]
    """Run seed and step."""
    tau: float

    def to(self, device: torch.device | str) -> "SoftBatch":
        policy, judged = self.policy.to(device), self.judged.to(device)
        return replace(
            self, policy=policy, judged=judged, order=self.order.to(device), table=self.table.to(device)
        )


class _StraightThrough(torch.autograd.Function):
    """Straight-through rows times a table: [N, V] x [V, H], with neither the rows nor all logits in memory.

    The value is table[y]. With upstream gradient G [N, H] and a = G table^T, the chain through s gives
    d / d logits = s (a - <s, a>) / (tau temperature), logits before the sampling temperature; a chunk of them
    at a time. What only the backward pass knows it adds to `tally`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        batch: SoftBatch,
        temperature: float,
        chunk: int,
        tally: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, bias)
        ctx.rest = batch, temperature, chunk, tally
        return batch.table[batch.policy.target]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias = ctx.saved_tensors
        batch, temperature, chunk, tally = ctx.rest
        policy, (rows,) = batch.policy, upstream
        d_hidden = torch.empty_like(hidden)
        d_weight, d_bias = (
            torch.zeros(one.shape, dtype=torch.float32, device=one.device) if wanted else None
            for one, wanted in zip((weight, bias), ctx.needs_input_grad[1:3], strict=True)
        )
        for lo in range(0, len(hidden), chunk):
            part = slice(lo, min(lo + chunk, len(hidden)))
            logits = linear(hidden[part], weight, bias).float() / temperature
            noise = _noise_of(batch, part, logits)
            missed = (logits + noise).argmax(-1) != policy.target[part]
            tally[MISMATCHED] += (missed * policy.weight[part]).sum()
            soft = relaxed(logits, noise, batch.tau)
            along = (rows[part] @ batch.table.t()).float()
            slope = soft * (along - (soft * along).sum(-1, keepdim=True)) / (batch.tau * temperature)
            if d_bias is not None:
                d_bias += slope.sum(0)
            slope = slope.to(hidden.dtype)
            torch.mm(slope, weight, out=d_hidden[part])
            if d_weight is not None:
                d_weight += slope.t() @ hidden[part]
        tally[SOFT] += d_hidden.float().square().sum()
        return (
            d_hidden,
            d_weight.to(weight.dtype) if d_weight is not None else None,
            d_bias.to(bias.dtype) if d_bias is not None else None,
            None,
            None,
            None,
            None,
        )


def _noise_of(batch: SoftBatch, part: slice, like: Tensor) -> Tensor:
    """The noise [n, V] with which these tokens were drawn."""
    columns = batch.policy.columns
    keys = zip(columns["sample"][part].tolist(), columns["place"][part].tolist(), strict=True)
    return torch.stack([gumbel_noise((*batch.seed, *key), like.shape[-1], like.device) for key in keys])


class GumbelModel(ScoredModel):
    """A `ScoredModel` that also maps a `SoftBatch` to its straight-through rows times the judge's table,
    [N, H], in the order of the batch's `policy`.

    `tally` adds up, over the backward passes of this rank: the squared norm of the gradient that enters the
    last hidden states from the log-probabilities and from the straight-through rows, and the tokens that are
    not the argmax of their recomputed logits (rounding, in theory none).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.tally = torch.zeros(3, dtype=torch.float64, device=self.head.weight.device)

    def forward(self, batch: Any) -> Any:
        packed: PackedBatch = batch.policy if isinstance(batch, SoftBatch) else batch
        hidden = run_body(self.model.get_decoder(), packed, packing=self.packing, limit=self.limit)
        states = hidden.flatten(0, 1)[packed.source]
        if isinstance(batch, SoftBatch):
            head = self.head
            return _StraightThrough.apply(
                states, head.weight, head.bias, batch, self.temperature, self.chunk, self.tally
            )
        if states.requires_grad:
            states.register_hook(self._count)
        return self.head(states, packed.target, self.temperature, self.chunk)

    def _count(self, gradient: Tensor) -> None:
        self.tally[POLICY] += gradient.float().square().sum()
