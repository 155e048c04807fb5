"""Shared-prefix packing: groups of responses become rows in which each prompt is computed once.

A row holds segments `[prompt][response 1]…[response n]`, perhaps of several groups, padded on the right.
Positions restart so that each response continues from its prompt, and a token may attend to its group's
prompt and to its own response, causally. Every array that this needs is built here with numpy;
`learner.attention` makes masks of them.

Response tokens of a step are numbered trajectory after trajectory ("flat order"). `PackedBatch.flat` maps a
batch's response tokens to these numbers, so per-token columns (advantages, log-probabilities, …) are flat
arrays that are gathered into batches and scattered back, whatever the packing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch

PAD_GROUP = -1
PROMPT = 0


@dataclass(frozen=True)
class Group:
    """A prompt and its responses.

    `starts[i]` is the number of response i's first token in the step's flat order; `rows[i]` its row in the
    step's table.
    """

    prompt: np.ndarray
    responses: list[np.ndarray]
    starts: np.ndarray
    rows: np.ndarray


@dataclass(frozen=True)
class PackedBatch:
    """One micro-batch. R rows of T tokens hold N response tokens of which the model's outputs are wanted."""

    input_ids: torch.Tensor  # [R T]
    position_ids: torch.Tensor  # [R T]
    group_ids: torch.Tensor  # [R T]
    """Group of each token, unique within its row; -1 on padding."""
    response_ids: torch.Tensor  # [R T]
    """0 on prompts (and padding), 1… on the responses of a group."""
    source: torch.Tensor  # [N]
    """Index into the flattened R*T positions whose hidden state predicts the token (the first one: the last
    of the prompt)."""
    target: torch.Tensor  # [N]
    """Token to be predicted."""
    position: torch.Tensor  # [N]
    """Index into R*T of the token itself; -1 for last tokens that were left out (`keep_last = False`)."""
    flat: torch.Tensor  # [N]
    """Number of the token in the step's flat order."""
    trajectory: torch.Tensor  # [N]
    """Row of the token's trajectory in the step's table."""
    weight: torch.Tensor  # [N]
    """1, or 0 in a filler batch."""
    columns: dict[str, torch.Tensor] = field(default_factory=dict)
    """Per-response-token columns, each [N]."""

    @property
    def shape(self) -> tuple[int, int]:
        rows, width = self.input_ids.shape
        return rows, width

    def padding(self) -> torch.Tensor:
        return self.group_ids == PAD_GROUP

    def to(self, device: torch.device | str) -> "PackedBatch":
        moved = {f.name: getattr(self, f.name).to(device) for f in fields(self) if f.name != "columns"}
        return replace(self, columns={k: v.to(device) for k, v in self.columns.items()}, **moved)

    def with_columns(self, **flat_columns: torch.Tensor) -> "PackedBatch":
        """Attach columns given in flat order ([tokens of the step]), gathered for this batch's tokens."""
        gathered = {name: column.to(self.flat.device)[self.flat] for name, column in flat_columns.items()}
        return replace(self, columns={**self.columns, **gathered})

    def scatter(self, values: torch.Tensor, out: torch.Tensor) -> None:
        """Write this batch's values [N] into a flat array of the step, in place; filler batches write
        nothing."""
        real = self.weight > 0
        out[self.flat[real].to(out.device)] = values[real].to(out)


def make_groups(
    prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray], group_of: Sequence[str | int]
) -> list[Group]:
    """Collect rows with equal `group_of` into groups, in order of first appearance.

    Raises ValueError for an empty prompt (nothing predicts the first response token) or a group with two
    prompts.
    """
    lengths = np.array([len(r) for r in responses], dtype=np.int64)
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]) if len(lengths) else lengths
    members: dict[str | int, list[int]] = {}
    for row, key in enumerate(group_of):
        members.setdefault(key, []).append(row)
    groups = []
    for key, rows in members.items():
        prompt = np.asarray(prompts[rows[0]], dtype=np.int64)
        if len(prompt) == 0:
            raise ValueError(
                f"group {key!r} has an empty prompt; a response needs at least one token before it"
            )
        for row in rows[1:]:
            if not np.array_equal(prompt, prompts[row]):
                raise ValueError(
                    f"group {key!r} holds two different prompts; give each prompt a group of its own"
                )
        texts = [np.asarray(responses[row], dtype=np.int64) for row in rows]
        groups.append(Group(prompt, texts, starts[rows], np.array(rows, dtype=np.int64)))
    return groups


