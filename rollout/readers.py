"""Checked rows from JSONL, Parquet and Arrow files, a batch at a time.

Every format goes through `check_row`, so a wrong value gets the same message everywhere. Defects of a file
(missing, empty, binary, a column that is not there) always stop; defects of a row stop or are skipped and
counted, as the `ReadReport` says. No more than BATCH_ROWS rows are Python objects at any time.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq

from rollout.credentials import Redacted

BATCH_ROWS = 8192
_EXAMPLES = 5
_SPLIT_NAME = re.compile(r"((?:train|validation|valid|val|dev|test|eval)(?:_\w+)?)(?:[-.]|$)")
_SURROGATE = re.compile("[\ud800-\udfff]")
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bzip2",
    b"PK\x03\x04": "zip",
    b"\xfd7zXZ": "xz",
}


class DataError(Redacted, ValueError):
    """Input that cannot be used. The message names file and row, or the setting, and says what to do."""


@dataclass(frozen=True)
class Row:
    """One checked row: the prompt as text or as the JSON of its chat messages, and where it came from."""

    where: str
    prompt: str
    responses: tuple[str, ...] = ()
    """One per response column that was asked for."""


@dataclass
class ReadReport:
    """What became of the rows of one source."""

    source: str
    stop: bool
    kept: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    """Reason → rows."""
    examples: list[str] = field(default_factory=list)
    """The first few skipped rows with file, row and reason."""
    notes: list[str] = field(default_factory=list)

    def bad_row(self, where: str, reason: str, kind: str | None = None) -> None:
        """Raise DataError, or count the row under `kind` (default: the reason) and go on."""
        if self.stop:
            raise DataError(f'{where}: {reason} (data.on_error = "skip" leaves such rows out)')
        if len(self.examples) < _EXAMPLES:
            self.examples.append(f"{where}: {reason}")
        self.skip(1, kind or reason.split(":")[0])

    def skip(self, rows: int, reason: str) -> None:
        """Count rows left out for a reason that is not a defect of the row."""
        self.skipped[reason] = self.skipped.get(reason, 0) + rows

    def examples_text(self) -> str:
        """The examples for the end of an error message, or nothing."""
        return "; skipped: " + "; ".join(self.examples) if self.examples else ""

    def summary(self) -> str:
        """One line: source, rows kept, rows skipped by reason, notes."""
        parts = [f"{self.source}: {self.kept} rows"]
        parts += [f"{count} skipped ({reason})" for reason, count in sorted(self.skipped.items())]
        return ", ".join(parts + self.notes)


def read_batches(
    path: Path, prompt_column: str, response_columns: Sequence[str], prompt_format: str, report: ReadReport
) -> Iterator[list[Row]]:
    """Checked rows of a file, or of every data file of a folder, at most BATCH_ROWS at a time.

    Without `response_columns` prompts only are read; two of them are the answers of a preference pair, the
    preferred one first. Raises DataError.
    """
    columns = [prompt_column, *response_columns]
    for file in data_files(path, report):
        raw = (
            _parquet(file, columns)
            if _is_parquet(file)
            else _arrow(file, columns)
            if file.suffix == ".arrow"
            else _jsonl(file, report)
        )
        rows: list[Row] = []
        for where, record in raw:
            row = check_row(where, record, prompt_column, response_columns, prompt_format, report)
            if row is not None:
                rows.append(row)
            if len(rows) == BATCH_ROWS:
                yield rows
                rows = []
        if rows:
            yield rows


def data_files(path: Path, report: ReadReport) -> list[Path]:
    """The data files behind a path: itself, or those of a saved Hugging Face dataset or folder of files, in
    order. Of several splits "train" is read.
    """
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    if path.is_file():
        if path.stat().st_size == 0:
            raise DataError(f"{path}: file is empty")
        return [path]
    if (path / "dataset_dict.json").is_file():
        splits = json.loads((path / "dataset_dict.json").read_text())["splits"]
        name = splits[0] if len(splits) == 1 else "train"
        if name not in splits:
            raise DataError(
                f"{path}: has the splits {', '.join(splits)}; name one of them, e.g. {path / splits[0]}"
            )
        report.notes.append(f'split "{name}" of {", ".join(splits)}')
        return data_files(path / name, report)
    if (path / "state.json").is_file():
        state = json.loads((path / "state.json").read_text())
        if state.get("_indices_data_files"):
            raise DataError(f"{path}: saved with an index; call flatten_indices() before save_to_disk()")
        files = [path / entry["filename"] for entry in state["_data_files"]]
    else:
        files = sorted(
            p for p in path.rglob("*") if p.suffix in (".jsonl", ".parquet", ".arrow") and p.is_file()
        )
        files = _one_split(path, files, report)
        suffixes = {p.suffix for p in files}
        if len(suffixes) > 1:
            raise DataError(f"{path}: holds {', '.join(sorted(suffixes))} files; name the file to read")
    if not files:
        raise DataError(f"{path}: folder holds no .jsonl, .parquet or .arrow file")
    for file in files:
        if not file.is_file() or file.stat().st_size == 0:
            raise DataError(f"{file}: file is missing or empty")
    return files


def _one_split(path: Path, files: list[Path], report: ReadReport) -> list[Path]:
    """Of files that are named after several splits, as on the hub, those of "train"; others as they are."""
    splits = {file: _split_of_file(file.relative_to(path)) for file in files}
    names = sorted(set(splits.values()) - {""})
    if len(names) < 2:
        return files
    if "train" not in names:
        example = next(file for file in files if splits[file] == names[0])
        raise DataError(f"{path}: has the splits {', '.join(names)}; name a file of one, e.g. {example}")
    report.notes.append(f'split "train" of {", ".join(names)}')
    return [file for file in files if splits[file] == "train"]


def _split_of_file(file: Path) -> str:
    """The split in `test-00000-of-00001.parquet` or `test/0000.parquet`; empty where none is named."""
    for part in reversed(file.parts):
        if name := _SPLIT_NAME.match(part):
            return name[1]
    return ""


def check_row(
    where: str,
    record: dict[str, Any],
    prompt_column: str,
    response_columns: Sequence[str],
    prompt_format: str,
    report: ReadReport,
) -> Row | None:
    """The row, or None when it is bad and bad rows are skipped."""
    complaint = _complaint(record, prompt_column, response_columns, prompt_format)
    if complaint is not None:
        kind, reason = complaint
        report.bad_row(where, reason, kind)
        return None
    prompt = record[prompt_column]
    if isinstance(prompt, list):
        prompt = [{k: v for k, v in message.items() if v is not None} for message in prompt]
    if prompt_format == "chat":
        prompt = json.dumps(prompt, ensure_ascii=False)
    return Row(where, prompt, tuple(record[column] for column in response_columns))


def _complaint(
    record: dict[str, Any], prompt_column: str, response_columns: Sequence[str], prompt_format: str
) -> tuple[str, str] | None:
    """(kind, reason) why the row cannot be used, or None."""
    for column in (prompt_column, *response_columns):
        if column not in record:
            found = ", ".join(map(repr, record)) or "none"
            return "missing column", f"column {column!r} is missing; columns here: {found}"
    prompt = record[prompt_column]
    if isinstance(prompt, list):
        if problem := _check_messages(prompt, prompt_format):
            return "bad prompt", f"{prompt_column!r} {problem}"
    elif not isinstance(prompt, str):
        return "bad prompt", f"{prompt_column!r} is {_name(prompt)}, not a string or chat messages"
    text = json.dumps(prompt, ensure_ascii=False)
    for column in response_columns:
        response = record[column]
        if not isinstance(response, str):
            return "bad response", f"{column!r} is {_name(response)}, not a string"
        if not response.strip():
            return "empty response", f"{column!r} is empty"
        text += response
    if len({record[column] for column in response_columns}) < len(response_columns):
        both = " and ".join(map(repr, response_columns))
        return "equal responses", f"{both} hold the same text, which says nothing about either"
    if _SURROGATE.search(text):
        return "broken text", "text holds half of a surrogate pair, which is no character"
    return None


def _check_messages(messages: list[Any], prompt_format: str) -> str | None:
    if prompt_format != "chat":
        return 'holds chat messages; set data.prompt_format = "chat"'
    if not messages:
        return "is an empty list of messages"
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            return f"message {number} is not an object with a role"
        if not isinstance(message.get("content"), str):
            return f"message {number} has {_name(message.get('content'))} as content, not a string"
    if messages[-1]["role"] == "assistant":
        return "ends with an assistant message; the answer belongs in the response column"
    return None


def _name(value: object) -> str:
    names = {
        type(None): "null",
        dict: "an object",
        list: "a list",
        bool: "a boolean",
        int: "a number",
        float: "a number",
    }
    return names.get(type(value), type(value).__name__)


def _is_parquet(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(4) == b"PAR1" or file.suffix == ".parquet"


def _jsonl(file: Path, report: ReadReport) -> Iterator[tuple[str, dict[str, Any]]]:
    with file.open("rb") as stream:
        head = stream.read(4096)
    for magic, name in _COMPRESSED.items():
        if head.startswith(magic):
            raise DataError(f"{file}: {name}-compressed; unpack it first")
    if b"\0" in head:
        raise DataError(f"{file}: binary file; JSON Lines (UTF-8), Parquet or a dataset folder is expected")
    if head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        raise DataError(f"{file}: a JSON array; JSON Lines is expected, one object a line")
    seen = False
    with file.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            where = f"{file}:{number}"
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            seen = True
            try:
                record = json.loads(line.decode())
            except UnicodeDecodeError as error:
                report.bad_row(where, f"byte {error.start + 1} of the line is not UTF-8", "not UTF-8")
                continue
            except json.JSONDecodeError as error:
                report.bad_row(
                    where, f"malformed JSON: {error.msg} at column {error.colno}", "malformed JSON"
                )
                continue
            if not isinstance(record, dict):
                report.bad_row(where, f"{_name(record)} where an object is expected", "not an object")
                continue
            yield where, record
    if not seen:
        raise DataError(f"{file}: file holds only blank lines")


def _parquet(file: Path, columns: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        parquet = pq.ParquetFile(file)
    except pa.ArrowInvalid as error:
        raise DataError(f"{file}: not a readable Parquet file: {error}") from error
    with parquet:
        _require_columns(file, parquet.schema_arrow, columns)
        if parquet.metadata.num_rows == 0:
            raise DataError(f"{file}: file has no rows")
        number = 0
        try:
            for batch in parquet.iter_batches(batch_size=BATCH_ROWS, columns=columns):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{file}, row {number}", record
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(f"{file}: damaged after row {number}: {error}") from error


def _arrow(file: Path, columns: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        with pa.memory_map(str(file)) as source:
            reader = _arrow_batches(source)
            schema = next(reader)
            _require_columns(file, schema, columns)
            number = 0
            for batch in reader:
                for start in range(0, batch.num_rows, BATCH_ROWS):
                    for record in batch.select(columns).slice(start, BATCH_ROWS).to_pylist():
                        number += 1
                        yield f"{file}, row {number}", record
    except pa.ArrowInvalid as error:
        raise DataError(f"{file}: not a readable Arrow file: {error}") from error


def _arrow_batches(source: pa.NativeFile) -> Iterator[Any]:
    """First the schema, then the record batches, of an Arrow stream (what `datasets` writes) or file."""
    if source.read(6) == b"ARROW1":
        source.seek(0)
        file_reader = pa.ipc.open_file(source)
        yield file_reader.schema
        for index in range(file_reader.num_record_batches):
            yield file_reader.get_batch(index)
        return
    source.seek(0)
    stream_reader = pa.ipc.open_stream(source)
    yield stream_reader.schema
    yield from stream_reader


def _require_columns(file: Path, schema: pa.Schema, columns: list[str]) -> None:
    for column in columns:
        if column not in schema.names:
            raise DataError(
                f"{file}: column {column!r} is missing; columns here: {', '.join(map(repr, schema.names))}"
            )
