"""A step's trajectories as flat arrays, read from an Arrow table."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from learner.packing import Group, make_groups


@dataclass(frozen=True)
class Samples:
    """A step's trajectories as flat arrays; tokens of trajectory i are `offsets[i]:offsets[i+1]`."""

    groups: list[Group]
    offsets: torch.Tensor
    group_index: torch.Tensor
    """Group number of each trajectory."""

    @property
    def tokens(self) -> int:
        return int(self.offsets[-1])

    @classmethod
    def from_table(cls, table: pa.Table) -> "Samples":
        """From `prompt_ids`, `response_ids` and (where present) `group_id`; rows without one are groups of
        their own."""
        prompts, responses = ragged(table, "prompt_ids"), ragged(table, "response_ids")
        named = "group_id" in table.column_names
        keys: list[Any] = table["group_id"].to_pylist() if named else list(range(len(table)))
        lengths = torch.tensor([len(r) for r in responses], dtype=torch.int64)
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        numbers = {key: i for i, key in enumerate(dict.fromkeys(keys))}
        index = torch.tensor([numbers[key] for key in keys], dtype=torch.int64)
        return cls(make_groups(prompts, responses, keys), offsets, index)


def ragged(table: pa.Table, column: str) -> list[np.ndarray]:
    """Rows of a list column as numpy arrays."""
    chunks = table[column].combine_chunks()
    values = chunks.values.to_numpy(zero_copy_only=False)
    offsets = chunks.offsets.to_numpy()
    return [values[lo:hi] for lo, hi in pairwise(offsets)]


def flat_column(table: pa.Table, column: str, samples: Samples) -> torch.Tensor:
    """A per-token list column in flat order, fp32. Raises ValueError when a row's length is not that of its
    response."""
    rows = ragged(table, column)
    for i, (row, want) in enumerate(zip(rows, samples.offsets.diff().tolist(), strict=True)):
        if len(row) != want:
            raise ValueError(f"row {i}: {column} has {len(row)} entries for a response of {want} tokens")
    flat = np.concatenate(rows).astype(np.float32) if rows else np.zeros(0, dtype=np.float32)
    if not np.isfinite(flat).all():
        raise ValueError(f"{column} holds values that are not finite")
    return torch.from_numpy(flat)


def row_column(table: pa.Table, column: str) -> torch.Tensor:
    """A column of one number a row, fp32. Raises ValueError where one is not finite."""
    values = table[column].to_numpy().astype(np.float32)
    if not np.isfinite(values).all():
        raise ValueError(f"{column} holds values that are not finite")
    return torch.from_numpy(values)
