"""The discriminator: a transformer body and a score head.

A causal body gives one score per response token, read after that token; the last one is the sequence score.
Responses to one prompt share its computation (packed rows). A bidirectional body reads a whole response at
once: its mean-pooled score is the sequence score, given to each of the response's tokens, and only the
sequence level may use it.

Everything that has weights is used inside `forward`, so that ZeRO-3 can gather it there. The head computes in
fp32 whatever the dtype of the body.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from discriminator.canonical import Canonicaliser, Encoded
from discriminator.config import DiscriminatorConfig
from discriminator.regularisers import spectrally_bounded
from learner.attention import attention_implementation, longest_packable
from learner.logprobs import run_body
from learner.packing import Group, PackedBatch, make_groups, pack, unpacked
from learner.pretrained import load_body, longest_input, skeleton

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

BodyKind = Literal["causal", "encoder"]


class Discriminator(nn.Module):
    """Scores of a packed batch.

        scores = model(batch)   # [N] fp32, one per response token in the batch's order

    Args:
        body: returns `last_hidden_state` [R, T, H] for `input_ids` [R, T].
        hidden: H.
        kind: "causal" or "encoder".
        gain: the linear layer's output is multiplied by it.
        dropout: before the linear layer, in training mode.
        token_dropout: chance of a response token's embedding to be zero, in training mode.
        spectral_bound: largest spectral norm of the head with its gain (None: no bound).
        packing: batches come in packed rows; otherwise one response in a row.
    """

    def __init__(
        self,
        body: nn.Module,
        *,
        hidden: int,
        kind: BodyKind,
        gain: float = 1.0,
        dropout: float = 0.0,
        token_dropout: float = 0.0,
        spectral_bound: float | None = None,
        packing: bool = True,
    ) -> None:
        super().__init__()
        self.body = body
        self.kind = kind
        self.gain = gain
        self.spectral_bound = spectral_bound
        self.packing = packing
        self.limit = longest_packable(body.config, body) if packing else None  # type: ignore[arg-type]
        self.dropout = nn.Dropout(dropout)
        self.token_dropout = token_dropout
        self.head = nn.Linear(hidden, 1, dtype=torch.float32)
        # Near zero: an untrained discriminator takes everything for a coin toss instead of giving random
        # rewards.
        nn.init.normal_(self.head.weight, std=1.0 / (gain * hidden))
        nn.init.zeros_(self.head.bias)

    def forward(self, batch: PackedBatch, direction: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Scores [N] of the batch's response tokens, fp32.

        With `direction` [N] also the squared length [N] of d(direction . scores) / d(embedding) at each
        response token, itself differentiable (see `discriminator.regularisers`). It is computed in here
        because a backward pass through an engine's output would count as the engine's own.
        """
        if direction is None:
            return self._scores(batch, self._hidden(batch))
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # the fused kernels differentiate once only
            embedded = self.body.get_input_embeddings()(batch.input_ids)  # type: ignore[operator]
            if not embedded.requires_grad:
                embedded.requires_grad_()
            scores = self._scores(batch, self._hidden(batch, embedded))
            (slope,) = torch.autograd.grad((direction * scores).sum(), embedded, create_graph=True)
        return scores, slope.float().square().sum(-1).flatten()[batch.position]

    def scores_of(self, batch: PackedBatch, responses: Tensor) -> Tensor:
        """Scores [N] of the batch's response tokens, fp32, when token i has the embedding responses[i] [H]
        and not that of its id; differentiable in `responses`."""
        embedded = self.body.get_input_embeddings()(batch.input_ids)  # type: ignore[operator]
        placed = embedded.flatten(0, 1).index_copy(0, batch.position, responses.to(embedded.dtype))
        return self._scores(batch, self._hidden(batch, placed.view_as(embedded)))

    def _scores(self, batch: PackedBatch, hidden: Tensor) -> Tensor:
        if self.kind == "causal":
            states = hidden.flatten(0, 1)[batch.position]
            return self._score(states)
        real = (~batch.padding())[..., None].to(torch.float32)
        pooled = (hidden.float() * real).sum(1) / real.sum(1)
        return self._score(pooled)[batch.position // batch.shape[1]]

    def _with_holes(self, batch: PackedBatch, embedded: Tensor) -> Tensor:
        """The embeddings [R, T, H] with some response tokens' set to zero."""
        shown = torch.ones(batch.input_ids.numel(), device=embedded.device, dtype=embedded.dtype)
        kept = torch.rand(len(batch.position), device=embedded.device) >= self.token_dropout
        shown[batch.position] = kept.to(embedded.dtype)
        return embedded * shown.view(*batch.input_ids.shape, 1)

    def _hidden(self, batch: PackedBatch, embedded: Tensor | None = None) -> Tensor:
        if self.training and self.token_dropout > 0:
            if embedded is None:
                embedded = self.body.get_input_embeddings()(batch.input_ids)  # type: ignore[operator]
            embedded = self._with_holes(batch, embedded)
        return run_body(self.body, batch, packing=self.packing, limit=self.limit, embedded=embedded)

    def _score(self, states: Tensor) -> Tensor:
        with torch.autocast(states.device.type, enabled=False):
            # Without scale of their own the states of different bodies and layers would need different head
            # rates.
            normed = functional.rms_norm(states.float(), states.shape[-1:])
            # Cast here too: an engine may have moved the whole module to bf16.
            weight, bias = self.head.weight.float(), self.head.bias.float()
            if self.spectral_bound is not None:
                weight = spectrally_bounded(weight, self.spectral_bound / self.gain)
            return self.gain * functional.linear(self.dropout(normed), weight, bias).squeeze(-1)


def body_kind(config: "PreTrainedConfig", requested: Literal["auto", "causal", "encoder"]) -> BodyKind:
    """The kind of body a model configuration describes.

    Raises:
        ValueError: an encoder-decoder model, or a kind asked for that the model is not.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{config.name_or_path}: encoder-decoder models cannot be a discriminator's body")
    heads = [str(name) for name in getattr(config, "architectures", None) or []]
    causal = any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in heads) or getattr(
        config, "is_decoder", False
    )
    found: BodyKind = "causal" if causal else "encoder"
    if requested not in ("auto", found) and heads:
        raise ValueError(
            f'{config.name_or_path}: discriminator.body = "{requested}", but {heads[0]} is of kind '
            f'"{found}"; use "auto"'
        )
    return found if requested == "auto" else requested


def load_canonicaliser(config: DiscriminatorConfig, model: str) -> Canonicaliser:
    """Tokenizer and limits of a discriminator on the body `model` (hub name or folder)."""
    from transformers import AutoConfig, AutoTokenizer

    shape = AutoConfig.from_pretrained(model, trust_remote_code=config.trust_remote_code)
    body = skeleton(shape, causal=False, trust_remote_code=config.trust_remote_code)
    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=config.trust_remote_code)
    context = min(longest_input(body) or 10**9, int(tokenizer.model_max_length))
    encoder = body_kind(shape, config.body) == "encoder"
    return Canonicaliser(tokenizer, config.canonical, context=context, encoder=encoder)


def load_discriminator(
    config: DiscriminatorConfig,
    model: str,
    *,
    device: str,
    dtype: torch.dtype,
    seed: int = 0,
    lora: bool = True,
) -> Discriminator:
    """A discriminator on the body `model` with a new head; the same seed gives the same head on every rank.

    Args:
        config: kind, level, dropout, adapters.
        model: hub name or local folder.
        device: where it will run; decides the attention implementation. The module is returned on the CPU.
        dtype: dtype of the body's weights.
        seed: of the head and the adapters.
        lora: put the configured adapters on; a scorer loads merged weights and needs none.

    Raises:
        ValueError: a body that cannot be used at this level, whose attention cannot share prompts, or whose
            weights are not all there.
    """
    from transformers import AutoConfig

    shape = AutoConfig.from_pretrained(model, trust_remote_code=config.trust_remote_code)
    empty = skeleton(shape, causal=False, trust_remote_code=config.trust_remote_code)
    kind = body_kind(shape, config.body)
    if kind == "encoder" and config.level == "token":
        raise ValueError(
            f'{model} is bidirectional: discriminator.level = "token" would score prefixes that '
            "saw the future"
        )
    # R1 differentiates twice, which flex_attention does not allow.
    implementation = attention_implementation(
        device, empty, twice=kind == "encoder" or config.gradient_penalty > 0
    )
    body: Any = load_body(
        model, dtype=dtype, implementation=implementation, trust_remote_code=config.trust_remote_code
    )
    if getattr(body, "pooler", None) is not None:
        body.pooler = None  # not used here, and a weight without a gradient upsets ZeRO
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if lora and config.lora.rank > 0:
            from learner.lora import attach

            body = attach(body, config.lora, sent=dtype)
        return Discriminator(
            body,
            hidden=body.config.hidden_size,
            kind=kind,
            gain=config.head_gain,
            dropout=config.dropout,
            token_dropout=config.token_dropout,
            spectral_bound=config.spectral_norm,
            packing=kind == "causal" and config.packing,
        )


def group_encoded(encoded: Sequence[Encoded]) -> list[Group]:
    """Groups of equal prompts. Row numbers count the responses, so `PackedBatch.trajectory` indexes
    `encoded`."""
    numbers: dict[tuple[int, ...], int] = {}
    keys = [numbers.setdefault(tuple(e.prompt_ids), len(numbers)) for e in encoded]
    return make_groups(
        [np.asarray(e.prompt_ids) for e in encoded], [np.asarray(e.response_ids) for e in encoded], keys
    )


def batches_of(
    groups: Sequence[Group], kind: BodyKind, *, packing: bool, pack_length: int, micro_batch_tokens: int
) -> list[PackedBatch]:
    """Micro-batches for a kind of body: shared prompts for causal ones, single rows for encoders."""
    if kind == "causal" and packing:
        return pack(groups, pack_length=pack_length, micro_batch_tokens=micro_batch_tokens)
    return unpacked(groups, micro_batch_tokens=micro_batch_tokens)


def responses_in(batch: PackedBatch) -> tuple[Tensor, Tensor]:
    """Which response of the batch each token belongs to ([N], counted from 0) and each response's last token
    ([B])."""
    change = batch.trajectory[1:] != batch.trajectory[:-1]
    first = torch.zeros(1, dtype=torch.int64, device=change.device)
    response = torch.cat([first, change.to(torch.int64).cumsum(0)])
    last = torch.cat([change.nonzero()[:, 0], first + len(change)])
    return response, last


def collect(
    batches: Sequence[PackedBatch], scores: Sequence[Tensor], encoded: Sequence[Encoded]
) -> list[NDArray[np.float32]]:
    """Scores of batches, each [N], put back into one float32 array per response."""
    lengths = [len(e.response_ids) for e in encoded]
    flat = torch.zeros(sum(lengths), dtype=torch.float32)
    for batch, values in zip(batches, scores, strict=True):
        batch.to("cpu").scatter(values.detach().float().cpu(), flat)
    return np.split(flat.numpy(), np.cumsum(lengths)[:-1])
