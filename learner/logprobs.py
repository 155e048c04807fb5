"""Log-probabilities and entropies of response tokens, without ever holding all logits.

Only hidden states that predict a response token reach the vocabulary projection, in chunks. When a batch fits
into one chunk its logits are kept for the backward pass; otherwise each chunk is projected again there, so
that at most `chunk` x vocabulary logits exist at a time. Softmax and reductions are fp32 whatever the model's
dtype.

`ScoredModel` is what an engine wraps: its forward runs body and head, so ZeRO-3's gather hooks fire for both.
"""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from learner.attention import attends_ahead, longest_packable, prepare_mask
from learner.packing import PackedBatch


class _TokenLogprobs(torch.autograd.Function):
    """log p(target) and H(p) for p = softmax(hidden @ weight.T / temperature), chunk by chunk, gradients by
    formula.

    With upstream gradients g of the log-probability and e of the entropy,
    d/d logits_v = [g (1{v = target} - p_v) - e p_v (log p_v + H)] / temperature.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        target: torch.Tensor,
        temperature: float,
        chunk: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        n = hidden.shape[0]
        logprob = torch.empty(n, dtype=torch.float32, device=hidden.device)
        entropy = torch.empty_like(logprob)
        kept = None
        for lo in range(0, n, chunk):
            hi = min(lo + chunk, n)
            log_p = _log_softmax(hidden[lo:hi], weight, bias, temperature)
            logprob[lo:hi] = log_p.gather(1, target[lo:hi, None]).squeeze(1)
            p = log_p.exp()
            # A vocabulary entry at -inf has probability 0 and contributes nothing; 0 * -inf would be NaN.
            entropy[lo:hi] = -torch.linalg.vecdot(p, log_p.clamp_min(torch.finfo(log_p.dtype).min))
            kept = log_p if n <= chunk else None
        needs = any(ctx.needs_input_grad[:3])
        ctx.save_for_backward(hidden, weight, bias, target, entropy, kept if needs else None)
        ctx.temperature, ctx.chunk = temperature, chunk
        return logprob, entropy

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        g_logprob, g_entropy = upstream
        hidden, weight, bias, target, entropy, kept = ctx.saved_tensors
        want_hidden, want_weight, want_bias = ctx.needs_input_grad[:3]
        n, chunk = hidden.shape[0], ctx.chunk
        d_hidden = torch.empty_like(hidden) if want_hidden else None
        several = n > chunk
        accumulate = torch.float32 if several else weight.dtype
        d_weight = torch.zeros(weight.shape, dtype=accumulate, device=weight.device) if want_weight else None
        d_bias = torch.zeros_like(bias, dtype=torch.float32) if want_bias else None
        use_entropy = bool(g_entropy.any())
        for lo in range(0, n, chunk):
            part = slice(lo, min(lo + chunk, n))
            log_p = kept if kept is not None else _log_softmax(hidden[part], weight, bias, ctx.temperature)
            p = log_p.exp()
            scale = g_logprob[part, None]
            if use_entropy:
                e = g_entropy[part, None]
                grad = p * (
                    -scale - e * (log_p.clamp_min(torch.finfo(log_p.dtype).min) + entropy[part, None])
                )
            else:
                grad = p.mul_(-scale)
            grad.scatter_add_(1, target[part, None], scale)
            grad = grad.div_(ctx.temperature) if ctx.temperature != 1.0 else grad
            if d_bias is not None:
                d_bias += grad.sum(0)
            grad = grad.to(hidden.dtype)
            if d_hidden is not None:
                torch.mm(grad, weight, out=d_hidden[part])
            if d_weight is not None:
                if several:
                    d_weight += grad.t() @ hidden[part]
                else:
                    torch.mm(grad.t(), hidden, out=d_weight)
        return (
            d_hidden,
            d_weight.to(weight.dtype) if d_weight is not None else None,
            d_bias.to(bias.dtype) if d_bias is not None else None,
            None,
            None,
            None,
        )


def _log_softmax(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, temperature: float
) -> torch.Tensor:
    logits = nn.functional.linear(hidden, weight, bias).float()
    if temperature != 1.0:
        logits /= temperature
    return torch.log_softmax(logits, dim=-1)


def token_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    *,
    temperature: float = 1.0,
    chunk: int = 1024,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of `target` [N] and entropies, both fp32 [N], of the distributions that hidden [N, D]
    predicts."""
    return _TokenLogprobs.apply(hidden, weight, bias, target, temperature, chunk)


