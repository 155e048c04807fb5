"""The learner's commands, as one rank of its training group executes them.

Every command runs on all ranks. Tables and handles arrive as object references; results are small and
picklable, and only rank 0's are read where all ranks would return the same.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import ray

from learner.config import LearnerConfig
from learner.gumbel_update import Judge
from learner.memory import memory_mib
from learner.policy import PolicyLearner
from learner.snapshot import Snapshot
from learner.supervised import supervised_step
from learner.trainer import FETCH_S
from learner.weight_client import WeightSyncError, WorkerRef
from learner.written import written
from rollout.config import PolicyConfig, RolloutConfig
from rollout.engine import transfer_backend
from rollout.templates import end_of_response_id, eos_ids, load_tokenizer

if TYPE_CHECKING:
    from learner.weight_sender import WeightSender

KEPT = "kept"


class LearnerRank:
    """Handler of one learner rank (see `learner.trainer`). `judge` makes the judge of `learner.gumbel`."""

    def __init__(
        self,
        *,
        rank: int,
        ranks: int,
        learner: LearnerConfig,
        policy: PolicyConfig,
        rollout: RolloutConfig,
        temperature: float,
        seed: int,
        judge: Callable[[], Judge] | None = None,
    ) -> None:
        self.rank = rank
        self.ranks = ranks
        self.rollout = rollout
        self.policy = policy
        self.learner = PolicyLearner(
            policy.model,
            learner,
            temperature=temperature,
            model_dtype=policy.dtype,
            trust_remote_code=policy.trust_remote_code,
            seed=seed,
            judge=None if judge is None else judge(),
        )
        self.version = 0  # of the weights
        self.sender: WeightSender | None = None
        self.kept = Snapshot()

    def train_step(self, table: "ray.ObjectRef[pa.Table]", step: int, lr_factor: float) -> dict[str, Any]:
        """One policy update on scored trajectories; `PolicyLearner.train_step`'s metrics, response tokens per
        second and this rank's memory.
        """
        metrics = self.learner.train_step(ray.get(table, timeout=FETCH_S), step, lr_factor)
        self.version = step + 1
        return _told(metrics)

    def supervised_step(self, table: "ray.ObjectRef[pa.Table]") -> dict[str, Any]:
        """One supervised update on examples; `supervised_step`'s metrics, answer tokens per second and this
        rank's memory."""
        return _told(
            supervised_step(self.learner.trainable, self.learner.cfg, ray.get(table, timeout=FETCH_S))
        )

    def keep(self) -> None:
        """Remember the present weights instead of those remembered before."""
        self.kept.take(self.learner.trainable)

    def restore(self) -> None:
        """Go back to the weights that were remembered last."""
        self.kept.restore(self.learner.trainable)

    def connect(self, workers: list[Any], worlds: list[int]) -> dict[str, Any]:
        """Form the weight-transfer group with these rollout workers (actor handle and TP x PP of each); a
        former group is left. Answers like `sync`, without timings.
        """
        refs = [
            WorkerRef(i, handle, world) for i, (handle, world) in enumerate(zip(workers, worlds, strict=True))
        ]
        if self.sender is None:
            self.sender = self._make_sender(refs)
        try:
            self.sender.connect(refs)
        except WeightSyncError as error:
            return _failed(error)
        return {"replace": []}

    def _make_sender(self, workers: list[WorkerRef]) -> "WeightSender":
        # Here, because vLLM takes seconds and 300 MB to import: the controller knows this class too.
        from learner.weight_sender import WeightSender
        from learner.weight_source import MIB, ModuleWeights

        source = ModuleWeights(
            self.learner.module,
            dtype=self.learner.export_dtype,
            gather_bytes=self.rollout.sync_bucket_mib * MIB,
        )
        return WeightSender(
            source,
            workers,
            backend=transfer_backend("cuda" if self.learner.device.type == "cuda" else "cpu"),
            rank=self.rank,
            world_size=self.ranks,
            deadline_s=self.rollout.sync_timeout_s,
            bucket_bytes=self.rollout.sync_bucket_mib * MIB,
        )

    def sync(self, version: int | None) -> dict[str, Any]:
        """Broadcast the weights as `version`, by default the one they have: whoever replaces a worker does
        not know whether an update comes first. Raises FloatingPointError before anything is sent when some
        are not finite. A failure of workers is an answer, not an exception: the
        learner is well, and the controller replaces them. Returns timings, or the indices of workers to
        replace and `error`.
        """
        assert self.sender is not None, "connect() first"
        self.learner.trainable.require_finite()
        if version is not None:
            self.version = version
        try:
            return {"replace": [], **self.sender.send(self.version)}
        except WeightSyncError as error:
            return _failed(error)

    def response_logprobs(self, table: pa.Table) -> tuple[int, list[np.ndarray]]:
        """Version of the weights, and under them the log-probability of each token of each response."""
        return self.version, self.learner.response_logprobs(table)

    def response_nll(self, table: "ray.ObjectRef[pa.Table]") -> np.ndarray:
        """Negative log-likelihood, nats, of each response in a table of prompt_ids, response_ids: float64
        [rows].
        """
        return self.learner.response_nll(ray.get(table, timeout=FETCH_S))

    def save(self, folder: str) -> str:
        """Write the learner's part of a checkpoint; returns why that could not be, or nothing."""
        return written(lambda: self._save(folder))

    def _save(self, folder: str) -> None:
        self.learner.save(Path(folder))
        if self.kept.taken:
            self.kept.save(Path(folder) / KEPT)

    def load(self, folder: str) -> None:
        """Continue from the learner's part of a checkpoint."""
        self.learner.load(Path(folder))
        if (Path(folder) / KEPT).is_dir():
            self.kept.load(Path(folder) / KEPT, self.learner.trainable)

    def export(self, folder: str) -> None:
        """Write a plain Hugging Face folder, tokenizer included; its `generate` stops where training did.
        Raises FloatingPointError for weights that are not finite."""
        self.learner.trainable.require_finite()
        self.learner.export(Path(folder))
        if self.rank == 0:
            from transformers import GenerationConfig

            tokenizer = load_tokenizer(self.policy)
            tokenizer.save_pretrained(folder)
            generation = GenerationConfig.from_pretrained(folder)
            ends = eos_ids(self.learner.module.config, self.policy.model, tokenizer)
            every = sorted(ends | {end_of_response_id(tokenizer, self.policy)})
            generation.eos_token_id = every if len(every) > 1 else every[0]
            generation.save_pretrained(folder)

    def memory(self) -> dict[str, float]:
        """Resident (and CUDA) memory of this rank in MiB."""
        return memory_mib()


def _failed(error: WeightSyncError) -> dict[str, Any]:
    return {"replace": sorted({*error.broken, *error.failures}), "error": str(error)}


def _told(metrics: dict[str, float]) -> dict[str, Any]:
    rate = metrics["tokens_response"] / metrics["seconds_step"]
    return metrics | {"tokens_per_s": rate, "memory_mib": memory_mib()}
