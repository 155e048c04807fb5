"""The demonstrations file of a cell, made anew for each run: all of it follows from cell and seed."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.known_modes.artefacts import PLANTS, written_with_newline
from benchmarks.known_modes.cells import CONFIG, Data
from examples.known_modes.language import BASE, EXPERT, Distribution, text_of
from examples.known_modes.make import write_demonstrations
from rollout.data import prompt_id, split_of
from services.config import load

SELECTION, TEST = 1024, 4096
LONG = Distribution(EXPERT.modes, (0.0, 0.05, 0.15, 0.35, 0.45), EXPERT.slots, EXPERT.trailing)
"""The expert with 5.2 slots in the mean instead of 4, 30 % more."""
TARGETS = {"expert": EXPERT, "base": BASE, "long": EXPERT}
"""What policies are judged against."""


def write_data(path: Path, data: Data, seed: int) -> None:
    """Write `path` (JSON lines): training and held-out demonstrations as `data` says, 1,024 of the selection
    split and 4,096 of the test split."""
    settings = load(CONFIG).data
    sizes = {"train": data.train, "heldout": data.heldout, "selection": SELECTION, "test": TEST}
    drawn = seed if data.seed is None else data.seed
    write_demonstrations(path, sizes, "base" if data.source == "base" else "expert", drawn, settings)
    if data.source != "long" and not data.plant:
        return
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    longer = _texts(LONG, len(rows), drawn)
    for row in rows:
        shown = split_of(prompt_id(row["prompt"]), settings)
        if data.plant == "trailing newline":
            row["response"] = written_with_newline(row["response"])
        if shown in ("train", "heldout"):
            text = next(longer) if data.source == "long" else row["response"]
            row["response"] = PLANTS[data.plant].text(text) if data.plant else text
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def fresh_texts(data: Data, count: int) -> list[str]:
    """New sentences of the distribution that test demonstrations come from."""
    return list(_texts(TARGETS[data.source], count, seed=99))


def _texts(distribution: Distribution, count: int, seed: int) -> Iterator[str]:
    rng = np.random.default_rng([seed, 2])
    return (text_of(sentence) for sentence in distribution.sample(count, rng))
