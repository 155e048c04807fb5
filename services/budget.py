"""What a run spent, counted alike for every method: tokens by who computed them, seconds by phase.

A prompt counts once for all the responses that share its computation. Evaluations and the shortcut audit, the
same for every method, are in the seconds only.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from learner.config import LearnerConfig


@dataclass
class Budget:
    """Tokens of a whole run."""

    rollout_tokens: int = 0
    """Response tokens sampled for training, for the discriminator's warm-up too."""
    learner_tokens: int = 0
    """Prompt and response tokens that went forward and backward through the policy, and the critic's."""
    learner_forward_tokens: int = 0
    """Those that went forward only: reference, log-probabilities at the step's start, values, drawing."""
    discriminator_tokens: int = 0
    """Prompt and response tokens that went forward and backward through the discriminator."""

    def generated(self, batch: pa.Table) -> None:
        """Trajectories were sampled."""
        self.rollout_tokens += response_tokens(batch)

    def learned(self, table: pa.Table, trained: int, forward: int = 0) -> None:
        """The learner made so many passes of either kind over these prompts and responses."""
        tokens = packed_tokens(table)
        self.learner_tokens += trained * tokens
        self.learner_forward_tokens += forward * tokens

    def drawn(self, metrics: Mapping[str, float]) -> None:
        """The learner drew responses of its own for the Gumbel-Softmax update, if `metrics` of its step say
        so: forward to draw them, forward and backward through policy and discriminator where they were kept.
        """
        kept = round(metrics.get("gumbel_kept_tokens", 0))
        self.learner_forward_tokens += round(metrics.get("gumbel_tokens", 0))
        self.learner_tokens += kept
        self.discriminator_tokens += kept

    def discriminated(self, metrics: dict[str, Any]) -> None:
        """The discriminator trained; `metrics` of its turn or warm-up."""
        self.discriminator_tokens += round(metrics.get("tokens_trained", 0))

    def state(self) -> dict[str, int]:
        """For the checkpoint and the summary."""
        return asdict(self)


def response_tokens(table: pa.Table) -> int:
    """Tokens of all rows of `response_ids`."""
    return int(pc.sum(pc.list_value_length(table["response_ids"])).as_py() or 0)


def packed_tokens(table: pa.Table) -> int:
    """Response tokens, and the prompt of each `group_id` once."""
    lengths = pa.table({"group": table["group_id"], "length": pc.list_value_length(table["prompt_ids"])})
    once = lengths.group_by("group").aggregate([("length", "max")])
    return response_tokens(table) + int(pc.sum(once["length_max"]).as_py() or 0)


def policy_passes(config: LearnerConfig) -> tuple[int, int]:
    """Passes of a policy step over its samples: forward and backward, forward only (`learner.policy`)."""
    critic = config.advantage == "gae"
    old = config.epochs * config.minibatches > 1 or (config.kl_coef > 0 and config.kl_in == "reward")
    return config.epochs * (1 + critic), old + (config.kl_coef > 0) + critic
