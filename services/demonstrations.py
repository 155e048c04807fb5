"""Which demonstrations stand beside which rollouts in a discriminator step.

Demonstrations live here and in the discriminator's processes only: nothing in this module is ever handed to the
learner. A draw is a pure function of (seed, step, prompts), so there is no cursor to lose.
"""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from transformers import PreTrainedTokenizerBase

from discriminator.canonical import prepare_demonstrations
from discriminator.config import CanonicalConfig
from rollout.data import DataSplits


class Demonstrations:
    """The training and held-out demonstrations in the spelling the discriminator reads."""

    def __init__(
        self, splits: DataSplits, tokenizer: PreTrainedTokenizerBase, canonical: CanonicalConfig, max_tokens: int
    ) -> None:
        def prepared(table: pa.Table) -> pa.Table:
            renamed = table.select(["prompt_id", "prompt_text", "response"]).rename_columns(
                ["prompt_id", "prompt_text", "response_text"]
            )
            return prepare_demonstrations(renamed, tokenizer, canonical, max_tokens=max_tokens).combine_chunks()

        self.train = prepared(splits.train)
        self.heldout = prepared(splits.heldout)
        self._rows_of: dict[str, list[int]] = {}
        for row, identifier in enumerate(self.train["prompt_id"].to_pylist()):
            self._rows_of.setdefault(identifier, []).append(row)

    def draw(self, n: int, *, prompts: list[str], paired: bool, seed: int, step: int) -> pa.Table:
        """`n` training demonstrations (all, when there are fewer).

        With `paired`, one demonstration of each of `prompts` that has one comes first, then others at random.
        """
        rng = np.random.default_rng([seed, step, 1])
        chosen: list[int] = []
        if paired:
            for identifier in dict.fromkeys(prompts):
                if rows := self._rows_of.get(identifier):
                    chosen.append(rows[int(rng.integers(len(rows)))])
        chosen = chosen[:n]
        taken = set(chosen)
        order = rng.permutation(self.train.num_rows)
        chosen += [int(row) for row in order if int(row) not in taken][: n - len(chosen)]
        return self.train.take(chosen)

    def draw_heldout(self, n: int, *, seed: int, step: int) -> pa.Table:
        """`n` held-out demonstrations (all, when there are fewer)."""
        rng = np.random.default_rng([seed, step, 2])
        return self.heldout.take(np.sort(rng.permutation(self.heldout.num_rows)[:n]))


def demonstrations_of(table: pa.Table, wanted: list[str]) -> dict[str, str]:
    """First response of each prompt in `wanted`, for showing samples beside their demonstrations."""
    rows = table.filter(pc.is_in(table["prompt_id"], pa.array(wanted, pa.string())))
    answers: dict[str, Any] = {}
    for identifier, text in zip(rows["prompt_id"].to_pylist(), rows["response"].to_pylist(), strict=True):
        answers.setdefault(identifier, text)
    return answers
