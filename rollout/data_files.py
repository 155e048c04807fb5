"""Which files lie behind a path: all of one data set and nothing twice, or a DataError.

Hidden copies and caches are left out, as `datasets` does. A file that looks like data but cannot be read here
is refused instead of left out, and what is left out for its split is noted.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

from rollout.rows import DataError, ReadReport

_FORMATS = {
    ".jsonl": "JSON Lines",
    ".ndjson": "JSON Lines",
    ".json": "JSON Lines",
    ".parquet": "Parquet",
    ".arrow": "Arrow",
}
_DESCRIPTIONS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
_OTHER_DATA = re.compile(
    r"\.(jsonl?|ndjson|parquet|arrow|feather|csv|tsv|xlsx?|gz|bz2|zst|xz|lz4|zip|tar|tgz|7z)\b", re.IGNORECASE
)
_SPLIT_NAME = re.compile(
    r"(?:^|.*[-._ ])((?:train(?:ing)?|validation|valid|val|dev|test|eval)(?:_\w+)?)(?:[-.]|$)", re.IGNORECASE
)


def data_files(path: Path, report: ReadReport, split: str = "") -> list[Path]:
    """The data files behind a path: itself, or those of a saved Hugging Face dataset or folder of files, in
    order. Of several splits `split` is read, or "train" where none is named.

    Raises DataError.
    """
    try:
        return _files(path, report, split)
    except OSError as error:
        raise DataError(f"{error.filename or path}: cannot be read: {error.strerror}") from error


def _files(path: Path, report: ReadReport, split: str) -> list[Path]:
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    if not path.is_dir():
        files = [path]
    elif (path / "dataset_dict.json").is_file():
        splits = _names(path / "dataset_dict.json", "splits")
        name = _chosen(path, splits, split)
        report.notes.append(f'split "{name}" of {", ".join(splits)}')
        return _files(path / name, report, "")
    elif (path / "state.json").is_file():
        if _description(path / "state.json").get("_indices_data_files"):
            raise DataError(f"{path}: saved with an index; call flatten_indices() before save_to_disk()")
        files = [path / name for name in _names(path / "state.json", "_data_files")]
    else:
        files = _folder(path, report, split)
    for file in files:
        if not file.is_file():
            raise DataError(f"{file}: file is missing, or no regular file")
        if file.stat().st_size == 0:
            raise DataError(f"{file}: file is empty")
    return files


def _description(file: Path) -> dict[str, Any]:
    """The JSON object by which a saved dataset describes itself."""
    try:
        said = json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        said = None
    if not isinstance(said, dict):
        raise DataError(f"{file}: is no JSON object; save the dataset again with save_to_disk()")
    return said


def _names(file: Path, key: str) -> list[str]:
    """The plain names that a description lists under `key`: nothing outside its folder."""
    said = _description(file).get(key)
    entries = said if isinstance(said, list) else []
    names = [entry.get("filename") if isinstance(entry, dict) else entry for entry in entries]
    plain = [name for name in names if isinstance(name, str) and Path(name).name == name != ".."]
    if not names or plain != names:
        raise DataError(
            f"{file}: {key!r} is no list of plain file names; save the dataset again with save_to_disk()"
        )
    return plain


def _folder(path: Path, report: ReadReport, split: str) -> list[Path]:
    """All data files of a folder, or of one of its splits."""
    seen = [p for p in _below(path) if not _left_alone(p.relative_to(path))]
    files = [p for p in seen if p.suffix.lower() in _FORMATS]
    if not files:
        raise DataError(f"{path}: folder holds no .jsonl, .parquet or .arrow file")
    if others := [str(p.relative_to(path)) for p in seen if p not in files and _OTHER_DATA.search(p.name)]:
        raise DataError(
            f"{path}: also holds {', '.join(others[:3])}, which would be left out; unpack or convert it, "
            "move it away, or name the file to read"
        )
    files = _one_split(path, files, report, split)
    if len({_FORMATS[p.suffix.lower()] for p in files}) > 1:
        suffixes = sorted({p.suffix for p in files})
        raise DataError(f"{path}: holds {', '.join(suffixes)} files; leave one kind there, or name the file")
    if len(files) > 1:
        report.notes.append(f"{len(files)} files")
    return files


def _below(path: Path) -> list[Path]:
    """All files below a folder, behind links too, each folder once. Raises OSError for an unreadable one."""

    def refuse(error: OSError) -> None:
        raise error

    found: list[Path] = []
    visited: set[str] = set()
    for folder, inner, names in os.walk(path, onerror=refuse, followlinks=True):
        inner.sort()
        if (real := os.path.realpath(folder)) in visited:
            inner.clear()
            continue
        visited.add(real)
        found += [Path(folder, name) for name in names]
    return sorted(found)


def _left_alone(file: Path) -> bool:
    """Hidden files (also copies that notebooks make), descriptions, and what `datasets` caches."""
    hidden = any(part.startswith((".", "__")) for part in file.parts)
    return (
        hidden or file.name in _DESCRIPTIONS or (file.name.startswith("cache-") and file.suffix == ".arrow")
    )


def _one_split(path: Path, files: list[Path], report: ReadReport, split: str) -> list[Path]:
    """Of files that are named after splits, as on the hub, those of one; others as they are."""
    splits = {file: _split_of_file(file.relative_to(path)) for file in files}
    names = sorted(set(splits.values()) - {""})
    if not names or (len(names) == 1 and not split):
        return files
    name = _chosen(path, names, split)
    chosen = [file for file in files if splits[file] == name]
    report.notes.append(f'split "{name}" of {", ".join(names)}')
    if nameless := [file.name for file in files if not splits[file]]:
        report.notes.append(f"of no split, and left out: {', '.join(nameless)}")
    return chosen


def _chosen(path: Path, splits: list[str], split: str) -> str:
    """The split to read."""
    name = split or (splits[0] if len(splits) == 1 else "train")
    if name not in splits:
        likely = next((known for known in splits if known.startswith("train")), splits[0])
        raise DataError(f'{path}: has the splits {", ".join(splits)}; set data.split, as in "{likely}"')
    return name


def _split_of_file(file: Path) -> str:
    """The split in `test-00000-of-00001.parquet`, `test/0000.parquet` or `set-test.jsonl`, or nothing."""
    for part in reversed(file.parts):
        if name := _SPLIT_NAME.match(part):
            return name[1]
    return ""
