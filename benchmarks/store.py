"""Raw results: a run leaves one JSON file, whole or absent, so that an interrupted grid goes on where it
stopped. `pack` moves them into one compressed Parquet file a grid, which is what the repository keeps.

Both are read alike, under the JSON file's path. Nothing is deleted: results of settings that are no longer
declared stay, and are not read.
"""

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rollout.files import write_whole
from services.metrics import strict

RESULTS = Path("benchmarks/results")
DIGITS = 6
STEP_DIGITS = 4
"""Of the metrics of every step, which are only drawn."""

Result = dict[str, Any]


def write(path: Path, result: Mapping[str, Any]) -> None:
    """Write a result; NaN becomes null, numbers keep `DIGITS` digits, those of `steps` fewer."""
    kept = {
        name: _rounded(value, STEP_DIGITS if name == "steps" else DIGITS) for name, value in result.items()
    }
    write_whole(path, json.dumps(strict(kept), separators=(",", ":")) + "\n")


def read(path: Path) -> Result | None:
    """A result, or None where there is none yet."""
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    for folder in path.parents[:2]:
        text = _packed(folder.with_suffix(".parquet")).get(str(path.relative_to(folder)))
        if text is not None:
            return json.loads(text)
    return None


def below(folder: Path) -> list[Path]:
    """Paths of all results of a grid's folder, sorted."""
    packed = (folder / name for name in _packed(folder.with_suffix(".parquet")))
    return sorted({*folder.rglob("*.json"), *packed})


def pack(folder: Path) -> Path:
    """Move a grid's JSON files into its Parquet file (name, result); returns that."""
    target = folder.with_suffix(".parquet")
    loose = {str(path.relative_to(folder)): path for path in folder.rglob("*.json")}
    texts = _packed(target) | {name: path.read_text(encoding="utf-8").strip() for name, path in loose.items()}
    table = pa.table({"name": sorted(texts), "result": [texts[name] for name in sorted(texts)]})
    scratch = target.with_suffix(".tmp")
    # One page of one row group: results of a grid are much alike, and zstd must see them together.
    pq.write_table(
        table, scratch, compression="zstd", compression_level=22, use_dictionary=False, data_page_size=2**30
    )
    scratch.replace(target)
    for path in loose.values():
        path.unlink()
    return target


def _packed(file: Path) -> dict[str, str]:
    return _read_packed(file, file.stat().st_mtime_ns) if file.is_file() else {}


@lru_cache(maxsize=32)
def _read_packed(file: Path, _changed: int) -> dict[str, str]:
    table = pq.read_table(file)
    return dict(zip(table["name"].to_pylist(), table["result"].to_pylist(), strict=True))


def _rounded(value: Any, digits: int) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{digits}g}")
    if isinstance(value, Mapping):
        return {key: _rounded(item, digits) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item, digits) for item in value]
    return value
