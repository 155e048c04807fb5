"""Random trajectories and random Llama models for the learner's tests."""

from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pytest


def random_table(
    sizes: list[tuple[int, list[int]]], vocab: int = 300, seed: int = 0, scored: bool = True
) -> pa.Table:
    """Scored trajectories: one group for each (prompt length, response lengths)."""
    rng = np.random.default_rng(seed)
    rows = []
    for g, (prompt_length, lengths) in enumerate(sizes):
        prompt = rng.integers(5, vocab, prompt_length).astype(np.int32)
        for s, n in enumerate(lengths):
            row = {
                "trajectory_id": f"000000-{g:05d}/{s}",
                "group_id": f"000000-{g:05d}",
                "prompt_ids": prompt.tolist(),
                "response_ids": rng.integers(5, vocab, n).astype(np.int32).tolist(),
            }
            if scored:
                row["response_logprobs"] = rng.normal(-5.5, 0.5, n).astype(np.float32).tolist()
                row["token_rewards"] = rng.normal(0, 1, n).astype(np.float32).tolist()
                row["last_reward"] = row["token_rewards"][-1] if n else 0.0
            rows.append(row)
    schema = pa.schema(
        [
            ("trajectory_id", pa.string()),
            ("group_id", pa.string()),
            ("prompt_ids", pa.list_(pa.int32())),
            ("response_ids", pa.list_(pa.int32())),
        ]
        + ([(c, pa.list_(pa.float32())) for c in ("response_logprobs", "token_rewards")] if scored else [])
        + ([("last_reward", pa.float32())] if scored else [])
    )
    return pa.Table.from_pylist(rows, schema=schema)


@pytest.fixture(scope="session")
def make_table() -> Callable[..., pa.Table]:
    return random_table


UNEVEN = [(9, [5, 3, 8, 1]), (4, [7, 7]), (17, [2, 6, 4, 9, 3]), (3, [11]), (6, [1, 2, 3])]


@pytest.fixture(scope="session")
def uneven_table() -> pa.Table:
    """Five groups of unequal prompts, sizes and response lengths."""
    return random_table(UNEVEN)
