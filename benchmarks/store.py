"""Raw results: one JSON file a run, written whole or not at all, so that an interrupted grid goes on where it
stopped. Nothing is deleted: results of settings that are no longer declared stay, and are not read."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rollout.files import write_whole
from services.metrics import strict

RESULTS = Path("benchmarks/results")

Result = dict[str, Any]


def write(path: Path, result: Mapping[str, Any]) -> None:
    """Write a result; NaN becomes null, numbers keep six digits."""
    write_whole(path, _compact(strict(_rounded(result))))


def read(path: Path) -> Result | None:
    """A result, or None where there is none yet."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return value


def _compact(result: Mapping[str, Any]) -> str:
    """One line an entry, and one an item of the long lists: small, and a diff says what changed."""
    lines = []
    for key, value in result.items():
        if isinstance(value, list) and value:
            items = ",\n    ".join(json.dumps(item) for item in value)
            lines.append(f"  {json.dumps(key)}: [\n    {items}\n  ]")
        else:
            lines.append(f"  {json.dumps(key)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"