class VocabularyHead(nn.Module):
    """The model's vocabulary projection, whose weight it shares; ZeRO-3 gathers that weight around this
    module's passes."""

    def __init__(self, projection: nn.Linear) -> None:
        super().__init__()
        self.weight = projection.weight
        self.bias = projection.bias

    def forward(
        self, hidden: torch.Tensor, target: torch.Tensor, temperature: float, chunk: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return token_logprobs(hidden, self.weight, self.bias, target, temperature=temperature, chunk=chunk)


class ScoredModel(nn.Module):
    """A causal language model that maps a packed batch to log-probabilities and entropies of its response
    tokens.

    Raises ValueError when the model's logits are more than a linear map of its last hidden state, or when it
    cannot run packed rows and `packing` is on.
    """

    def __init__(
        self, model: PreTrainedModel, *, temperature: float = 1.0, chunk: int = 1024, packing: bool = True
    ) -> None:
        super().__init__()
        self.model = model
        self.head = VocabularyHead(linear_head(model))
        self.temperature = temperature
        self.chunk = chunk
        self.packing = packing
        self.limit = longest_packable(model.config, model.get_decoder()) if packing else None

    def forward(self, batch: PackedBatch) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = run_body(self.model.get_decoder(), batch, packing=self.packing, limit=self.limit)
        return self.head(hidden.flatten(0, 1)[batch.source], batch.target, self.temperature, self.chunk)


def run_body(
    body: nn.Module,
    batch: PackedBatch,
    *,
    packing: bool = True,
    limit: int | None = None,
    embedded: torch.Tensor | None = None,
) -> torch.Tensor:
    """Last hidden states [R, T, D] of a transformer body on a packed batch, or with `packing = False` on
    unpacked rows, as transformers itself masks them.

    `limit` is `learner.attention.longest_packable`'s; longer sequences raise ValueError. `embedded` [R, T, D]
    takes the place of the tokens' embeddings.
    """
    tokens = {"input_ids": batch.input_ids} if embedded is None else {"inputs_embeds": embedded}
    config: Any = body.config
    if not packing:
        off = {"use_cache": False} if getattr(config, "use_cache", False) else {}  # encoders may not know it
        return body(**tokens, attention_mask=(~batch.padding()).long(), **off).last_hidden_state
    longest = int(batch.position_ids.max()) + 1
    if limit is not None and longest > limit:
        raise ValueError(
            f"a sequence of {longest} tokens is longer than the model's sliding window of {limit}, packed "
            "rows would attend too far; shorten prompts and responses or set packing = false"
        )
    dtype = next(weight.dtype for weight in body.parameters() if weight.is_floating_point())
    mask = prepare_mask(batch, config._attn_implementation, dtype)
    return body(
        **tokens, attention_mask=mask, position_ids=batch.position_ids, use_cache=False
    ).last_hidden_state


def linear_head(model: PreTrainedModel) -> nn.Linear:
    """The output layer, which maps the body's last hidden state to the logits with nothing before or after.

    Raises ValueError for a model in which it is not so. Body and layer are stood in for, so that no weights
    are needed.
    """
    body, projection = model.get_decoder(), model.get_output_embeddings()
    kind = model.config.model_type
    if body is model or not isinstance(body, PreTrainedModel) or not isinstance(projection, nn.Linear):
        raise ValueError(f"{kind} is no body with a linear output layer; use a causal language model")
    if attends_ahead(body):
        raise ValueError(f"{kind} attends in both directions; use a causal language model")
    # Whole numbers, large enough for a soft cap to show, that survive a cast.
    hidden = torch.arange(-90.0, 90.0, 2.5).round().repeat(projection.in_features, 1).T[None]
    logits = torch.arange(-72.0, 72.0).view(1, 72, 2)
    entered: list[torch.Tensor] = []

    def project(states: torch.Tensor) -> torch.Tensor:
        entered.append(states)
        return logits

    body.forward = lambda *_, **__: _Output(last_hidden_state=hidden)  # type: ignore[arg-type]
    projection.forward = project  # type: ignore[method-assign, assignment]
    plain = False
    try:
        left = model(input_ids=torch.zeros(1, 72, dtype=torch.int64), use_cache=False).logits
        plain = torch.equal(entered[0].float(), hidden) and torch.equal(left.float(), logits)
    except RuntimeError:  # a layer of another width, or without weights, stands before the output layer
        pass
    finally:
        del body.forward, projection.forward
    if not plain:
        raise ValueError(
            f"{kind} transforms its logits before or after the output layer (a soft cap or scale), which the "
            "chunked log-probabilities leave out; use another model"
        )
    return projection


class _Output(BaseModelOutput):
    """A body's output; whatever else a model looks for in it is None."""

    def __getattr__(self, name: str) -> None:
        return None
