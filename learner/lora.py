"""Low-rank adapters (Hu et al. 2021) through peft: attach, switch off for the reference, and merge for
export.

Invariant: an adapted layer computes with the very weight that is sent and exported, the adapter folded into
W and rounded to the dtype in which it is sent. Computed beside W, as usual, the adapter is more exact than
what a sampler can hold, and in bfloat16 the difference grows with it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft import LoraConfig as PeftLora
from peft import get_peft_model
from peft.tuners.lora import Linear, LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from learner.config import LoraConfig


def attach(model: PreTrainedModel, config: LoraConfig, *, sent: torch.dtype) -> PreTrainedModel:
    """Put adapters into `model` in place, freeze its own weights and return it. With rank 0 nothing
    happens. `sent`: dtype in which its weights leave the process."""
    if config.rank == 0:
        return model
    adapter = PeftLora(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]
        target_modules=config.target_modules,
        lora_dropout=0.0,
        bias="none",
    )
    adapter._register_custom_module({nn.Linear: FoldedLinear})
    adapted = cast(PreTrainedModel, get_peft_model(model, adapter).get_base_model())
    for _, layer in adapters(adapted):
        layer.sent = sent
    return adapted


class FoldedLinear(Linear):  # type: ignore[misc]
    """A linear layer that multiplies by W + (alpha / r) B A, rounded to the dtype in which it is sent."""

    sent: torch.dtype

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[..., out] for x [..., in]; what W alone gives while adapters are off."""
        base = self.get_base_layer()
        if self.disable_adapters:
            return base(x)
        (name,) = self.active_adapters
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        s = self.scaling[name]
        return _Folded.apply(x, base.weight, base.bias, a, b, s, self.sent)  # type: ignore[no-any-return]


class _Folded(torch.autograd.Function):
    """x (W + s B A)^T + bias. Gradients of A and B go through the low rank and pass over the rounding; the
    folded weight is made again for the backward pass, so that no copy of the model's weights is kept."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, a: Tensor, b: Tensor, s: float, sent: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(x, weight, a, b)
        ctx.scaling, ctx.sent = s, sent
        return nn.functional.linear(x, _folded(weight, a, b, s, sent), bias)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b = ctx.saved_tensors
        s = ctx.scaling
        into_x = slope @ _folded(weight, a, b, s, ctx.sent) if ctx.needs_input_grad[0] else None
        slopes, rows = slope.flatten(0, -2), x.flatten(0, -2)
        return into_x, None, None, s * ((slopes @ b).T @ rows), s * (slopes.T @ (rows @ a.T)), None, None


def _folded(weight: Tensor, a: Tensor, b: Tensor, scaling: float, sent: torch.dtype) -> Tensor:
    if weight.dtype == a.dtype == sent:  # sums in float32 and rounds once, at the end
        return torch.addmm(weight, b, a, alpha=scaling)
    whole = torch.addmm(weight.float(), b.float(), a.float(), alpha=scaling)
    return whole.to(sent).to(weight.dtype)


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
    """Weight of an adapted linear layer with its adapter folded in: W + (alpha / r) B A, rounded as it is
    sent, in W's dtype, detached.

    All three matrices must be present on this rank (gathered, under ZeRO-3).
    """
    (name,) = layer.active_adapters
    with torch.no_grad():
        return _folded(
            layer.get_base_layer().weight,
            layer.lora_A[name].weight,
            layer.lora_B[name].weight,
            layer.scaling[name],
            layer.sent,
        )
