"""The weights of a model in training at one moment, kept in memory to come back to."""

from pathlib import Path

import torch

from learner.engine import TrainableModel
from learner.whole_state import (
    MASTER,
    WholeFiles,
    own_share,
    read_whole,
    trained_weights,
    whole_shape,
    write_files,
    write_whole,
)


class Snapshot:
    """The fp32 masters of all trained weights, on the CPU. Optimizer states are not kept.

        kept = Snapshot()
        kept.take(trainable)        # the best so far
        kept.restore(trainable)     # masters and weights are what they were; moments and schedule go on

    Every rank keeps a share of the names. `take`, `restore` and `load` are collective.
    """

    def __init__(self) -> None:
        self.taken = False
        """Whether there is something to restore."""
        self._masters: dict[str, torch.Tensor] = {}

    def take(self, trainable: TrainableModel) -> None:
        """Keep the present weights instead of those kept before."""
        weights = trained_weights(trainable.module)
        self._masters = dict(own_share((name, read_whole(weight, MASTER)) for name, weight in weights))
        self.taken = True

    def restore(self, trainable: TrainableModel) -> None:
        """Make the kept weights the present ones.

        Raises:
            ValueError: nothing was kept, or it belongs to another model.
        """
        weights = trained_weights(trainable.module)
        if (
            not self.taken
            or [*self._masters] != [name for name, _ in weights][trainable.rank :: trainable.ranks]
        ):
            raise ValueError("no snapshot of this model's weights was taken")
        for number, (name, weight) in enumerate(weights):
            kept = self._masters.get(name)
            whole = torch.empty(whole_shape(weight)) if kept is None else kept
            whole = whole.to(trainable.device, copy=True)
            torch.distributed.broadcast(whole, src=number % trainable.ranks)
            write_whole(weight, MASTER, whole)

    def save(self, folder: Path) -> None:
        """Write this rank's share."""
        folder.mkdir(parents=True, exist_ok=True)
        write_files(folder, self._masters.items())

    def load(self, folder: Path, trainable: TrainableModel) -> None:
        """Become what the `save` of all ranks wrote, however many they were.

        Raises:
            ValueError: it belongs to another model.
        """
        files = WholeFiles(folder)
        weights = trained_weights(trainable.module)
        self._masters = {
            name: files.read(name, whole_shape(weight))
            for name, weight in weights[trainable.rank :: trainable.ranks]
        }
        self.taken = True
