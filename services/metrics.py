"""What a run records about itself: one row per step, seconds and tokens per phase, memory.

`metrics.jsonl` holds one strict-JSON object per step, steps strictly increasing, each with the evaluation
that followed it; step 0 is the base's. A row is written in one call and synced: a kill can cut the last line
only, and `truncate_after` drops it. What is not finite is null there (JSON has no NaN);
`services.watching.alarms` looks at the rows before that.
"""

import json
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil
from pydantic import Field, FiniteFloat, TypeAdapter, ValidationError

from rollout.files import write_whole
from rollout.printable import one_line

Row = dict[str, Any]
_STEP = TypeAdapter(Annotated[int, Field(strict=True, ge=0)])
_INT64 = Annotated[int, Field(ge=-(2**63), lt=2**63)]
_ROW: TypeAdapter[Row] = TypeAdapter(dict[str, bool | _INT64 | FiniteFloat | str | dict[str, _INT64] | None])


def flatten(values: Mapping[str, Any], prefix: str = "") -> Row:
    """{"reward": {"mean": 1}} -> {"reward/mean": 1}. Lists of integers are kept: they become histograms."""
    row: Row = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping):
            row.update(flatten(value, f"{key}/"))
        else:
            row[key] = value.item() if isinstance(value, np.generic) else value
    return row


def expand_lists(row: Mapping[str, Any]) -> Row:
    """Replace every list of integers (lags) by its histogram {"0": 12, "1": 4}; add its `_mean` and `_max`.

    An empty list has an empty histogram and neither mean nor maximum.
    """
    out: Row = {}
    for key, value in row.items():
        if isinstance(value, list | tuple | np.ndarray):
            numbers = [int(item) for item in value]
            out[key] = {str(item): count for item, count in sorted(Counter(numbers).items())}
            if numbers:
                out[f"{key}_mean"] = sum(numbers) / len(numbers)
                out[f"{key}_max"] = max(numbers)
        else:
            out[key] = value
    return out


