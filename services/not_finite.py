"""What a run leaves out because it is not finite: counted by side, its samples kept, the run ended at a
limit.

A step is left out for `policy` or `discriminator` when loss or gradient of any of its updates were not
finite; weights then stay as they are. Groups with a score or a log-probability that is not finite are dropped
before the update (`scores`, `logprobs`).
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from services.metrics import strict

MOST_KEPT = 20
"""Samples files of a run."""


class NotFiniteError(RuntimeError):
    """Too many steps in a row were left out; the message says which and what to do."""


def finite_rows(column: pa.ChunkedArray) -> pa.Array:
    """bool [rows]: whether every number of a list column's row is finite."""
    lists = column.combine_chunks()
    finite = np.ones(len(lists), dtype=bool)
    bad = pc.invert(pc.is_finite(lists.flatten()))
    finite[pc.list_parent_indices(lists).filter(bad).to_numpy(zero_copy_only=False)] = False
    return pa.array(finite)


class NotFinite:
    """One run's account of what was left out.

        account.saw("policy", step, bad=metrics["skipped"] > 0, samples=scored, what=metrics)
        account.check()                # after each step

    Args:
        folder: of the run; samples and one line for each case go into `not-finite` there.
        limit: steps in a row of one side after which `check` raises.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder = folder / "not-finite"
        self.limit = limit
        self.counts: Counter[str] = Counter()
        self.in_a_row: Counter[str] = Counter()

    def saw(self, side: str, step: int, *, bad: bool, samples: pa.Table, what: dict[str, Any]) -> None:
        """Count a step of `side`, and keep what a bad one was made of."""
        if bad:
            self.in_a_row[side] += 1
            self.keep(side, step, 1, samples, what)
        else:
            self.in_a_row.pop(side, None)

    def keep(self, side: str, step: int, count: int, samples: pa.Table, what: dict[str, Any]) -> None:
        """Count `count` cases, and write their samples down."""
        self.counts[side] += count
        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"{side}-{step:06d}.parquet"
        if len([*self.folder.glob("*.parquet")]) < MOST_KEPT:
            pq.write_table(samples, self.folder / name)
        with (self.folder / "cases.jsonl").open("a") as file:
            file.write(json.dumps(strict({"step": step, "side": side, "samples": name, **what})) + "\n")

    @property
    def active(self) -> bool:
        """Whether the last step of some side was left out; no checkpoint is then made."""
        return bool(self.in_a_row)

    def check(self) -> None:
        """Raises NotFiniteError at the limit."""
        for side, steps in self.in_a_row.items():
            if steps >= self.limit:
                section = "learner" if side == "policy" else side
                raise NotFiniteError(
                    f"{side}: loss or gradient were not finite in {steps} steps in a row (run.max_skipped), "
                    f"which were left out; lower {section}.lr or {section}.grad_clip. Their samples are in "
                    f"{self.folder}"
                )
