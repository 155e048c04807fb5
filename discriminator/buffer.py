"""Replay buffer of rollouts: Arrow tables, bounded in bytes and in age, sampled deterministically.

Protocol: `add` takes the trajectories of one step and ignores a step it has already taken, so a repeated
delivery is harmless. A sample is a function of (content, n, step, seed, settings): not of the order of
arrival.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pyarrow import fs

from discriminator.config import BufferConfig

STATE_KEY = b"rlgaf.replay_buffer"
NEEDED = ("trajectory_id", "prompt_id", "step", "policy_version")


class ReplayBuffer:
    """Rollouts of recent steps.

        buffer.add(table, step=7)
        buffer.sample(64, step=7, seed=0)     # 64 rows: replay_fraction of them from steps before 7

    Attributes:
        added, evicted_age, evicted_bytes, sampled, repeated: counters of rows (repeated: of deliveries).
    """

    def __init__(self, config: BufferConfig) -> None:
        self.config = config
        self.added = 0
        self.evicted_age = 0
        self.evicted_bytes = 0
        self.sampled = 0
        self.repeated = 0
        self._tables: dict[int, pa.Table] = {}
        # Kept beside the tables: the same rows read back from Parquet may take a few bytes more or less, and
        # a resumed run must evict what an unbroken one does.
        self._sizes: dict[int, int] = {}
        self._seen: set[int] = set()
        self._newest_version = 0

    def add(self, table: pa.Table, step: int) -> bool:
        """Take in the trajectories of a step; False when this step was taken before (nothing changes then).

        Raises:
            ValueError: a column is missing, or the schema differs from what is held.
        """
        if step in self._seen:
            self.repeated += 1
            return False
        missing = [name for name in NEEDED if name not in table.column_names]
        if missing:
            raise ValueError(f"trajectories of step {step} lack the columns {missing}")
        for held in self._tables.values():
            if not held.schema.equals(table.schema):
                raise ValueError(f"trajectories of step {step} have another schema than those held")
        self._seen.add(step)
        self.added += table.num_rows
        if table.num_rows:
            self._tables[step] = table.replace_schema_metadata(None).combine_chunks()
            self._sizes[step] = self._tables[step].nbytes
            self._newest_version = max(self._newest_version, pc.max(table["policy_version"]).as_py())
            self._evict()
        return True

    def sample(
        self,
        n: int,
        *,
        step: int,
        seed: int,
        replay_fraction: float | None = None,
        recency: float | None = None,
    ) -> pa.Table:
        """Draw up to n rows without replacement, ordered by trajectory_id.

        Fresh rows are those of the newest step held that is not after `step`; the others before it are
        replay, of which there are never more than the fraction: where fresh rows are short, the sample is
        smaller than n; where replay is short, fresh rows fill in. Rows of a side are stratified by prompt: no
        prompt gives two rows more than another that still has some. Replayed rows weigh 2^(-age / recency)
        (weighted sampling without replacement by exponential keys; Efraimidis, Spirakis 2006).

        Raises:
            LookupError: nothing is held up to `step`.
        """
        fraction = self.config.replay_fraction if replay_fraction is None else replay_fraction
        half_life = self.config.recency if recency is None else recency
        steps = sorted(s for s in self._tables if s <= step)
        if not steps:
            raise LookupError(f"the replay buffer holds no rollout up to step {step}")
        fresh = self._tables[steps[-1]].sort_by("trajectory_id")
        old = [self._tables[s] for s in steps[:-1]] if fraction else []
        replay = pa.concat_tables(old).sort_by("trajectory_id") if old else fresh.slice(0, 0)
        most_fresh = min(fresh.num_rows, n - round(n * fraction))
        from_replay = min(replay.num_rows, round(most_fresh * fraction / (1 - fraction)))
        from_fresh = min(fresh.num_rows, n - from_replay)
        rng = np.random.default_rng([seed, step])
        rows = [
            fresh.take(_stratified(fresh["prompt_id"].to_pylist(), np.ones(fresh.num_rows), from_fresh, rng)),
            replay.take(
                _stratified(
                    replay["prompt_id"].to_pylist(), self._weights(replay, half_life), from_replay, rng
                )
            ),
        ]
        self.sampled += from_fresh + from_replay
        return pa.concat_tables(rows).combine_chunks().sort_by("trajectory_id")

    def stats(self) -> dict[str, float]:
        """Numbers for the metrics: rows, bytes, steps, age of the oldest row, counters."""
        versions = [pc.min(t["policy_version"]).as_py() for t in self._tables.values()]
        return {
            "rows": float(self._rows()),
            "bytes": float(self._bytes()),
            "steps": float(len(self._tables)),
            "oldest_age": float(self._newest_version - min(versions, default=self._newest_version)),
            "added": float(self.added),
            "evicted_age": float(self.evicted_age),
            "evicted_bytes": float(self.evicted_bytes),
            "sampled": float(self.sampled),
            "repeated": float(self.repeated),
        }

    def dump(self, path: str | Path, filesystem: fs.FileSystem | None = None) -> None:
        """Write rows and state as one Parquet file."""
        schema_only = pa.table({"trajectory_id": pa.array([], pa.string())})
        steps = sorted(self._tables)
        table = pa.concat_tables([self._tables[s] for s in steps]) if steps else schema_only
        state = {
            "tables": [[s, self._tables[s].num_rows, self._sizes[s]] for s in steps],
            "seen": sorted(self._seen),
            "newest_version": self._newest_version,
            "counters": {name: getattr(self, name) for name in _COUNTERS},
        }
        metadata = {STATE_KEY: json.dumps(state).encode()}
        pq.write_table(table.replace_schema_metadata(metadata), str(path), filesystem=filesystem)

    def load(self, path: str | Path, filesystem: fs.FileSystem | None = None) -> None:
        """Become what was dumped.

        Raises:
            ValueError: a Parquet file that is no dump of a replay buffer.
        """
        table = pq.read_table(str(path), filesystem=filesystem)
        metadata = table.schema.metadata or {}
        if STATE_KEY not in metadata:
            raise ValueError(f"{path} is not a dump of a replay buffer")
        state: dict[str, Any] = json.loads(metadata[STATE_KEY])
        table = table.replace_schema_metadata(None)
        self._tables, self._sizes, begin = {}, {}, 0
        for step, rows, size in state["tables"]:
            self._tables[step] = _copy(table.slice(begin, rows))
            self._sizes[step] = size
            begin += rows
        self._seen = set(state["seen"])
        self._newest_version = state["newest_version"]
        for name in _COUNTERS:
            setattr(self, name, state["counters"][name])

    def _rows(self) -> int:
        return sum(t.num_rows for t in self._tables.values())

    def _bytes(self) -> int:
        return sum(self._sizes.values())

    def _weights(self, table: pa.Table, half_life: float) -> NDArray[np.float64]:
        if half_life == 0:
            return np.ones(table.num_rows)
        age = self._newest_version - table["policy_version"].to_numpy()
        return np.exp2(-age / half_life)

    def _evict(self) -> None:
        oldest = self._newest_version - self.config.max_age
        for step, table in list(self._tables.items()):
            kept = table.filter(pc.greater_equal(table["policy_version"], oldest))
            self.evicted_age += table.num_rows - kept.num_rows
            self._replace(step, table, kept)
        while (excess := self._bytes() - self.config.max_bytes) > 0:
            step = min(self._tables)
            table = self._tables[step]
            # Whole steps go first; of the last one left, as many trailing rows stay as fit by their mean
            # size.
            rows = (
                0
                if len(self._tables) > 1
                else max(0, table.num_rows - 1 - int(excess * table.num_rows / self._sizes[step]))
            )
            self.evicted_bytes += table.num_rows - rows
            self._replace(step, table, _copy(table.slice(table.num_rows - rows)))

    def _replace(self, step: int, before: pa.Table, after: pa.Table) -> None:
        if after.num_rows == 0:
            del self._tables[step], self._sizes[step]
        elif after.num_rows < before.num_rows:
            self._tables[step] = after
            self._sizes[step] = after.nbytes


_COUNTERS = ("added", "evicted_age", "evicted_bytes", "sampled", "repeated")


def _copy(table: pa.Table) -> pa.Table:
    """Own memory: a slice would keep the whole parent alive."""
    return table.take(pa.array(np.arange(table.num_rows)))


def _stratified(
    prompts: Sequence[str], weights: NDArray[np.float64], count: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Row numbers of a draw: every prompt's best-keyed row, then every prompt's second, ... until `count`."""
    keys = rng.exponential(size=len(prompts)) / weights
    order = np.argsort(keys, kind="stable")
    turn: dict[str, int] = {}
    rank = np.empty(len(prompts), dtype=np.int64)
    for row in order:
        rank[row] = turn.get(prompts[row], 0)
        turn[prompts[row]] = rank[row] + 1
    return np.lexsort((keys, rank))[:count].astype(np.int64)
