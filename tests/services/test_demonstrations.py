"""What is said of demonstrations before training."""

import pyarrow as pa
import pytest

from discriminator.config import CanonicalConfig
from rollout.data import DataSplits
from rollout.templates import load_tokenizer
from services.config import load
from services.demonstrations import Demonstrations


@pytest.mark.parametrize(("limit", "said"), [(4, ["2 of 3 training demonstrations"]), (64, [])])
def test_those_longer_than_rollouts_can_be_are_counted(tiny_model, limit, said):
    config = load(None, [f"--policy.model={tiny_model}", "--data.demonstrations=d"])
    rows = pa.table(
        {
            "prompt_id": ["a", "b", "c"],
            "prompt_text": ["say: "] * 3,
            "response": ["cat", "the cat sat on the mat", "the dog ran after the cat"],
        }
    )
    splits = DataSplits(rows, rows, rows, rows, extra_prompts=rows.slice(0, 0))
    prepared = Demonstrations(splits, load_tokenizer(config.policy), CanonicalConfig(), limit)
    notes = prepared.notes()
    assert [note[: len(start)] for note, start in zip(notes, said, strict=True)] == said
    assert all(f"sampling.max_tokens = {limit}" in note for note in notes)
