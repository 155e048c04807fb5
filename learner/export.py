"""A trained model's weights as those of a plain transformers model: whole, adapters merged."""

import copy
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PreTrainedModel

from learner import lora
from learner.engine import TrainableModel
from rollout.files import readable


def plain_weights(
    model: PreTrainedModel,
    trainable: TrainableModel,
    dtype: torch.dtype,
    each: Callable[[str, torch.Tensor], None],
) -> None:
    """Call `each(name, tensor)` with every weight of the plain model, whole, adapters merged, in `dtype`.

    Collective: all ranks call it and all see every weight, one at a time. Tied weights come once, under
    their first name.
    """
    for weight in lora.plain_weights(model):
        with trainable.gathered(weight.sources()):
            each(weight.name, weight.value().to(dtype))


def export_plain(
    model: PreTrainedModel, trainable: TrainableModel, dtype: torch.dtype, folder: Path | str
) -> None:
    """Write a plain transformers folder; collective, rank 0 writes."""
    state: dict[str, torch.Tensor] = {}

    def keep(name: str, tensor: torch.Tensor) -> None:
        if trainable.rank == 0:
            state[name] = tensor.to("cpu", copy=True).contiguous()

    plain_weights(model, trainable, dtype, keep)
    if trainable.rank == 0:
        plain = _skeleton(model, dtype)
        kept = plain.state_dict().keys()
        state |= {name: buffer.cpu() for name, buffer in model.named_buffers() if name in kept}
        plain.load_state_dict(state, strict=False, assign=True)
        plain.tie_weights()
        if left := [name for name, tensor in plain.named_parameters() if tensor.is_meta]:
            raise RuntimeError(f"export lacks {len(left)} weights, among them {left[0]}")
        plain.save_pretrained(folder)
        readable(Path(folder))
    torch.distributed.barrier()


def _skeleton(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """A model of the same class without weights, to save under."""
    # save_pretrained writes into the configuration, and the policy goes on computing with its own.
    config = copy.deepcopy(model.config)
    config.dtype = dtype
    with torch.device("meta"):
        return type(model)(config)
