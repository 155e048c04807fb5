"""A model's training state as whole fp32 tensors by parameter name: the same for every ZeRO stage and number
of ranks, in memory and in files. Rank r keeps and writes every n-th tensor, so that no rank holds all.

The files are safetensors: reading them runs nothing, whoever wrote them.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

MASTER = "master"
MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's, by its own names."""
PARTS = (MASTER, *MOMENTS)
FILE_BYTES = 1 << 30


def trained_weights(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Names and parameters that an optimizer changes, in the order of the module."""
    return [(name, weight) for name, weight in module.named_parameters() if weight.requires_grad]


def whole_shape(weight: nn.Parameter) -> tuple[int, ...]:
    """Shape of a parameter, which under ZeRO-3 is not that of its tensor."""
    return tuple(getattr(weight, "ds_shape", weight.shape))


def read_whole(weight: nn.Parameter, part: str) -> torch.Tensor:
    """One of `PARTS` of a trained parameter, fp32 on its device, on every rank; collective."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if part == MASTER:
        return safe_get_full_fp32_param(weight)  # type: ignore[no-any-return]
    return safe_get_full_optimizer_state(weight, part)  # type: ignore[no-any-return]


@torch.no_grad()
def write_whole(weight: nn.Parameter, part: str, value: torch.Tensor) -> None:
    """Set one of `PARTS` from its whole value, given on every rank; the master sets the weight too.
    Collective."""
    import deepspeed
    from deepspeed import utils

    if not hasattr(weight, "ds_id"):
        if part != MASTER:
            utils.safe_set_full_optimizer_state(weight, value, part)
            return
        utils.safe_set_full_fp32_param(weight, value)
        weight.copy_(value)
        return
    own = _own_shard(weight, value)
    if part != MASTER:
        utils.safe_set_local_optimizer_state(weight, own, part)
        return
    utils.safe_set_local_fp32_param(weight, own)
    with deepspeed.zero.GatheredParameters([weight], modifier_rank=0):
        weight.copy_(value)


def _own_shard(weight: Any, value: torch.Tensor) -> torch.Tensor:
    """This rank's part of a whole value under ZeRO-3, whose last shards are padded."""
    size, rank = weight.ds_tensor.numel(), torch.distributed.get_rank()
    shard = value.flatten()[rank * size : (rank + 1) * size]
    return functional.pad(shard, (0, size - shard.numel()))


def own_share(tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """CPU copies of those of all tensors that this rank keeps. To be run to its end where reading them is
    collective."""
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    for number, (name, tensor) in enumerate(tensors):
        if number % ranks == rank:
            yield name, tensor.detach().to("cpu", copy=True).contiguous()


def write_files(folder: Path, share: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Write this rank's share into files of about `FILE_BYTES` each."""
    held: dict[str, torch.Tensor] = {}
    number = size = 0
    name = f"rank-{torch.distributed.get_rank()}"
    for key, tensor in share:
        held[key] = tensor
        size += tensor.nbytes
        if size >= FILE_BYTES:
            save_file(held, folder / f"{name}-{number:04d}.safetensors")
            held, size, number = {}, 0, number + 1
    if held:
        save_file(held, folder / f"{name}-{number:04d}.safetensors")


def read_json(file: Path) -> Any:
    """Raises ValueError, which names the file, where it is no JSON."""
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} is missing or no JSON ({error}); use an older checkpoint") from None


class WholeFiles:
    """What the `write_files` of all ranks wrote into a folder, read tensor by tensor.

    Raises:
        ValueError: a file is no safetensors file; the message names it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, Any] = {}
        for file in sorted(folder.glob("rank-*.safetensors")):
            try:
                opened = safe_open(file, framework="pt")
                self._files |= dict.fromkeys(opened.keys(), opened)
            except (SafetensorError, OSError) as error:
                raise ValueError(
                    f"{file} is no safetensors file ({error}); use an older checkpoint"
                ) from None

    def tensors(self) -> dict[str, torch.Tensor]:
        """All of them, in memory."""
        return {name: file.get_tensor(name) for name, file in self._files.items()}

    def read(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """A tensor on the CPU. Raises ValueError where it is missing or of another shape."""
        if name not in self._files:
            raise ValueError(f"{self.folder} holds no {name}: it is of another model, or not whole")
        value: torch.Tensor = self._files[name].get_tensor(name)
        if tuple(value.shape) != shape:
            raise ValueError(
                f"{self.folder}: {name} has shape {list(value.shape)}, this model's has {list(shape)}"
            )
        return value
