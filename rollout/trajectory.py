"""Arrow schemas of generation requests and trajectories, and the arithmetic on single rows and columns of
them.

One trajectory is one response. `response_ids` are the sampled tokens themselves and are never re-tokenised;
`token_ends[t]` says how many characters of `response_text` are complete once token t is known, so a reward
on a span of characters can be given to the token that completes it. `policy_version` is the oldest and
`policy_version_end` the newest policy version that produced one of the tokens.
"""

from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

TRAJECTORY_SCHEMA = pa.schema(
    [
        pa.field("trajectory_id", pa.string(), nullable=False),
        pa.field("group_id", pa.string(), nullable=False),
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("step", pa.int32(), nullable=False),
        pa.field("sample", pa.int32(), nullable=False),
        pa.field("prompt_text", pa.string(), nullable=False),
        pa.field("prompt_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("response_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("response_logprobs", pa.list_(pa.float32()), nullable=False),
        pa.field("response_text", pa.string(), nullable=False),
        pa.field("token_ends", pa.list_(pa.int32()), nullable=False),
        pa.field("finish_reason", pa.string(), nullable=False),
        pa.field("policy_version", pa.int32(), nullable=False),
        pa.field("policy_version_end", pa.int32(), nullable=False),
        pa.field("worker", pa.int32(), nullable=False),
    ]
)
"""One row a response; see the module docstring."""

REQUEST_SCHEMA = pa.schema(
    [
        pa.field("group_id", pa.string(), nullable=False),
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("step", pa.int32(), nullable=False),
        pa.field("prompt_text", pa.string(), nullable=False),
        pa.field("prompt_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("n", pa.int32(), nullable=False),
        pa.field("seed", pa.int64(), nullable=True),
    ]
)
"""One row a group: a prompt, the number of responses, and the seed of its first response (null: unseeded)."""

REPLACEMENT = "\ufffd"


def group_id(step: int, index: int) -> str:
    """Identity of the `index`-th prompt of a step; sorts by step, then index."""
    return f"{step:06d}-{index:05d}"


def trajectory_id(group: str, sample: int) -> str:
    """Identity of one response of a group."""
    return f"{group}/{sample}"


def sample_seed(seed: int | None, sample: int) -> int | None:
    """Seed of a group's `sample`-th response, kept within 63 bits; None stays None."""
    return None if seed is None else (seed + sample) % 2**63


def lag(table: pa.Table, version: int) -> pa.Array:
    """Age of every trajectory in versions, int32 [rows]: `version` minus the oldest version that made a
    token.
    """
    return pc.subtract(pa.scalar(version, pa.int32()), table["policy_version"]).combine_chunks()


def trajectories(rows: Sequence[dict[str, Any]]) -> pa.Table:
    """Table of TRAJECTORY_SCHEMA from row dicts, groups in order of their id and samples in numeric order."""
    ordered = sorted(rows, key=lambda row: (row["group_id"], row["sample"]))
    return pa.Table.from_pylist(ordered, schema=TRAJECTORY_SCHEMA)


def check_table(table: pa.Table, schema: pa.Schema, what: str) -> None:
    """Raise ValueError naming the first column of `schema` that `table` lacks or holds with another type."""
    for field in schema:
        if field.name not in table.column_names:
            raise ValueError(f"{what}: column {field.name!r} is missing; it has {table.column_names}")
        found = table.schema.field(field.name).type
        if found != field.type:
            raise ValueError(f"{what}: column {field.name!r} is {found}, expected {field.type}")


def text_and_token_ends(ids: Sequence[int], decode: Callable[[list[int]], str]) -> tuple[str, list[int]]:
    """Decode a response and count the characters that are complete after each token.

    A character is complete when no later token can change it: the bytes of a multi-byte character count
    once its last byte is there. `decode` maps ids to text, special tokens skipped (they have zero width).

    Decoding is incremental: a window of ids that starts at a character boundary is decoded with and without
    the newest tokens, and the difference is new text. Tokenizers whose text is not the sum of such windows
    are recognised (the pieces are compared with the whole) and take the quadratic path over all prefixes.

    Returns (text, ends) with len(ends) == len(ids), ends non-decreasing, ends[-1] == len(text).
    """
    ids = list(ids)
    text = decode(ids)
    ends: list[int] = []
    pieces: list[str] = []
    start = read = done = 0
    known = ""
    for stop in range(1, len(ids) + 1):
        window = decode(ids[start:stop])
        if len(window) > len(known) and not window.endswith(REPLACEMENT):
            pieces.append(window[len(known) :])
            done += len(pieces[-1])
            start, read = read, stop
            known = decode(ids[start:read])
        ends.append(done)
    if not text.startswith("".join(pieces)):
        ends = _prefix_ends(ids, text, decode)
    if ends:
        ends[-1] = len(text)
    return text, ends


def _prefix_ends(ids: list[int], text: str, decode: Callable[[list[int]], str]) -> list[int]:
    """The definition, word for word: after t tokens, the characters that the prefix shares with the whole
    text.
    """
    ends: list[int] = []
    for stop in range(1, len(ids) + 1):
        prefix = decode(ids[:stop]).rstrip(REPLACEMENT)
        shared = next((i for i, (a, b) in enumerate(zip(prefix, text, strict=False)) if a != b), None)
        width = min(len(prefix), len(text)) if shared is None else shared
        ends.append(max(width, ends[-1] if ends else 0))
    return ends