def packed_length(group: Group, keep_last: bool = True) -> int:
    """Tokens that a group takes in a row."""
    drop = 0 if keep_last else 1
    return len(group.prompt) + sum(max(len(r) - drop, 0) for r in group.responses)


def pack(
    groups: Sequence[Group], *, pack_length: int, micro_batch_tokens: int, keep_last: bool = True
) -> list[PackedBatch]:
    """Pack groups into rows (first fit, decreasing) and rows of like length into micro-batches.

    Groups longer than `pack_length` (or than the longest single prompt plus response) are split. Rows are
    filled up to the longest piece: beyond it they would only make dense attention, which is quadratic in a
    row, dearer. `keep_last = False` leaves out each response's last token, which predicts nothing. Rows times
    longest row of a micro-batch stay within `micro_batch_tokens`, a single longer row apart.
    """
    longest = max((len(g.prompt) + len(r) for g in groups for r in g.responses), default=0)
    capacity = max(pack_length, longest)
    pieces = [piece for group in groups for piece in _split(group, capacity, keep_last)]
    needs = [packed_length(piece, keep_last) for piece in pieces]
    order = sorted(range(len(pieces)), key=lambda i: (-needs[i], i))
    capacity = max(needs, default=0)
    bins: list[list[Group]] = []
    room: list[int] = []
    for i in order:
        need = needs[i]
        for b, left in enumerate(room):
            if need <= left:
                bins[b].append(pieces[i])
                room[b] -= need
                break
        else:
            bins.append([pieces[i]])
            room.append(capacity - need)
    return _micro_batches(bins, micro_batch_tokens, keep_last)


def unpacked(
    groups: Sequence[Group], *, micro_batch_tokens: int, keep_last: bool = True
) -> list[PackedBatch]:
    """One response per row, prompt repeated, padded on the right: for models that cannot run packed rows."""
    single = [
        [Group(g.prompt, [r], g.starts[i : i + 1], g.rows[i : i + 1])]
        for g in groups
        for i, r in enumerate(g.responses)
        if len(r)
    ]
    return _micro_batches(single, micro_batch_tokens, keep_last)


def split_for_ranks(groups: Sequence[Group], ranks: int) -> list[list[Group]]:
    """Share groups among ranks, balanced by packed tokens (largest first to the least loaded);
    deterministic."""
    shares: list[list[int]] = [[] for _ in range(ranks)]
    load = [0] * ranks
    for i in sorted(range(len(groups)), key=lambda i: (-packed_length(groups[i]), i)):
        rank = load.index(min(load))
        shares[rank].append(i)
        load[rank] += packed_length(groups[i])
    return [[groups[i] for i in sorted(share)] for share in shares]


def filler() -> PackedBatch:
    """A two-token micro-batch of weight zero. Ranks with fewer micro-batches run it, or ZeRO-3's gathers
    would hang."""
    index = torch.zeros(1, dtype=torch.int64)
    row = torch.zeros(1, 2, dtype=torch.int64)
    return PackedBatch(
        input_ids=row,
        position_ids=torch.tensor([[0, 1]]),
        group_ids=row,
        response_ids=torch.tensor([[0, 1]]),
        source=index,
        target=index,
        position=index + 1,
        flat=index,
        trajectory=index,
        weight=torch.zeros(1),
    )


def pad_batches(batches: list[PackedBatch], count: int) -> list[PackedBatch]:
    """Add fillers until there are `count` micro-batches."""
    return batches + [filler() for _ in range(count - len(batches))]


def _split(group: Group, capacity: int, keep_last: bool) -> list[Group]:
    drop = 0 if keep_last else 1
    pieces: list[list[int]] = []
    used = capacity + 1
    for i, response in enumerate(group.responses):
        need = max(len(response) - drop, 0)
        if len(response) == 0:
            continue
        if used + need > capacity:
            pieces.append([])
            used = len(group.prompt)
        pieces[-1].append(i)
        used += need
    return [
        Group(group.prompt, [group.responses[i] for i in piece], group.starts[piece], group.rows[piece])
        for piece in pieces
    ]


