"""Low-rank adapters (Hu et al. 2021) through peft: attach, switch off for the reference, and fold into the
weights of the plain model.

Invariant: an adapted layer computes with the very weight that is sent, published and exported, the adapter
folded into W and rounded to the dtype in which it is sent. Computed beside W, as usual, the adapter is more
exact than what a sampler can hold, and in bfloat16 the difference grows with it. What cannot be folded so is
refused when adapters are attached, which needs no weights: a model on torch's `meta` device will do.
"""

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from peft import LoraConfig as PeftLora
from peft import get_peft_model
from peft.tuners.lora import Linear, LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from learner.config import LoraConfig

_LINEAR = (nn.Linear.forward, Conv1D.forward)


def attach(model: PreTrainedModel, config: LoraConfig, *, sent: torch.dtype) -> PreTrainedModel:
    """Put adapters into `model` in place, freeze its own weights, rounded as they are sent, and return it.
    With rank 0 nothing happens. `sent`: dtype in which its weights leave the process.

    Raises ValueError, which begins with `lora.target_modules`, for a name that the model has not and for
    modules whose adapter cannot be folded into one weight.
    """
    if config.rank == 0:
        return model
    foldable = _foldable(model)
    _refuse_named(model, config.target_modules, foldable)
    adapter = PeftLora(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]
        target_modules=config.target_modules,
        lora_dropout=0.0,
        bias="none",
    )
    adapter._register_custom_module({nn.Linear: FoldedLayer, Conv1D: FoldedLayer})
    adapted = cast(PreTrainedModel, get_peft_model(model, adapter).get_base_model())
    _refuse_unfoldable({name: layer.get_base_layer() for name, layer in adapters(adapted)}, foldable)
    for _, layer in adapters(adapted):
        layer.sent = sent
    with torch.no_grad():
        for weight in adapted.parameters():
            if not weight.requires_grad:
                weight.copy_(weight.to(sent))
    return adapted


class FoldedLayer(Linear):  # type: ignore[misc]
    """A linear layer that multiplies by W + (alpha / r) B A, rounded to the dtype in which it is sent.

    Its base is an `nn.Linear` or GPT-2's `Conv1D`, whose weight is [in, out] instead of [out, in].
    """

    sent: torch.dtype

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[..., out] for x [..., in]; what W alone gives while adapters are off."""
        if self.disable_adapters:
            return self.get_base_layer()(x)
        return _Folded.apply(x, self.get_base_layer().bias, *self.fold_arguments())  # type: ignore[no-any-return]

    def fold_arguments(self) -> tuple[Any, ...]:
        """What `_folded` takes."""
        (name,) = self.active_adapters
        base = self.get_base_layer()
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        return base.weight, a, b, self.scaling[name], self.sent, isinstance(base, Conv1D)


class _Folded(torch.autograd.Function):
    """x (W + s B A)^T + bias. Gradients of A and B go through the low rank and pass over the rounding; the
    folded weight is made again for the backward pass, so that no copy of the model's weights is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor, *fold: Any) -> Tensor:
        weight, a, b, *ctx.rest = fold
        ctx.save_for_backward(x, weight, a, b)
        return nn.functional.linear(x, _rows_out(*fold), bias)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b = ctx.saved_tensors
        s, *_ = ctx.rest
        into_x = slope @ _rows_out(weight, a, b, *ctx.rest) if ctx.needs_input_grad[0] else None
        slopes, rows = slope.flatten(0, -2), x.flatten(0, -2)
        into_a, into_b = s * ((slopes @ b).T @ rows), s * (slopes.T @ (rows @ a.T))
        return into_x, None, None, into_a, into_b, None, None, None


def _rows_out(*fold: Any) -> Tensor:
    """The folded weight as [out, in]."""
    whole = _folded(*fold)
    return whole.T if fold[-1] else whole