def strict(value: Any) -> Any:
    """A copy in which NaN and infinities are None, at any depth, and numpy scalars are Python's."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [strict(item) for item in value]
    return value


class MetricsLog:
    """Writes `metrics.jsonl` and TensorBoard events into a run folder.

    log = MetricsLog(run_dir) log.truncate_after(step)            # on resume, before the first row: later
    steps are going to be repeated log.log(step, {"reward": {"mean": 0.1}, "lag": {"policy": [0, 0, 1]}})
    log.close()
    """

    def __init__(
        self, run_dir: str | Path, *, tensorboard: bool = True, clock: Callable[[], float] = time.time
    ) -> None:
        self.path = Path(run_dir) / "metrics.jsonl"
        self._events = Path(run_dir) / "tensorboard"
        self._tensorboard = tensorboard
        self._clock = clock
        self._file: Any = None
        self._pending = b""
        self.problem = ""
        """Why the last row is not in the file yet; empty where it is."""
        self._writer: Any = None
        self._last: int | None = None
        self._purge: int | None = None

    def truncate_after(self, step: int) -> int:
        """Keep rows up to `step`, itself included; returns how many. TensorBoard hides the later ones too.

        Raises RuntimeError once rows were written, ValueError (with the line number) on a damaged line that
        is not the last one.
        """
        if self._file is not None:
            raise RuntimeError("truncate_after must come before the first row")
        self._purge = step + 1
        rows = read_metrics(self.path, step) if self.path.exists() else []
        if self.path.exists():
            write_whole(self.path, "".join(_line(row) for row in rows))
        self._last = rows[-1]["step"] if rows else None
        return len(rows)

    def log(self, step: int, values: Mapping[str, Any]) -> Row:
        """Write one step; returns the flat row (NaN still in it). `time` is now unless `values` has it.
        ValueError on a step that is not new."""
        if self._last is not None and step <= self._last:
            raise ValueError(f"metrics of step {step} come after those of step {self._last}")
        flat = flatten(values)
        row = {"step": step, "time": self._clock(), **expand_lists(flat)}
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("ab", buffering=0)
        self._write(_line(row))
        self._last = step
        if self._tensorboard:
            self._write_events(step, flat, row)
        return row

    def _write(self, text: str) -> None:
        """Append what could not be written before, and this; what a full disk does not take stays here."""
        self._pending += text.encode()
        self.problem = ""
        try:
            while self._pending:
                self._pending = self._pending[self._file.write(self._pending) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            self.problem = f"{self.path} could not be written: {error.strerror}; its rows are kept for later"

    def _write_events(self, step: int, flat: Row, row: Row) -> None:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._events), purge_step=self._purge)
        for key, value in row.items():
            if key in ("step", "time") or isinstance(value, bool) or not isinstance(value, int | float):
                continue
            if math.isfinite(value):
                self._writer.add_scalar(key, value, step, walltime=row["time"])
        for key, value in flat.items():
            if isinstance(value, list | tuple | np.ndarray) and len(value):
                self._writer.add_histogram(key, np.asarray(value), step, walltime=row["time"])
        self._writer.flush()

    def close(self) -> None:
        """Close both files. Harmless when repeated."""
        if self._file is not None:
            self._file.close()
        if self._writer is not None:
            self._writer.close()


def read_metrics(path: str | Path, last: int | None = None) -> list[Row]:
    """All rows of a `metrics.jsonl`, or those up to step `last`, beyond which nothing is read.

    A last line cut short by a kill is left out; any other bad line is an error.

    Raises:
        ValueError: with file and line; no row, or its step does not come after the one before.
        OSError: the file cannot be read.
    """
    lines = Path(path).read_bytes().splitlines(keepends=True)
    rows: list[Row] = []
    for number, line in enumerate(lines, start=1):
        if rows and rows[-1]["step"] == last:
            break
        try:
            row = _ROW.validate_json(line)
            step = _STEP.validate_python(row.get("step"))
        except ValidationError as error:
            if number == len(lines) and not line.endswith(b"\n"):
                break
            reason = one_line(error.errors(include_url=False, include_input=False)[0]["msg"])
            raise ValueError(f"{path}:{number}: not a row of metrics ({reason}); delete the line") from None
        if rows and step <= rows[-1]["step"]:
            raise ValueError(
                f"{path}:{number}: step {step} comes after step {rows[-1]['step']}; delete the line"
            )
        if last is None or step <= last:
            rows.append(row)
    return rows


def _line(row: Row) -> str:
    return json.dumps(strict(row), allow_nan=False, ensure_ascii=False) + "\n"


class PhaseTimer:
    """Seconds and tokens per phase, of the running step and of the whole run.

    with timer("generate"):
        ...
    timer.tokens("generate", 4096)
    row = timer.take()                  # {"generate": 7.1} of this step, then counts from zero

    Phases may overlap (the discriminator trains while the policy generates), so shares can add up to more
    than the wall time. The clock is injected: any callable that returns seconds; `entered` is told each phase
    as it begins.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.perf_counter,
        entered: Callable[[str], None] = lambda phase: None,
    ) -> None:
        self._clock = clock
        self._entered = entered
        self._step: dict[str, float] = {}
        self._seconds: dict[str, float] = {}
        self._tokens: dict[str, int] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Add the block's duration to `phase`, also when the block raises."""
        start = self._clock()
        self._entered(phase)
        try:
            yield
        finally:
            self.add(phase, self._clock() - start)

    def add(self, phase: str, seconds: float) -> None:
        """Add seconds that another process measured."""
        self._step[phase] = self._step.get(phase, 0.0) + seconds
        self._seconds[phase] = self._seconds.get(phase, 0.0) + seconds

    def tokens(self, phase: str, count: int) -> None:
        """Count tokens that went through `phase`."""
        self._tokens[phase] = self._tokens.get(phase, 0) + count

    def take(self) -> dict[str, float]:
        """Seconds per phase since the last call."""
        step, self._step = self._step, {}
        return step

    def totals(self) -> dict[str, dict[str, float | int]]:
        """{"generate": {"seconds": 71.2, "tokens": 40960}} of the whole run, in order of first use."""
        names = list(dict.fromkeys((*self._seconds, *self._tokens)))
        return {n: {"seconds": self._seconds.get(n, 0.0), "tokens": self._tokens.get(n, 0)} for n in names}

    def state_dict(self) -> dict[str, Any]:
        """Totals, for a checkpoint."""
        return {"seconds": dict(self._seconds), "tokens": dict(self._tokens)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint's totals."""
        self._seconds, self._tokens, self._step = dict(state["seconds"]), dict(state["tokens"]), {}


def process_memory() -> dict[str, float]:
    """Memory of this process in MiB: `rss`, and `cuda_allocated`, `cuda_peak` where this process uses CUDA.

    Torch is asked only if the process has imported it already.
    """
    memory = {"rss": psutil.Process().memory_info().rss / 2**20}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        memory["cuda_allocated"] = torch.cuda.memory_allocated() / 2**20
        memory["cuda_peak"] = torch.cuda.max_memory_allocated() / 2**20
    return memory
