"""One checked row, whatever file it comes from, and what became of all of them.

Every format goes through `check_row`, so a wrong value gets the same message everywhere. A bad row stops, or
is skipped and counted, as the `ReadReport` says.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rollout.credentials import Redacted

_EXAMPLES = 5
_DEEPEST = 100
_SURROGATE = re.compile("[\ud800-\udfff]")


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
        prompt = [_without_nulls(message) for message in prompt]
    if prompt_format == "chat":
        prompt = json.dumps(prompt, ensure_ascii=False)
    return Row(where, prompt, tuple(record[column] for column in response_columns))


def _without_nulls(message: dict[str, Any]) -> dict[str, Any]:
    """A message without its null fields, which Parquet adds; content that is null beside tool calls is empty
    text, as in vLLM, since few templates can do with none."""
    kept = {name: value for name, value in message.items() if value is not None}
    kept.setdefault("content", "")
    return kept


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
        return "bad prompt", f"{prompt_column!r} is {name_of(prompt)}, not a string or chat messages"
    try:
        text = json.dumps(prompt, ensure_ascii=False)
    except TypeError as error:  # Parquet and Arrow have dates and bytes
        return "bad prompt", f"{prompt_column!r} holds what JSON cannot: {error}"
    for column in response_columns:
        response = record[column]
        if not isinstance(response, str):
            return "bad response", f"{column!r} is {name_of(response)}, not a string"
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
    if _deeper_than(_DEEPEST, messages):
        return f"is nested more than {_DEEPEST} deep"
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            return f"message {number} is not an object with a role"
        calls = message["role"] == "assistant" and message.get("tool_calls")
        if not isinstance(message.get("content"), str) and not (calls and message.get("content") is None):
            return f"message {number} has {name_of(message.get('content'))} as content, not a string"
    if messages[-1]["role"] == "assistant":
        return "ends with an assistant message; the answer belongs in the response column"
    return None


def _deeper_than(levels: int, value: object) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(levels == 0 or _deeper_than(levels - 1, item) for item in inner)


def name_of(value: object) -> str:
    """A JSON value's type in words."""
    names = {
        type(None): "null",
        dict: "an object",
        list: "a list",
        bool: "a boolean",
        int: "a number",
        float: "a number",
    }
    return names.get(type(value), type(value).__name__)
