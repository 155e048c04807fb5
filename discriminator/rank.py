"""The discriminator trainer's commands, as one rank of its training group executes them.

Tables arrive as object references; every rank gets whole tables and takes its share. Rank 0 publishes: the
state goes into the object store, its reference and checksum into the version store.
"""

import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray

from discriminator.config import DiscriminatorConfig
from discriminator.exported import write_exported
from discriminator.trainer import DiscriminatorTrainer
from learner.memory import memory_mib
from learner.trainer import FETCH_S
from learner.written import written


class DiscriminatorRank:
    """Handler of one discriminator rank (see `learner.trainer`). `versions` is the version store's actor."""

    def __init__(
        self,
        *,
        rank: int,
        ranks: int,
        config: DiscriminatorConfig,
        model: str,
        model_dtype: str,
        versions: Any,
        publish_timeout_s: float,
        seed: int,
    ) -> None:
        self.rank = rank
        self.model = model
        self.model_dtype = model_dtype
        self.versions = versions
        self.publish_timeout_s = publish_timeout_s
        self.trainer = DiscriminatorTrainer(config, model, model_dtype=model_dtype, seed=seed)
        self._gave = False
        self._given: tuple[str, list[Any]] | None = None
        """Checksum and payload last published from here; rank 0 only."""

    def warm_up(
        self,
        rollouts: "ray.ObjectRef[pa.Table]",
        demonstrations: "ray.ObjectRef[pa.Table]",
        heldout: "ray.ObjectRef[pa.Table]",
        heldout_rollouts: "ray.ObjectRef[pa.Table]",
    ) -> dict[str, float]:
        """Train on base rollouts up to the configured held-out accuracy and publish version 0."""
        tables = ray.get([rollouts, demonstrations, heldout, heldout_rollouts], timeout=FETCH_S)
        metrics = self.trainer.warm_up(*tables)
        self._publish(0)
        return metrics

    def turn(
        self,
        rollouts: "ray.ObjectRef[pa.Table]",
        demonstrations: "ray.ObjectRef[pa.Table]",
        fresh: "ray.ObjectRef[pa.Table]",
        heldout: "ray.ObjectRef[pa.Table]",
        step: int,
    ) -> dict[str, Any]:
        """The turn of policy step `step`: judge held-out demonstrations against rollouts not trained on yet,
        make the steps that the health gate allows, publish version step + 1. With the trainer's metrics come
        `tokens_per_s`, trained in the seconds of these steps, where there were any, and this rank's memory.
        """
        tables = ray.get([heldout, fresh, rollouts, demonstrations], timeout=FETCH_S)
        apart, sampled, fetched, known = tables
        held = self.trainer.evaluate(apart, sampled, step)
        began = time.perf_counter()
        trained = self.trainer.update(fetched, known, step)
        if "tokens_trained" in trained:
            trained["tokens_per_s"] = trained["tokens_trained"] / (time.perf_counter() - began)
        self._publish(step + 1)
        judged = {f"{name}_heldout": value for name, value in held.items()}
        changes = [
            f"{t['side']} {t['before']} -> {t['after']}: {t['reason']}"
            for t in self.trainer.take_transitions()
        ]
        told = {"transition": "; ".join(changes)} if changes else {}
        return {**trained, **judged, **told, "memory_mib": memory_mib()}

    def save(self, folder: str) -> str:
        """Write the discriminator's part of a checkpoint; returns why that could not be, or nothing."""
        return written(lambda: self.trainer.save(folder))

    def load(self, folder: str, version: int | None) -> None:
        """Continue from a checkpoint and publish its weights as `version` (None: with the next turn)."""
        self.trainer.load(folder)
        self._gave = False
        if version is not None:
            self._publish(version)

    def export(self, folder: str) -> None:
        """Write the present weights as a folder that a scoring service can load; `discriminator.exported`."""
        published = self.trainer.publish()
        if published is not None:
            write_exported(Path(folder), published, self.trainer.config, self.model, self.model_dtype)

    def memory(self) -> dict[str, float]:
        """Resident (and CUDA) memory of this rank in MiB."""
        return memory_mib()

    def _publish(self, version: int) -> None:
        if self.trainer.changed or not self._gave:
            published = self.trainer.publish()
            self._gave = True
            if published is not None:
                self._given = published.checksum, [ray.put(published.state)]
        if self._given is not None:  # weights that did not change are given again, under the new number
            ray.get(self.versions.publish.remote(version, *self._given), timeout=self.publish_timeout_s)
