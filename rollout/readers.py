"""Checked rows from JSONL, Parquet and Arrow files, a batch at a time.

Every row goes through `rollout.rows.check_row`. Defects of a file (missing, empty, damaged, another format, a
column that is not there) always stop with a DataError that names the file, whatever the bytes are: nothing is
memory-mapped, and every Arrow batch is validated before a value of it is read. No more than BATCH_ROWS rows
are Python objects at any time.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq

from rollout.data_files import data_files
from rollout.rows import DataError, ReadReport, Row, check_row, name_of

BATCH_ROWS = 8192
_UNREADABLE = (pa.ArrowException, OSError, ValueError, LookupError, ArithmeticError, MemoryError, ImportError)
"""What pyarrow raises for damaged bytes, beside Arrow's own errors: UnicodeDecodeError, OverflowError, …"""
_OTHER_KINDS = {
    b"version https://git-lfs": "a Git LFS pointer, not the data; fetch them with `git lfs pull`",
    b"\x1f\x8b": "gzip-compressed; unpack it first",
    b"\x28\xb5\x2f\xfd": "zstd-compressed; unpack it first",
    b"BZh": "bzip2-compressed; unpack it first",
    b"PK\x03\x04": "zip-compressed; unpack it first",
    b"\xfd7zXZ": "xz-compressed; unpack it first",
    b"\xff\xfe": "UTF-16 text; save it as UTF-8",
    b"\xfe\xff": "UTF-16 text; save it as UTF-8",
    b"<": "an HTML or XML page, as a failed download leaves it",
    b"[": "a JSON array; JSON Lines is expected, one object a line",
}
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"
_CSV_REMEDY = "convert it to JSON Lines, as pandas.read_csv(…).to_json(…, orient='records', lines=True) does"


def read_batches(
    path: Path,
    prompt_column: str,
    response_columns: Sequence[str],
    prompt_format: str,
    report: ReadReport,
    split: str = "",
) -> Iterator[list[Row]]:
    """Checked rows of a file, or of every data file of a folder, at most BATCH_ROWS at a time.

    Without `response_columns` prompts only are read; two of them are the answers of a preference pair, the
    preferred one first. `split`: see `data_files`. Raises DataError.
    """
    for file in data_files(path, report, split):
        rows: list[Row] = []
        for where, record in _records(file, prompt_column, response_columns, report):
            row = check_row(where, record, prompt_column, response_columns, prompt_format, report)
            if row is not None:
                rows.append(row)
            if len(rows) == BATCH_ROWS:
                yield rows
                rows = []
        if rows:
            yield rows


