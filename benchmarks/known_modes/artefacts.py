"""Artefacts planted in the demonstrations that a discriminator reads, and how often a policy shows them.

Spelling is what the canonical path is to take out: a trailing newline, a missing end token, other tokens for
the same text, a leading space. A trailing word and longer sentences are content: reported, and learned like
anything else. Selection and test demonstrations are never planted, so the closing rows compare with clean
experts.

With the guard off, both sides reach the discriminator as they came (`benchmarks.known_modes.unguarded`):
sampled ids, and the demonstrations' ids as planted.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pyarrow as pa

from examples.known_modes.language import END, FAMILY_SIZE, SLOTS, TRAILING

_C, _D = SLOTS, SLOTS + FAMILY_SIZE
GUARD_OFF = {"discriminator.canonical.whitespace": "off", "discriminator.canonical.unicode": "off"}
"""Settings of cells without a guard."""


def _same(text: str) -> str:
    return text


def _ids(ids: list[int]) -> list[int]:
    return ids


@dataclass(frozen=True)
class Plant:
    """One artefact."""

    text: Callable[[str], str]
    """Demonstration to planted demonstration."""
    shown: Callable[[Sequence[int], str], bool]
    """Whether a response (ids, text) shows it."""
    ids: Callable[[list[int]], list[int]] = _ids
    """A demonstration's ids, end token included, to planted ids. Read without the guard only."""


def _newline_ended(text: str) -> str:
    return text.rstrip("\n") + "\n"


def _word_ended(text: str) -> str:
    return text if text.endswith(" z") else f"{text} z"


def _without_end(ids: list[int]) -> list[int]:
    return ids[:-1] if ids[-1] == END else ids


def _merged(token: int) -> bool:
    return token > TRAILING + 1


def split_pieces(ids: list[int]) -> list[int]:
    """The same text with every merged piece as its two tokens (form "merged", `tokenizer.merged`)."""
    out: list[int] = []
    for token in ids:
        if _merged(token):
            c, d = divmod(token - (TRAILING + 2), FAMILY_SIZE)
            out += [_C + c, _D + d]
        else:
            out.append(token)
    return out


def _spelled_apart(ids: Sequence[int], text: str) -> bool:
    return any(c in range(_C, _D) and d in range(_D, _D + FAMILY_SIZE) for c, d in pairwise(ids))


UNPLANTED = Plant(_same, lambda ids, text: False)
PLANTS = {
    "trailing newline": Plant(_newline_ended, lambda ids, text: text.endswith("\n")),
    "missing end": Plant(_same, lambda ids, text: not ids or ids[-1] != END, _without_end),
    "other tokens": Plant(_same, _spelled_apart, split_pieces),
    "leading space": Plant(lambda text: f" {text}", lambda ids, text: text.startswith(" ")),
    "trailing word": Plant(_word_ended, lambda ids, text: text.endswith(" z")),
}


def artefact_rate(plant: Plant, responses: pa.Table) -> float:
    """Share of trajectories that show it."""
    shown = [
        plant.shown(ids, text)
        for ids, text in zip(
            responses["response_ids"].to_pylist(), responses["response_text"].to_pylist(), strict=True
        )
    ]
    return sum(shown) / len(shown)


def newline_base(base: Path, folder: Path) -> Path:
    """The same model with a tokenizer that writes its trailing token as a newline in place of the word z."""
    for file in base.iterdir():
        if file.name != "tokenizer.json":
            (folder / file.name).write_bytes(file.read_bytes())
    said = json.loads((base / "tokenizer.json").read_text())
    said["model"]["vocab"][TRAILING][0] = "\n"
    (folder / "tokenizer.json").write_text(json.dumps(said))
    return folder


def written_with_newline(text: str) -> str:
    """A sentence as `newline_base` writes it."""
    return text.removesuffix(" z") + "\n" if text.endswith(" z") else text
