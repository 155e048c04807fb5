"""The demonstrations in the spelling the discriminator reads.

Demonstrations live here and in the discriminator's processes only: nothing in this module is ever handed to
the learner.
"""

import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from discriminator.canonical import prepare_demonstrations
from discriminator.config import CanonicalConfig
from rollout.data import DataSplits


class Demonstrations:
    """Training and held-out demonstrations, canonical and cut to the rollouts' token limit."""

    def __init__(
        self,
        splits: DataSplits,
        tokenizer: PreTrainedTokenizerBase,
        canonical: CanonicalConfig,
        max_tokens: int,
    ) -> None:
        def prepared(table: pa.Table) -> pa.Table:
            judged = table.select(["prompt_id", "prompt_text", "response"])
            judged = judged.rename_columns(["prompt_id", "prompt_text", "response_text"])
            return prepare_demonstrations(
                judged, tokenizer, canonical, max_tokens=max_tokens
            ).combine_chunks()

        self.train = prepared(splits.train)
        self.heldout = prepared(splits.heldout)
        self.max_tokens = max_tokens

    def notes(self) -> list[str]:
        """What the user should know of them before training."""
        cut = self.train["finish_reason"].to_pylist().count("length")
        if not cut:
            return []
        return [
            f"{cut} of {self.train.num_rows} training demonstrations are longer than sampling.max_tokens = "
            f"{self.max_tokens}: the discriminator reads them cut there, C2ST compares with whole ones"
        ]
