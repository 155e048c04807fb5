"""The weights of a model in training at one moment, kept in memory to come back to."""

from pathlib import Path

import torch
from torch import nn

from learner.engine import TrainableModel


class Snapshot:
    """The fp32 masters of all trained weights, on the CPU. Optimizer states are not kept.

        kept = Snapshot()
        kept.take(trainable)        # the best so far
        kept.restore(trainable)     # masters and weights are what they were; moments and schedule go on

    Every rank keeps a part: under ZeRO-3 its shard, otherwise all. `take` and `restore` are collective.
    """

    def __init__(self) -> None:
        self._masters: dict[str, torch.Tensor] = {}

    @property
    def taken(self) -> bool:
        """Whether there is something to restore."""
        return bool(self._masters)

    def take(self, trainable: TrainableModel) -> None:
        """Keep the present weights instead of those kept before."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_local_fp32_param

        read = safe_get_local_fp32_param if trainable.cfg.zero_stage == 3 else safe_get_full_fp32_param
        self._masters = {
            name: read(weight).detach().to("cpu", torch.float32, copy=True)
            for name, weight in _trained(trainable)
        }

    @torch.no_grad()
    def restore(self, trainable: TrainableModel) -> None:
        """Make the kept weights the present ones.

        Raises:
            ValueError: nothing was kept, or it belongs to another model.
        """
        import deepspeed
        from deepspeed.utils import (
            safe_get_full_fp32_param,
            safe_set_full_fp32_param,
            safe_set_local_fp32_param,
        )

        weights = _trained(trainable)
        if [name for name, _ in weights] != list(self._masters):
            raise ValueError("no snapshot of this model's weights was taken")
        sharded = trainable.cfg.zero_stage == 3
        for name, weight in weights:
            kept = self._masters[name].to(trainable.device)
            if not sharded:
                safe_set_full_fp32_param(weight, kept)
                weight.copy_(kept)
                continue
            safe_set_local_fp32_param(weight, kept)
            whole = safe_get_full_fp32_param(weight)
            with deepspeed.zero.GatheredParameters([weight], modifier_rank=0):
                if trainable.rank == 0:
                    weight.copy_(whole)

    def save(self, file: Path) -> None:
        """Write this rank's part."""
        torch.save(self._masters, file)

    def load(self, file: Path) -> None:
        """Become what `save` wrote on a rank with the same part."""
        self._masters = torch.load(file)


def _trained(trainable: TrainableModel) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in trainable.module.named_parameters() if p.requires_grad]
