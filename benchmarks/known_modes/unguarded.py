"""A system without the canonical path, to show what the path is for.

Both sides reach the discriminator as they came: trajectories with their sampled ids, demonstrations with the
ids of their text as it stands, planted. No setting of the product does this.
"""

from typing import Any

import pyarrow as pa
import torch

from benchmarks.known_modes.artefacts import Plant
from benchmarks.known_modes.systems import OneProcessSystem
from discriminator.canonical import Canonicaliser, Encoded
from discriminator.model import batches_of, collect, group_encoded
from rollout.data import DataSplits
from rollout.templates import Renderer
from services.config import Config


class Unguarded(Canonicaliser):
    """Encodes trajectories (tables with `response_ids`) as sampled, and other tables as planted
    demonstrations.
    """

    def __init__(self, whole: Canonicaliser, plant: Plant) -> None:
        self.__dict__.update(whole.__dict__)
        self.plant = plant

    def encode_table(self, table: pa.Table) -> list[Encoded]:
        prompts = [self.encode_prompt(text) for text in table["prompt_text"].to_pylist()]
        complete = [reason == "stop" for reason in table["finish_reason"].to_pylist()]
        if "response_ids" not in table.column_names:
            texts = table["response_text"].to_pylist()
            return [self._planted(*row) for row in zip(prompts, texts, complete, strict=True)]
        ids, ends = (table[name].to_pylist() for name in ("response_ids", "token_ends"))
        return [
            Encoded(prompt, row, list(zip([0, *end[:-1]], end, strict=True)), whole)
            for prompt, row, end, whole in zip(prompts, ids, ends, complete, strict=True)
        ]

    def _planted(self, prompt: list[int], text: str, complete: bool) -> Encoded:
        body = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        ids = self.plant.ids([*body, self.eos_id] if complete else list(body)) or [self.eos_id]
        return Encoded(prompt, ids, [(len(text), len(text))] * len(ids), complete)


class UnguardedSystem(OneProcessSystem):
    """`OneProcessSystem` whose discriminator reads and scores without the canonical path."""

    def __init__(self, config: Config, splits: DataSplits, renderer: Renderer, plant: Plant) -> None:
        super().__init__(config, splits, renderer)
        self.judge.canonical = Unguarded(self.judge.canonical, plant)

    async def score(self, batch: pa.Table, version: int) -> list[dict[str, Any]]:
        self.local_scorer.ensure(version, self.versions.fetch)
        module, settings = self.local_scorer.module(version), self.config.discriminator
        encoded = self.judge.canonical.encode_table(batch)
        packed = batches_of(
            group_encoded(encoded),
            module.kind,
            packing=settings.packing,
            pack_length=settings.pack_length,
            micro_batch_tokens=settings.scoring.max_batch_tokens,
        )
        with torch.inference_mode():
            scores = collect(packed, [module(rows) for rows in packed], encoded)
        return [{"scores": row, "spans": item.spans} for row, item in zip(scores, encoded, strict=True)]