def _micro_batches(bins: list[list[Group]], budget: int, keep_last: bool) -> list[PackedBatch]:
    lengths = [sum(packed_length(g, keep_last) for g in b) for b in bins]
    order = sorted(range(len(bins)), key=lambda i: (-lengths[i], i))
    batches: list[PackedBatch] = []
    while order:
        width = lengths[order[0]]
        take = max(1, budget // width)
        # Rows spread evenly over the micro-batches that are needed: a small last one wastes its fixed costs.
        needed = -(-len(order) // take)
        take = -(-len(order) // needed)
        batches.append(_build([bins[i] for i in order[:take]], width, keep_last))
        order = order[take:]
    return batches


def _build(rows: list[list[Group]], width: int, keep_last: bool) -> PackedBatch:
    drop = 0 if keep_last else 1
    segments = _Segments()
    texts: list[np.ndarray] = []
    source: list[int] = []  # what predicts a response's first token
    for r, groups in enumerate(rows):
        at = r * width
        for g, group in enumerate(groups):
            at = segments.add(group.prompt, at, place=0, group=g, response=0)
            last_of_prompt, n = at - 1, len(group.prompt)
            for i, response in enumerate(group.responses):
                texts.append(response)
                source.append(last_of_prompt)
                at = segments.add(response[: len(response) - drop], at, place=n, group=g, response=i + 1)
    # One entry for each token of each response.
    every = [group for groups in rows for group in groups]
    lengths = np.array([len(text) for text in texts], dtype=np.int64)
    j = _within(lengths)
    is_response = np.array(segments.response, dtype=np.int64) > 0
    own = np.repeat(np.array(segments.start, dtype=np.int64)[is_response], lengths) + j
    cut = j >= np.repeat(lengths - drop, lengths)
    index = {
        "source": np.where(j == 0, np.repeat(np.array(source, dtype=np.int64), lengths), own - 1),
        "target": np.concatenate(texts),
        "position": np.where(cut, -1, own),
        "flat": np.repeat(np.concatenate([group.starts for group in every]), lengths) + j,
        "trajectory": np.repeat(np.concatenate([group.rows for group in every]), lengths),
    }
    columns: dict[str, Any] = {
        name: torch.from_numpy(values.astype(np.int64)) for name, values in index.items()
    }
    return PackedBatch(**segments.rows((len(rows), width)), weight=torch.ones(len(j)), **columns)


class _Segments:
    """Prompts and responses, each a run of tokens at a place in the flattened rows."""

    def __init__(self) -> None:
        self.tokens: list[np.ndarray] = []
        self.start: list[int] = []
        self.place: list[int] = []
        self.group: list[int] = []
        self.response: list[int] = []

    def add(self, tokens: np.ndarray, at: int, *, place: int, group: int, response: int) -> int:
        """Put tokens at flat index `at`, with position ids from `place` on; returns where they end."""
        self.tokens.append(tokens)
        self.start.append(at)
        self.place.append(place)
        self.group.append(group)
        self.response.append(response)
        return at + len(tokens)

    def rows(self, shape: tuple[int, int]) -> dict[str, Any]:
        """input_ids, position_ids, group_ids and response_ids, int64 of `shape`."""
        lengths = np.array([len(tokens) for tokens in self.tokens], dtype=np.int64)
        j = _within(lengths)

        def spread(values: list[int]) -> np.ndarray:
            return np.repeat(np.array(values, dtype=np.int64), lengths)

        columns = {
            "input_ids": (np.concatenate(self.tokens), 0),
            "position_ids": (spread(self.place) + j, 0),
            "group_ids": (spread(self.group), PAD_GROUP),
            "response_ids": (spread(self.response), 0),
        }
        at = spread(self.start) + j
        filled: dict[str, Any] = {}
        for name, (values, padding) in columns.items():
            flat = np.full(shape[0] * shape[1], padding, dtype=np.int64)
            flat[at] = values
            filled[name] = torch.from_numpy(flat.reshape(shape))
        return filled


def _within(lengths: np.ndarray) -> np.ndarray:
    """0, 1, ..., l - 1 for each length l in turn."""
    return np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
