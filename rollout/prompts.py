"""Which prompts come next: shuffled epochs whose order and seeds are pure functions of the run seed.

The order of epoch e depends on (run seed, e, the set of prompts) alone, never on the order of a file or on
what was drawn before, so the cursor is two numbers and a resumed run asks for exactly the prompts it would
have asked for.
"""

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa

from rollout.readers import DataError
from rollout.trajectory import REQUEST_SCHEMA, group_id


class PromptSource:
    """Endless requests over distinct prompts, each prompt once an epoch.

    >>> source = PromptSource(splits.rollout_prompts(), renderer.encode, group_size=8, seed=0)
    >>> requests = source.next(16, step=0)  # REQUEST_SCHEMA, 16 groups
    >>> cursor = source.state()             # JSON-compatible; load_state(cursor) continues after it

    A step that crosses the end of an epoch goes on with the next one, so it may hold a prompt twice; the two
    groups have different ids and seeds. Prompts with and without a demonstration lie evenly among each other:
    n prompts in a row hold one with a demonstration wherever two are to be expected.
    """

    def __init__(
        self,
        prompts: pa.Table,
        encode: Callable[[str], list[int]],
        group_size: int,
        seed: int,
        shuffle: bool = True,
    ) -> None:
        """`prompts`: PROMPT_SCHEMA with distinct prompt ids, and `demonstrated` (bool) where not all have a
        demonstration. Raises DataError when there are none or one repeats.
        """
        if prompts.num_rows == 0:
            raise DataError("no prompts to roll out; check the training split and data.prompts")
        prompts = prompts.sort_by("prompt_id")
        self._prompts = prompts.select(["prompt_id", "prompt_text"])
        identifiers = self._prompts["prompt_id"].to_pylist()
        if len(set(identifiers)) != len(identifiers):
            raise DataError("the prompts of a prompt source must be distinct")
        self._demonstrated = np.ones(len(self), dtype=bool)
        if "demonstrated" in prompts.column_names:
            self._demonstrated = prompts["demonstrated"].to_numpy()
        named = [
            identifier if known else f"{identifier} alone"
            for identifier, known in zip(identifiers, self._demonstrated, strict=True)
        ]
        self._digest = hashlib.blake2b("\n".join(named).encode(), digest_size=8).hexdigest()
        self._encode = encode
        self._group_size = group_size
        self._seed = seed
        self._shuffle = shuffle
        self._epoch = 0
        self._position = 0
        self._order = self._epoch_order()

    def __len__(self) -> int:
        """Prompts in one epoch."""
        return self._prompts.num_rows

    @property
    def epoch(self) -> int:
        """Epochs finished."""
        return self._epoch

    def next(self, n: int, step: int) -> pa.Table:
        """The next `n` prompts as requests of `step` (REQUEST_SCHEMA), and move the cursor past them."""
        rows = []
        for index in range(n):
            if self._position == len(self):
                self._epoch, self._position = self._epoch + 1, 0
                self._order = self._epoch_order()
            at = int(self._order[self._position])
            self._position += 1
            identifier = self._prompts["prompt_id"][at].as_py()
            text = self._prompts["prompt_text"][at].as_py()
            rows.append(
                {
                    "group_id": group_id(step, index),
                    "prompt_id": identifier,
                    "step": step,
                    "prompt_text": text,
                    "prompt_ids": self._encode(text),
                    "n": self._group_size,
                    "seed": request_seed(self._seed, step, identifier, index),
                }
            )
        return pa.Table.from_pylist(rows, schema=REQUEST_SCHEMA)

    def state(self) -> dict[str, Any]:
        """Cursor for a checkpoint."""
        return {"epoch": self._epoch, "position": self._position, "seed": self._seed, "prompts": self._digest}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue after `state()`. Raises DataError when prompts or seed are not those of the checkpoint."""
        if state["prompts"] != self._digest or state["seed"] != self._seed:
            what = "seed" if state["prompts"] == self._digest else "set of training prompts"
            raise DataError(
                f"the {what} is not the one of the checkpoint; resume with the data and seed it was made with"
            )
        self._epoch, self._position = int(state["epoch"]), int(state["position"])
        self._order = self._epoch_order()

    def _epoch_order(self) -> np.ndarray:
        if not self._shuffle:
            return np.arange(len(self))
        rng = np.random.Generator(np.random.PCG64([self._seed, self._epoch]))
        members, places = [], []
        for kind in (np.flatnonzero(self._demonstrated), np.flatnonzero(~self._demonstrated)):
            if len(kind):
                members.append(kind[rng.permutation(len(kind))])
                places.append((np.arange(len(kind)) + rng.random()) / len(kind))
        return np.concatenate(members)[np.argsort(np.concatenate(places), kind="stable")]


def request_seed(seed: int, step: int, identifier: str, index: int) -> int:
    """62-bit sampling seed, a pure function of run seed, step, prompt id and index.

    62 bits leave room for `seed + sample` within a signed 64-bit number.
    """
    digest = hashlib.blake2b(f"{seed}:{step}:{identifier}:{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 2


def evaluation_requests(
    split: pa.Table, encode: Callable[[str], list[int]], samples: int, step: int, seed: int
) -> pa.Table:
    """One request (REQUEST_SCHEMA) for every distinct prompt of a split, sorted by prompt id, `samples`
    responses each.
    """
    texts = dict(zip(split["prompt_id"].to_pylist(), split["prompt_text"].to_pylist(), strict=True))
    rows = [
        {
            "group_id": group_id(step, index),
            "prompt_id": identifier,
            "step": step,
            "prompt_text": texts[identifier],
            "prompt_ids": encode(texts[identifier]),
            "n": samples,
            "seed": request_seed(seed, step, identifier, index),
        }
        for index, identifier in enumerate(sorted(texts))
    ]
    return pa.Table.from_pylist(rows, schema=REQUEST_SCHEMA)
