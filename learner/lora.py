"""Low-rank adapters (Hu et al. 2021) through peft: attach, switch off for the reference, and merge for
export."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft import LoraConfig as PeftLora
from peft import get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel

from learner.config import LoraConfig


def attach(model: PreTrainedModel, config: LoraConfig) -> PreTrainedModel:
    """Put adapters into `model` in place, freeze its own weights and return it. With rank 0 nothing
    happens."""
    if config.rank == 0:
        return model
    wrapped = get_peft_model(
        model,
        PeftLora(
            r=config.rank,
            lora_alpha=config.alpha,  # type: ignore[arg-type]
            target_modules=config.target_modules,
            lora_dropout=0.0,
            bias="none",
        ),
    )
    return cast(PreTrainedModel, wrapped.get_base_model())


def adapters(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Adapted layers (modules that are also peft's `LoraLayer`) by name."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield name, module


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Within this block the model computes what it did before adapters were attached."""
    layers = [layer for _, layer in adapters(model)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def merged_name(name: str) -> str | None:
    """Name that a parameter of an adapted model has in the plain model, None for adapter weights."""
    if ".lora_" in name:
        return None
    return name.replace(".base_layer.", ".")


def merged_weight(layer: Any) -> torch.Tensor:
    """Weight of an adapted linear layer with its adapter folded in: W + (alpha / r) B A, in W's dtype,
    detached.

    All three matrices must be present on this rank (gathered, under ZeRO-3).
    """
    base = layer.get_base_layer().weight.detach()
    delta = torch.zeros_like(base, dtype=torch.float32)
    for adapter in layer.active_adapters:
        a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        delta += layer.scaling[adapter] * (b.detach().float() @ a.detach().float())
    return (base.float() + delta).to(base.dtype)
