"""Trajectory tables and the character positions of tokens."""

import random
from pathlib import Path

import pyarrow as pa
import pytest

from rollout.trajectory import (
    REQUEST_SCHEMA,
    TRAJECTORY_SCHEMA,
    check_table,
    group_id,
    lag,
    sample_seed,
    text_and_token_ends,
    trajectories,
    trajectory_id,
)


def row(step: int, index: int, sample: int, version: int = 0) -> dict[str, object]:
    group = group_id(step, index)
    return {
        "trajectory_id": trajectory_id(group, sample),
        "group_id": group,
        "prompt_id": f"p{index}",
        "step": step,
        "sample": sample,
        "prompt_text": "a",
        "prompt_ids": [1],
        "response_ids": [2, 3],
        "response_logprobs": [-0.5, -1.0],
        "response_text": "b",
        "token_ends": [0, 1],
        "finish_reason": "stop",
        "policy_version": version,
        "policy_version_end": version,
        "worker": 0,
    }


def bytes_decode(ids: list[int]) -> str:
    """A tokenizer whose token i is byte i; ids from 256 on are special and skipped."""
    return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")


def test_rows_are_ordered_by_group_then_numeric_sample() -> None:
    table = trajectories([row(1, 0, 10), row(1, 1, 0), row(1, 0, 9), row(0, 5, 0)])
    assert table.schema == TRAJECTORY_SCHEMA
    assert table["trajectory_id"].to_pylist() == [
        "000000-00005/0",
        "000001-00000/9",
        "000001-00000/10",
        "000001-00001/0",
    ]


def test_lag_counts_from_the_oldest_version() -> None:
    table = trajectories([row(0, 0, 0, 3), row(0, 0, 1, 5)])
    assert lag(table, 5).to_pylist() == [2, 0]
    assert lag(table, 5).type == pa.int32()


def test_a_null_seed_stays_null_and_seeds_differ_within_a_group() -> None:
    assert sample_seed(None, 3) is None
    assert [sample_seed(2**63 - 1, i) for i in range(3)] == [2**63 - 1, 0, 1]


def test_a_missing_or_mistyped_column_is_named() -> None:
    with pytest.raises(ValueError, match="requests: column 'prompt_id' is missing"):
        check_table(pa.table({"group_id": ["a"]}), REQUEST_SCHEMA, "requests")
    with pytest.raises(ValueError, match="requests: column 'group_id' is int64, expected string"):
        check_table(pa.table({"group_id": [1]}), REQUEST_SCHEMA, "requests")


def test_a_multi_byte_character_is_complete_at_its_last_byte() -> None:
    text = "aß東😀."
    ids = [*text.encode(), 300]
    assert text_and_token_ends(ids, bytes_decode) == (text, [1, 1, 2, 2, 2, 3, 3, 3, 3, 4, 5, 5])


def test_a_response_cut_inside_a_character_counts_the_remainder_at_the_end() -> None:
    text, ends = text_and_token_ends([0x61, 0xE6, 0x9D], bytes_decode)
    assert text == "a\ufffd"
    assert ends == [1, 1, 2]


def test_an_empty_response_has_no_ends() -> None:
    assert text_and_token_ends([], bytes_decode) == ("", [])


def settled(ids: list[int], stop: int) -> int:
    """Slow reference: the leading characters that no continuation of ids[:stop] can change, by trying four
    of them.
    """
    texts = [
        bytes_decode(ids[:stop] + tail) for tail in ([], [0x80], [0x80, 0x80, 0x80], [0x61], [0xBF, 0xBF])
    ]
    return next(
        (i for i, characters in enumerate(zip(*texts, strict=False)) if len(set(characters)) > 1),
        min(map(len, texts)),
    )


def test_ends_are_monotone_and_never_early_on_random_bytes() -> None:
    generator = random.Random(0)
    for _ in range(300):
        ids = [
            generator.choice([*range(0x61, 0x64), *range(0x80, 0x84), 0xC3, 0xE6, 0xF0, 300])
            for _ in range(12)
        ]
        text, ends = text_and_token_ends(ids, bytes_decode)
        assert text == bytes_decode(ids)
        assert len(ends) == len(ids)
        assert ends == sorted(ends)
        assert ends[-1] == len(text)
        for stop, end in enumerate(ends[:-1], start=1):
            assert end <= settled(ids, stop)


def test_a_decoder_whose_text_is_not_additive_takes_the_exact_path() -> None:
    def joining(ids: list[int]) -> str:
        """Joins with spaces, but writes a first token in capitals: windows decode differently than the
        whole.
        """
        words = [chr(i) for i in ids]
        return " ".join([words[0].upper(), *words[1:]]) if words else ""

    text, ends = text_and_token_ends([97, 98, 99], joining)
    assert text == "A b c"
    assert ends == [1, 3, 5]


def test_ends_on_a_real_byte_level_tokenizer(tiny_model: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    text = "the naïve cat — 東京 größe 😀!"
    ids = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
    vocabulary = tokenizer.backend_tokenizer
    decoded, ends = text_and_token_ends(ids, lambda i: vocabulary.decode(i, skip_special_tokens=True))
    assert decoded == text
    # Byte-level BPE writes each byte as one character of the token, so bytes can be counted without decoding.
    counted = 0
    for token, end in zip(ids[:-1], ends[:-1], strict=True):
        counted += len(vocabulary.id_to_token(token))
        assert end == len(text.encode()[:counted].decode(errors="ignore"))
    assert ends[-1] == len(text)
