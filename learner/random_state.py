"""States of a rank's random generators (Python's, numpy's, torch's) in a JSON file."""

import hashlib
import json
import logging
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from learner.whole_state import read_json

log = logging.getLogger(__name__)


def save_random_state(folder: Path, rank: int) -> None:
    """Write this rank's states."""
    numpy = np.random.get_state(legacy=False)
    numpy["state"]["key"] = numpy["state"]["key"].tolist()
    state = {
        "python": random.getstate(),
        "numpy": numpy,
        "torch": _text(torch.get_rng_state()),
        "cuda": _text(torch.cuda.get_rng_state()) if torch.cuda.is_available() else None,
    }
    _file(folder, rank).write_text(json.dumps(state))


def load_random_state(folder: Path, rank: int, ranks: int, saved_ranks: int) -> None:
    """Restore what was saved. Another number of ranks than that of the save seeds the generators anew, from
    rank 0's state and this rank's number, and says so."""
    if ranks == saved_ranks:
        _restore(read_json(_file(folder, rank)))
        return
    log.warning(
        "%s was saved by %d ranks, now there are %d: random generators are seeded anew from it",
        folder, saved_ranks, ranks,
    )  # fmt: skip
    digest = hashlib.sha256(_file(folder, 0).read_bytes() + f"{rank} of {ranks}".encode()).digest()
    seed = int.from_bytes(digest[:4], "big")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _restore(state: dict[str, Any]) -> None:
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    np.random.set_state(state["numpy"])
    torch.set_rng_state(_tensor(state["torch"]))
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(_tensor(state["cuda"]))


def _file(folder: Path, rank: int) -> Path:
    return folder / f"random-{rank}.json"


def _text(state: torch.Tensor) -> str:
    return state.numpy().tobytes().hex()


def _tensor(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
