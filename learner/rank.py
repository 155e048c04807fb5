"""The learner's commands, as one rank of its training group executes them.

Every command runs on all ranks. Tables and handles arrive as object references; results are small and picklable, and
only rank 0's are read where all ranks would return the same.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from learner.config import LearnerConfig
from learner.policy import PolicyLearner
from learner.weight_sender import WeightSender, WeightSyncError
from rollout.config import PolicyConfig, RolloutConfig

Seconds = dict[str, float]


class LearnerRank:
    """Handler of one learner rank (see `learner.trainer`)."""

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
    ) -> None:
        self.rank = rank
        self.rollout = rollout
        self.policy = policy
        self.learner = PolicyLearner(
            policy.model,
            learner,
            temperature=temperature,
            model_dtype=policy.dtype,
            trust_remote_code=policy.trust_remote_code,
            seed=seed,
        )
        self.sender: WeightSender | None = None

    def train_step(self, table: "ray.ObjectRef[pa.Table]", step: int) -> dict[str, float]:
        """One policy update on scored trajectories; see `PolicyLearner.train_step`."""
        return self.learner.train_step(ray.get(table), step)

    def connect(self, workers: list[Any], worlds: list[int]) -> None:
        """Form the weight-transfer group with these rollout workers; a former group is left."""
        if self.sender is not None:
            self.sender.close()
        self.sender = WeightSender(self.learner, workers, worlds, self.rollout, rank=self.rank)
        self.sender.connect()

    def sync(self, version: int) -> dict[str, Any]:
        """Broadcast the weights as `version`. A failure of workers is an answer, not an exception: the learner is
        well and the controller replaces them. Returns timings, or `failed` worker indices and `error`."""
        assert self.sender is not None, "connect() first"
        try:
            return {"failed": [], **self.sender.send(version)}
        except WeightSyncError as error:
            return {"failed": error.workers, "error": str(error)}

    def mean_nll(self, table: "ray.ObjectRef[pa.Table]") -> float:
        """Mean negative log-likelihood, nats per token, of the responses in a table of prompt_ids, response_ids."""
        rows = self.learner.response_logprobs(ray.get(table))
        return -float(np.concatenate(rows).mean())

    def response_logprobs(self, table: "ray.ObjectRef[pa.Table]") -> list[np.ndarray]:
        """Log-probability of every response token; see `PolicyLearner.response_logprobs`."""
        return self.learner.response_logprobs(ray.get(table))

    def save(self, folder: str) -> None:
        """Write the learner's part of a checkpoint."""
        self.learner.save(Path(folder))

    def load(self, folder: str) -> None:
        """Continue from the learner's part of a checkpoint."""
        self.learner.load(Path(folder))

    def export(self, folder: str) -> None:
        """Write the policy as a plain Hugging Face folder, tokenizer included."""
        self.learner.export(Path(folder))
        if self.rank == 0:
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(
                self.policy.model, trust_remote_code=self.policy.trust_remote_code
            )
            tokenizer.save_pretrained(folder)

    def memory(self) -> dict[str, float]:
        """Resident (and CUDA) memory of this rank in MiB."""
        return memory_mib()


def memory_mib() -> dict[str, float]:
    """Resident memory of this process, and its CUDA peak where it uses CUDA, in MiB."""
    import psutil
    import torch

    memory = {"rss": psutil.Process().memory_info().rss / 2**20}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        memory["cuda_peak"] = torch.cuda.max_memory_allocated() / 2**20
    return memory
