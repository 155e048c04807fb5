"""Which rollouts and demonstrations a discriminator step trains on: pure functions of the tables and the
generator they are given, so that every rank, and a resumed run, draws the same."""

from collections import defaultdict

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray


def rollout_batches(
    rollouts: pa.Table, steps: int, batch_size: int, rng: np.random.Generator
) -> list[NDArray[np.int64]]:
    """Rows of each step's rollouts: whole passes in shuffled order of prompts, so that batches share prefixes
    and every rollout is used about equally often.

    Args:
        rollouts: with `prompt_id`, at least one row.
        batch_size: rollouts a step; all of them where there are fewer.

    Returns:
        `steps` arrays of min(batch_size, rows) rows.
    """
    by_prompt: dict[str, list[int]] = defaultdict(list)
    for row, prompt in enumerate(rollouts["prompt_id"].to_pylist()):
        by_prompt[prompt].append(row)
    groups = [np.array(rows) for rows in by_prompt.values()]
    size = min(batch_size, rollouts.num_rows)
    batches: list[NDArray[np.int64]] = []
    while len(batches) < steps:
        order = np.concatenate([groups[i] for i in rng.permutation(len(groups))])
        batches += [order[begin : begin + size] for begin in range(0, len(order) - size + 1, size)]
    return batches[:steps]


def demonstration_rows(
    rollouts: pa.Table, demonstrations: pa.Table, *, paired: bool, at_least: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Rows of the demonstrations of a step, ascending and at most as many as there are rollouts.

    Args:
        rollouts: the step's, with `prompt_id`.
        demonstrations: all of them, with `prompt_id`; at least one row.
        paired: prefer the rollouts' own prompts.
        at_least: where `paired` finds fewer, others fill up to this number.
    """
    order = rng.permutation(demonstrations.num_rows)
    if not paired:
        return np.sort(order[: rollouts.num_rows])
    prompts = set(rollouts["prompt_id"].to_pylist())
    ids = demonstrations["prompt_id"].to_pylist()
    own = [row for row in order if ids[row] in prompts][: rollouts.num_rows]
    others = [row for row in order if ids[row] not in prompts][: max(0, at_least - len(own))]
    return np.sort(np.array(own + others, dtype=np.int64))
