"""Preference pairs as the discriminator's two sides: a reward model in the sense of RLHF.

A pair is a prompt of its own: the preferred answer stands where a demonstration would, the other where a
rollout would, and both carry the pair's number as `prompt_id`. The Bradley-Terry loss compares what shares a
prompt id, so a step on B pairs minimises the mean over them of -log sigmoid(s_chosen - s_rejected) (Ouyang et
al. 2022, eq. 1, with one comparison a prompt) and no answer is compared with that of another pair. The text
takes the discriminator's one canonical path, and pairs with the same prompt text share its computation.

    trainer = DiscriminatorTrainer(for_preferences(config), model)
    train = preference_sides(pairs, tokenizer, config.canonical, max_tokens=64)
    held = preference_sides(heldout_pairs, tokenizer, config.canonical, max_tokens=64)
    trainer.warm_up(train.rejected, train.chosen, held.chosen, held.rejected)
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pyarrow as pa

from discriminator.canonical import prepare_demonstrations
from discriminator.config import CanonicalConfig, DiscriminatorConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class PreferenceSides:
    """Both answers of every pair, row by row, with `JUDGED_COLUMNS`."""

    chosen: pa.Table
    rejected: pa.Table


def preference_sides(
    pairs: pa.Table,
    policy_tokenizer: "PreTrainedTokenizerBase",
    config: CanonicalConfig,
    *,
    max_tokens: int,
) -> PreferenceSides:
    """The sides of a table of pairs, cut like demonstrations to what the policy could have written.

    Args:
        pairs: columns prompt_text, chosen and rejected.
        policy_tokenizer, config, max_tokens: see `canonical.prepare_demonstrations`.

    Raises:
        ValueError: an answer without text.
    """
    numbers = pa.array([f"pair {row}" for row in range(pairs.num_rows)], pa.string())

    def side(column: str) -> pa.Table:
        table = pa.table(
            {"prompt_id": numbers, "prompt_text": pairs["prompt_text"], "response_text": pairs[column]}
        )
        return prepare_demonstrations(table, policy_tokenizer, config, max_tokens=max_tokens).combine_chunks()

    return PreferenceSides(side("chosen"), side("rejected"))


def for_preferences(config: DiscriminatorConfig) -> DiscriminatorConfig:
    """The configuration with which a trainer's steps are on pairs: nothing is drawn beside them."""
    return config.model_copy(update={"pair_demonstrations": True, "min_demonstrations": 1})
