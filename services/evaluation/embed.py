"""Sentence embeddings from a frozen transformer: mean over the last hidden states, unit length.

The encoder never changes during a run, so a text always has the same vector: whatever the batch or its
padding (pooling is mask-aware), and the human side can be remembered.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


class Embedder:
    """Embeds texts with `model` (hub name or folder): any encoder, or a causal language model's body."""

    def __init__(
        self,
        model: str,
        *,
        threads: int = 1,
        batch_size: int = 64,
        max_tokens: int = 256,
        trust_remote_code: bool = False,
    ) -> None:
        import torch
        from transformers import AutoTokenizer

        from learner.pretrained import load_body, longest_input

        self.name = model
        self._threads = threads
        self._batch_size = batch_size
        self._tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
        self._model = load_body(model, dtype=torch.float32, trust_remote_code=trust_remote_code)
        self._model.eval().requires_grad_(False)
        self._max_tokens = min(max_tokens, longest_input(self._model) or max_tokens)
        self._kept: dict[str, np.ndarray] = {}

    @property
    def size(self) -> int:
        """Width of a vector."""
        return int(self._model.config.hidden_size)

    def __call__(self, texts: Sequence[str], keep: bool = False) -> np.ndarray:
        """Embed to float32 [len(texts), size]; no tokens give zeros. `keep` remembers these texts."""
        todo = sorted({text for text in texts if text not in self._kept})
        vectors = dict(zip(todo, self._embed(todo), strict=True))
        if keep:
            self._kept.update(vectors)
        return np.stack([self._kept[text] if text in self._kept else vectors[text] for text in texts])

    def _embed(self, texts: list[str]) -> np.ndarray:
        import torch

        out = np.zeros((len(texts), self.size), dtype=np.float32)
        if not texts:
            return out
        ids = self._tokenizer(texts, truncation=True, max_length=self._max_tokens, split_special_tokens=True)[
            "input_ids"
        ]
        order = sorted((row for row in range(len(texts)) if ids[row]), key=lambda row: len(ids[row]))
        threads = torch.get_num_threads()
        torch.set_num_threads(self._threads)
        try:
            for start in range(0, len(order), self._batch_size):
                rows = order[start : start + self._batch_size]
                out[rows] = self._pool([ids[row] for row in rows]).numpy()
        finally:
            torch.set_num_threads(threads)
        return out

    def _pool(self, ids: list[list[int]]) -> "torch.Tensor":
        """Token ids of one batch -> unit vectors [batch, size]."""
        import torch

        width = max(len(row) for row in ids)
        inputs = torch.zeros(len(ids), width, dtype=torch.long)
        mask = torch.zeros(len(ids), width, dtype=torch.long)
        for index, row in enumerate(ids):
            inputs[index, : len(row)] = torch.tensor(row)
            mask[index, : len(row)] = 1
        with torch.inference_mode():
            hidden = self._model(input_ids=inputs, attention_mask=mask).last_hidden_state
            pooled = (hidden * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
            return torch.nn.functional.normalize(pooled, dim=-1)


def make_embedder(
    embedding_model: str,
    base_model: str,
    *,
    threads: int = 1,
    max_tokens: int = 256,
    trust_remote_code: bool = False,
) -> Embedder | None:
    """What `evaluation.embedding_model` names: empty is the untrained policy `base_model`, "none" is None."""
    if embedding_model == "none":
        return None
    return Embedder(
        embedding_model or base_model,
        threads=threads,
        max_tokens=max_tokens,
        trust_remote_code=trust_remote_code,
    )
