"""Tables and configuration for the discriminator's tests."""

from collections.abc import Sequence

import pyarrow as pa

from discriminator.config import DiscriminatorConfig


def judged(rows: Sequence[tuple[str, str]], finish: str = "stop") -> pa.Table:
    """Table with the judged columns from (prompt, response) pairs; the prompt is its own id."""
    return pa.table(
        {
            "prompt_id": [prompt for prompt, _ in rows],
            "prompt_text": [prompt for prompt, _ in rows],
            "response_text": [response for _, response in rows],
            "finish_reason": [finish] * len(rows),
        }
    )


def small(**fields) -> DiscriminatorConfig:
    """fp32 on the CPU with small batches."""
    defaults = {
        "device": "cpu",
        "compute_dtype": "float32",
        "lr": 2e-3,
        "pack_length": 128,
        "micro_batch_tokens": 512,
        "batch_size": 16,
        "min_demonstrations": 16,
        "heldout_size": 48,
        "threads": 1,
    }
    return DiscriminatorConfig(**(defaults | fields))
