"""Attention masks of packed rows: group prompt plus own response, causal.

One rule, two forms: a dense additive mask for `sdpa` and a `BlockMask` for `flex_attention`, both handed to
transformers as a prepared 4D mask, which its models take as it stands. Padding attends to itself so that no
softmax row is empty.
"""

import inspect
from typing import Any

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from learner.packing import PROMPT, PackedBatch


def dense_mask(batch: PackedBatch, dtype: torch.dtype) -> torch.Tensor:
    """Additive mask [R, 1, T, T]: 0 where attention is allowed, the dtype's lowest number elsewhere.

    Additive rather than boolean because SDPA would convert a boolean one anew in every layer.
    """
    group, response = batch.group_ids, batch.response_ids
    same_group = group[:, :, None] == group[:, None, :]
    own = (response[:, None, :] == PROMPT) | (response[:, :, None] == response[:, None, :])
    width = group.shape[1]
    causal = torch.ones(width, width, dtype=torch.bool, device=group.device).tril()
    allowed = same_group & own & causal
    mask = torch.zeros(allowed.shape, dtype=dtype, device=group.device)
    return mask.masked_fill_(~allowed, torch.finfo(dtype).min)[:, None]


def block_mask(batch: PackedBatch) -> BlockMask:
    """The same mask for flex_attention, which skips blocks that are empty."""
    group, response = batch.group_ids, batch.response_ids

    def allowed(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        own = (response[b, k] == PROMPT) | (response[b, q] == response[b, k])
        return (group[b, q] == group[b, k]) & own & (q >= k)

    rows, width = batch.shape
    return create_block_mask(allowed, B=rows, H=None, Q_LEN=width, KV_LEN=width, device=str(group.device))


def sdpa_in_float32(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' `sdpa`, computed in float32 whatever the model's dtype: the backward pass of torch's CPU
    kernel takes eight times as long in bfloat16, more than all of a small model's matrix products."""
    if attention_mask is not None and attention_mask.is_floating_point():
        attention_mask = attention_mask.float()
    out, _ = sdpa_attention_forward(
        module, query.float(), key.float(), value.float(), attention_mask, **options
    )
    return out.to(query.dtype), None


ON_CPU = "rlgaf_sdpa_in_float32"
AttentionInterface.register(ON_CPU, sdpa_in_float32)
AttentionMaskInterface.register(ON_CPU, sdpa_mask)


def attention_implementation(
    device: torch.device | str, model: PreTrainedModel, *, twice: bool = False
) -> str:
    """What a model of the class and configuration of `model` (without weights, perhaps) is loaded with to run
    packed rows on `device`; `twice`: so that its attention can be differentiated twice."""
    known = model.config.get_text_config()
    sdpa = model._supports_sdpa and getattr(known, "attn_logit_softcapping", None) is None
    if model._can_set_attn_implementation() and not twice:
        if torch.device(device).type == "cuda" and model._supports_flex_attn:
            return "flex_attention"
        if torch.device(device).type == "cpu" and sdpa:
            return ON_CPU
    return "sdpa" if sdpa else "eager"


def prepare_mask(batch: PackedBatch, implementation: str, dtype: torch.dtype) -> torch.Tensor | BlockMask:
    """The batch's mask for a model loaded with `implementation`. Raises ValueError for one that takes no 4D
    mask."""
    if implementation == "flex_attention":
        return block_mask(batch)
    if implementation in (ON_CPU, "sdpa", "eager"):
        return dense_mask(batch, dtype)
    raise ValueError(
        f"packed rows run with sdpa, eager or flex_attention, not attn_implementation={implementation!r}"
    )


def attends_ahead(body: nn.Module) -> bool:
    """Whether a token's state depends on later tokens, as far as the attention modules say."""
    return any(getattr(module, "is_causal", True) is False for module in body.modules())


def longest_packable(config: PreTrainedConfig, body: nn.Module) -> int | None:
    """Longest prompt plus response that packing serves exactly, None for any.

    A sliding window does no harm while it spans the whole sequence. Raises ValueError for models in which a
    position is not given by `position_ids`, or which are not attention throughout.
    """
    remedy = "set packing = false for this model"
    if "position_ids" not in inspect.signature(body.forward).parameters or getattr(config, "alibi", False):
        raise ValueError(
            f"{config.model_type} takes no position ids, which shared-prefix packing needs; {remedy}"
        )
    if attends_ahead(body):
        raise ValueError(
            f"{config.model_type} attends in both directions, shared prefixes need causal attention; {remedy}"
        )
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if unknown := kinds - {"full_attention", "sliding_attention"}:
        raise ValueError(
            f"{config.model_type} has {', '.join(sorted(unknown))} layers, which cannot be packed; {remedy}"
        )
    others = ("layers_block_type", "attention_chunk_size")
    if any(getattr(config, name, None) for name in others) or "local" in getattr(
        config, "attention_layers", ()
    ):
        raise ValueError(
            f"{config.model_type} is not full attention throughout and cannot be packed; {remedy}"
        )
    window = getattr(config, "sliding_window", None)
    slides = "sliding_attention" in kinds or (window and not getattr(config, "layer_types", None))
    return int(window) if slides and window and getattr(config, "use_sliding_window", True) else None