def _records(
    file: Path, prompt: str, responses: Sequence[str], report: ReadReport
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Place and record of every row. Raises DataError for whatever is wrong with the file."""
    columns, kind = [prompt, *responses], "JSON Lines"
    try:
        with file.open("rb") as stream:
            head = stream.read(4096)
        _refuse_other_kinds(file, head, columns)
        if head.startswith(b"PAR1") or file.suffix.lower() == ".parquet":
            kind = "Parquet"
            yield from _parquet(file, prompt, responses)
        elif head.startswith(b"ARROW1") or file.suffix.lower() == ".arrow":
            kind = "Arrow"
            yield from _arrow(file, prompt, responses, report)
        else:
            yield from _jsonl(file, head, report)
    except DataError:
        raise
    except _UNREADABLE as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"{file}: damaged, or not a readable {kind} file: {reason}") from error


def _refuse_other_kinds(file: Path, head: bytes, columns: list[str]) -> None:
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    for magic, kind in _OTHER_KINDS.items():
        if text.startswith(magic):
            raise DataError(f"{file}: {kind}")
    first = text.split(b"\n")[0].decode(errors="replace")
    for name, separator in (("comma", ","), ("tab", "\t"), ("semicolon", ";")):
        if set(columns) <= {cell.strip().strip('"') for cell in first.split(separator)} and columns[1:]:
            raise DataError(f"{file}: {name}-separated values; {_CSV_REMEDY}")
    if file.suffix.lower() in (".csv", ".tsv"):
        raise DataError(f"{file}: a {file.suffix[1:].upper()} file; {_CSV_REMEDY}")


def _jsonl(file: Path, head: bytes, report: ReadReport) -> Iterator[tuple[str, dict[str, Any]]]:
    if b"\0" in head:
        raise DataError(f"{file}: binary file; JSON Lines (UTF-8), Parquet or a dataset folder is expected")
    seen = False
    with file.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            where = f"{file}:{number}"
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            seen = True
            record, problem = _parsed(line)
            if problem:
                report.bad_row(where, *problem)
            elif not isinstance(record, dict):
                report.bad_row(where, f"{name_of(record)} where an object is expected", "not an object")
            else:
                yield where, record
    if not seen:
        raise DataError(f"{file}: file holds only blank lines")


def _parsed(line: bytes) -> tuple[Any, tuple[str, str] | None]:
    """The JSON value of a line, or (reason, kind) why there is none."""
    try:
        return json.loads(line.decode()), None
    except UnicodeDecodeError as error:
        return None, (f"byte {error.start + 1} of the line is not UTF-8", "not UTF-8")
    except json.JSONDecodeError as error:
        return None, (f"malformed JSON: {error.msg} at column {error.colno}", "malformed JSON")
    except RecursionError:
        return None, ("malformed JSON: nested too deeply", "malformed JSON")
    except ValueError as error:  # an integer of more than 4,300 digits
        return None, (f"malformed JSON: {error}", "malformed JSON")


def _parquet(file: Path, prompt: str, responses: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    with pq.ParquetFile(file) as parquet:
        _check_columns(file, parquet.schema_arrow, prompt, responses)
        rows, number = parquet.metadata.num_rows, 0
        batches = parquet.iter_batches(batch_size=BATCH_ROWS, columns=[prompt, *responses])
        for number, record in enumerate(_validated(batches, [prompt, *responses]), 1):
            yield f"{file}, row {number}", record
        if number != rows:
            raise DataError(f"{file}: damaged: {number} of {rows} rows can be read")
        if not rows:
            raise DataError(f"{file}: file has no rows")


def _arrow(
    file: Path, prompt: str, responses: Sequence[str], report: ReadReport
) -> Iterator[tuple[str, dict[str, Any]]]:
    with pa.OSFile(str(file)) as source:
        batches = _arrow_batches(source)
        _check_columns(file, next(batches), prompt, responses)
        for number, record in enumerate(_validated(batches, [prompt, *responses]), 1):
            yield f"{file}, row {number}", record
        source.seek(source.size() - len(_END_OF_STREAM))
        if source.read() not in (_END_OF_STREAM, _END_OF_STREAM[:2] + b"ARROW1"):
            report.notes.append(f"{file.name} has no end mark and may have lost its last rows")


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


def _validated(batches: Iterable[pa.RecordBatch], columns: list[str]) -> Iterator[dict[str, Any]]:
    """The rows of batches whose offsets, lengths and UTF-8 are what they say."""
    for batch in batches:
        chosen = batch.select(columns)
        chosen.validate(full=True)
        for start in range(0, chosen.num_rows, BATCH_ROWS):
            yield from chosen.slice(start, BATCH_ROWS).to_pylist()


def _check_columns(file: Path, schema: pa.Schema, prompt: str, responses: Sequence[str]) -> None:
    """Each column is there, once, and holds text (a prompt column: or lists of messages)."""
    for column in (prompt, *responses):
        if (times := schema.names.count(column)) != 1:
            found = (
                f"{times} times" if times else f"missing; columns here: {', '.join(map(repr, schema.names))}"
            )
            raise DataError(f"{file}: column {column!r} is {found}")
        kind = schema.field(column).type
        messages = column == prompt and (pa.types.is_list(kind) or pa.types.is_large_list(kind))
        if not messages and not _is_text(kind):
            expected = "strings or lists of messages" if column == prompt else "strings"
            raise DataError(f"{file}: column {column!r} holds {str(kind)[:40]}, not {expected}")


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return any(test(kind) for test in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view))