def _folded(
    weight: Tensor, a: Tensor, b: Tensor, scaling: float, sent: torch.dtype, transposed: bool
) -> Tensor:
    left, right = (a.T, b.T) if transposed else (b, a)
    if weight.dtype == a.dtype == sent:  # sums in float32 and rounds once, at the end
        return torch.addmm(weight, left, right, alpha=scaling)
    whole = torch.addmm(weight.float(), left.float(), right.float(), alpha=scaling)
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


class PlainWeight(NamedTuple):
    """A weight of the plain model: its name there, its parameter (or buffer), and the adapter to be folded
    into it."""

    name: str
    parameter: Tensor
    adapted: FoldedLayer | None

    def sources(self) -> list[Tensor]:
        """All parameters that its value is made of."""
        return [self.parameter] if self.adapted is None else list(self.adapted.parameters())

    def value(self) -> Tensor:
        """Detached, with its adapter folded in, in the parameter's dtype; its sources must be whole on this
        rank (gathered, under ZeRO-3)."""
        return self.parameter.detach() if self.adapted is None else merged_weight(self.adapted)


def plain_weights(model: nn.Module) -> list[PlainWeight]:
    """Every weight that the model has without adapters, in order; tied ones once, under their first name."""
    layers = dict(adapters(model))
    found = []
    for name, parameter in model.named_parameters():
        owner, _, own = name.rpartition(".base_layer.")
        if owner in layers:
            found.append(PlainWeight(f"{owner}.{own}", parameter, layers[owner] if own == "weight" else None))
        elif name.partition(".lora_")[0] not in layers:
            found.append(PlainWeight(name, parameter, None))
    return found


def merged_weight(layer: FoldedLayer) -> Tensor:
    """Weight of an adapted layer with its adapter folded in: W + (alpha / r) B A, rounded as it is sent, in
    W's dtype and shape, detached.

    All three matrices must be present on this rank (gathered, under ZeRO-3).
    """
    with torch.no_grad():
        return _folded(*layer.fold_arguments())


def _foldable(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Modules by name that can hold an adapter: linear layers that are called, and share no weight."""
    head, owners = model.get_output_embeddings(), Counter[int]()
    for _, parameter in model.named_parameters(remove_duplicate=False):
        owners[id(parameter)] += 1
    return {
        name: module
        for name, module in model.named_modules()
        if (type(module).forward in _LINEAR or type(module).__name__ == "FalconLinear")
        and module is not head
        and owners[id(module.weight)] == 1
    }


def _refuse_named(model: nn.Module, targets: list[str] | str, foldable: dict[str, nn.Module]) -> None:
    """ValueError for a name that is no module of the model, or one that can hold no adapter."""
    modules = dict(model.named_modules())
    for target in targets if isinstance(targets, list) else ():
        named = {name: module for name, module in modules.items() if f".{name}".endswith(f".{target}")}
        if not named:
            raise ValueError(
                f"lora.target_modules: {type(model).__name__} has no module {target!r}; "
                f"choose among {_last_parts(foldable)}"
            )
        _refuse_unfoldable(named, foldable)


def _refuse_unfoldable(chosen: dict[str, nn.Module], foldable: dict[str, nn.Module]) -> None:
    """ValueError for an adapter that is no part of one weight that is computed with as well as sent."""
    remedy = _last_parts({name: module for name, module in chosen.items() if name in foldable} or foldable)
    for name in sorted(chosen.keys() - foldable.keys()):
        raise ValueError(
            f"lora.target_modules: no adapter can be folded into {name.removesuffix('.base_layer')} "
            f"({type(chosen[name]).__name__}), only into linear layers that share no weight and are not the "
            f"output layer; set it to {remedy}"
        )


def _last_parts(modules: dict[str, nn.Module]) -> str:
    """Last parts of the modules' names, as a list in TOML."""
    return json.dumps(list(dict.fromkeys(name.rpartition(".")[2] for name in modules)))
