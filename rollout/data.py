"""Demonstrations, prompts and preference pairs: from files to four splits that share no prompt.

A row goes through three stages, a batch at a time, so that a file of millions of rows never becomes a list of
Python objects: `rollout.readers` turns JSONL, Parquet or an Arrow folder into checked rows, the renderer
(`rollout.templates`) turns the prompt into the text the policy sees, and this module names the prompt by a
hash of its messages and assigns the split from a hash of (split_seed, prompt_id). The split of a prompt
therefore depends on nothing but its own messages and the seed: not on the template or the date in it, nor on
the order, the size or the format of the file. All demonstrations of a prompt stay together, and so do prompts
of which the template makes one text.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import pyarrow as pa
import pyarrow.compute as pc

from rollout.config import DataConfig
from rollout.data_files import data_files
from rollout.readers import read_batches
from rollout.rows import DataError, ReadReport, Row

__all__ = [
    "DEMONSTRATION_SCHEMA",
    "PREFERENCE_SCHEMA",
    "PROMPT_SCHEMA",
    "SPLITS",
    "DataError",
    "DataSplits",
    "PromptRenderer",
    "ReadReport",
    "identity",
    "load_data",
    "prompt_id",
    "read_demonstrations",
    "read_preferences",
    "read_prompts",
    "require_at_least",
    "require_files",
    "split_of",
]

PROMPT_SCHEMA = pa.schema([("prompt_id", pa.string()), ("prompt", pa.string()), ("prompt_text", pa.string())])
DEMONSTRATION_SCHEMA = PROMPT_SCHEMA.append(pa.field("response", pa.string()))
PREFERENCE_SCHEMA = PROMPT_SCHEMA.append(pa.field("chosen", pa.string())).append(
    pa.field("rejected", pa.string())
)
SPLITS = ("train", "heldout", "selection", "test")


class PromptRenderer(Protocol):
    """What this module needs from `rollout.templates.Renderer`."""

    def render(self, prompt: str) -> str:
        """Text of a prompt (plain text, or chat messages as JSON) as the policy sees it."""
        ...

    def check_lengths(self, texts: list[str]) -> list[str | None]:
        """For every text None, or why it cannot be used as a prompt."""
        ...

    @property
    def specials(self) -> list[str]:
        """The special tokens as text."""
        ...


@dataclass
class DataSplits:
    """The four splits (DEMONSTRATION_SCHEMA), the prompts without demonstrations (PROMPT_SCHEMA), the
    preference pairs to train on and to judge by (PREFERENCE_SCHEMA), and what was skipped.
    """

    train: pa.Table
    heldout: pa.Table
    selection: pa.Table
    test: pa.Table
    extra_prompts: pa.Table
    preferences: pa.Table = field(default_factory=PREFERENCE_SCHEMA.empty_table)
    heldout_preferences: pa.Table = field(default_factory=PREFERENCE_SCHEMA.empty_table)
    reports: list[ReadReport] = field(default_factory=list)

    def rollout_prompts(self) -> pa.Table:
        """Distinct prompts the policy may be trained on, sorted by prompt_id: PROMPT_SCHEMA and
        `demonstrated`, whether there is a training demonstration.
        """
        both = pa.concat_tables([self.train.select(PROMPT_SCHEMA.names), self.extra_prompts])
        prompts = _first_of_each_prompt(both).sort_by("prompt_id")
        known = pc.is_in(prompts["prompt_id"], pc.unique(self.train["prompt_id"]))
        return prompts.append_column("demonstrated", known)

    def demonstrated_prompts(self) -> pa.Table:
        """Those of `rollout_prompts` that have a training demonstration."""
        prompts = self.rollout_prompts()
        return prompts.filter(prompts["demonstrated"])


def identity(prompt: str, data: DataConfig) -> str:
    """What a prompt is named by: text as it stands (chat: alone, or as the one message that it would become),
    else the canonical JSON of its messages."""
    if data.prompt_format == "text":
        return prompt
    messages = json.loads(prompt)
    if isinstance(messages, str):
        return messages
    if data.prompt_template == "{prompt}" and messages == [
        {"role": "user", "content": messages[0]["content"]}
    ]:
        return str(messages[0]["content"])
    return json.dumps(messages, ensure_ascii=False, sort_keys=True)


def prompt_id(identity: str) -> str:
    """16 hexadecimal digits of BLAKE2b over a prompt's `identity`; a prompt has the same id everywhere."""
    return hashlib.blake2b(identity.encode(), digest_size=8).hexdigest()


def split_of(identifier: str, data: DataConfig) -> str:
    """Split of a prompt: thresholds on a uniform number in [0, 1) hashed from (split_seed, prompt_id)."""
    digest = hashlib.blake2b(f"{data.split_seed}:{identifier}".encode(), digest_size=8).digest()
    uniform = int.from_bytes(digest, "big") / 2**64
    for name in ("heldout", "selection", "test"):
        uniform -= getattr(data, f"{name}_fraction")
        if uniform < 0:
            return name
    return "train"


def read_demonstrations(
    path: str | Path, data: DataConfig, renderer: PromptRenderer
) -> tuple[pa.Table, ReadReport]:
    """All demonstrations of a file or folder in file order (DEMONSTRATION_SCHEMA), and what was skipped.

    Raises DataError naming file and row for the first bad row (data.on_error = "stop"), for a file that
    cannot be read, and when no usable row is left.
    """
    return _read(Path(path), data, renderer, DEMONSTRATION_SCHEMA, (data.response_column,))


def read_preferences(
    path: str | Path, data: DataConfig, renderer: PromptRenderer
) -> tuple[pa.Table, ReadReport]:
    """All preference pairs of a file or folder in file order (PREFERENCE_SCHEMA). Raises like
    `read_demonstrations`, for a pair of equal answers too.
    """
    columns = (data.chosen_column, data.rejected_column)
    return _read(Path(path), data, renderer, PREFERENCE_SCHEMA, columns)


def read_prompts(path: str | Path, data: DataConfig, renderer: PromptRenderer) -> tuple[pa.Table, ReadReport]:
    """The distinct prompts of a prompts-only file or folder (PROMPT_SCHEMA). Raises like
    `read_demonstrations`.
    """
    table, report = _read(Path(path), data, renderer, PROMPT_SCHEMA, ())
    return _first_of_each_prompt(table), report


def require_files(data: DataConfig, *paths: str) -> None:
    """Raise DataError unless the files of the paths (none given: of `data`) are there; they are not read."""
    for path in filter(None, paths or (data.demonstrations, data.prompts, data.preferences)):
        data_files(Path(path), ReadReport(path, stop=True), data.split)


def load_data(data: DataConfig, renderer: PromptRenderer) -> DataSplits:
    """Read `data.demonstrations`, `data.prompts` and `data.preferences` and split them.

    A prompt of the prompts-only file that is also in an evaluation split is left out of the rollouts and
    counted, so the policy never practises on a prompt it is judged by. Likewise the preference pairs of
    selection and test prompts; of the others, those whose prompt falls into the held-out share judge the
    reward model and the rest train it.
    """
    if not data.demonstrations:
        raise DataError("data.demonstrations is not set: name a JSONL or Parquet file or a dataset folder")
    table, report = read_demonstrations(data.demonstrations, data, renderer)
    distinct = pc.unique(table["prompt_id"]).to_pylist()
    split = {identifier: split_of(identifier, data) for identifier in distinct}
    members = {
        name: table.filter(
            pc.is_in(table["prompt_id"], pa.array([i for i in distinct if split[i] == name], pa.string()))
        )
        for name in SPLITS
    }
    reports = [report]
    extra = PROMPT_SCHEMA.empty_table()
    if data.prompts:
        extra, report = read_prompts(data.prompts, data, renderer)
        extra = _without(extra, [members[name] for name in SPLITS if name != "train"], report)
        reports.append(report)
    pairs, held = PREFERENCE_SCHEMA.empty_table(), PREFERENCE_SCHEMA.empty_table()
    if data.preferences:
        pairs, report = read_preferences(data.preferences, data, renderer)
        pairs = _without(pairs, [members["selection"], members["test"]], report)
        own = [split_of(identifier, data) == "heldout" for identifier in pairs["prompt_id"].to_pylist()]
        pairs, held = pairs.filter(pc.invert(pa.array(own, pa.bool_()))), pairs.filter(own)
        reports.append(report)
    if data.max_demonstrations is not None:
        members["train"] = _at_most(members["train"], data.max_demonstrations)
    return DataSplits(
        **members, extra_prompts=extra, preferences=pairs, heldout_preferences=held, reports=reports
    )


def require_at_least(table: pa.Table, rows: int, what: str, fix: str) -> None:
    """Raise DataError unless `table` has `rows` rows: "<what>: 12 rows, at least 64 needed; <fix>"."""
    if table.num_rows < rows:
        raise DataError(f"{what}: {table.num_rows} rows, at least {rows} needed; {fix}")


def _read(
    path: Path,
    data: DataConfig,
    renderer: PromptRenderer,
    schema: pa.Schema,
    response_columns: tuple[str, ...],
) -> tuple[pa.Table, ReadReport]:
    """Rows of `schema`: PROMPT_SCHEMA and one column for each of the file's `response_columns`."""
    report = ReadReport(str(path), stop=data.on_error == "stop")
    names = schema.names[len(PROMPT_SCHEMA) :]
    batches = [
        pa.RecordBatch.from_pydict(columns, schema=schema)
        for rows in read_batches(
            path, data.prompt_column, response_columns, data.prompt_format, report, data.split
        )
        for columns in _rendered(rows, data, renderer, report, names)
    ]
    table = pa.Table.from_batches(batches, schema=schema)
    if table.num_rows == 0:
        raise DataError(f"{path}: no usable row{report.examples_text()}")
    table = _one_id_a_text(table)
    report.notes += _notes(table, renderer, names)
    return table, report


def _one_id_a_text(table: pa.Table) -> pa.Table:
    """Prompts of which the template makes one text share an id, or one split would know another's prompts."""
    least = table.group_by("prompt_text").aggregate([("prompt_id", "min")])
    row = pc.index_in(table["prompt_text"], least["prompt_text"].combine_chunks())
    return table.set_column(0, "prompt_id", least["prompt_id_min"].take(row))


def _notes(table: pa.Table, renderer: PromptRenderer, responses: list[str]) -> list[str]:
    """What the user may not know of the rows: repeated ones, and special tokens that they spell."""
    notes = []
    copies = table.num_rows - table.group_by(["prompt_id", *responses]).aggregate([]).num_rows
    if responses and copies:
        notes.append(f"{copies} rows repeat another one word for word")
    for column in ("prompt", *responses):
        if found := _spelled(table[column], renderer.specials):
            read_as = "control tokens" if column == "prompt" else "plain letters"
            notes.append(f"special tokens spelled in the {column}, read as {read_as}: {found}")
    return notes


def _spelled(texts: pa.ChunkedArray, specials: list[str]) -> str:
    """Which special tokens stand in texts, and in how many each."""
    if not specials:
        return ""
    some = texts.filter(pc.match_substring_regex(texts, "|".join(map(re.escape, specials))))
    counts = {token: pc.sum(pc.match_substring(some, token)).as_py() for token in sorted(specials)}
    return ", ".join(f"{token} ({rows} rows)" for token, rows in counts.items() if rows)


def _rendered(
    rows: list[Row], data: DataConfig, renderer: PromptRenderer, report: ReadReport, names: list[str]
) -> Iterator[dict[str, list[str]]]:
    """The columns of the rows whose prompt can be rendered and is short enough (at most one batch); their
    responses go into the columns `names`."""
    rendered: list[tuple[Row, str]] = []
    for row in rows:
        try:
            rendered.append((row, renderer.render(row.prompt)))
        except DataError as error:
            report.bad_row(row.where, str(error), "prompt refused by the chat template")
    complaints = renderer.check_lengths([text for _, text in rendered])
    columns: dict[str, list[str]] = {name: [] for name in (*PROMPT_SCHEMA.names, *names)}
    for (row, text), complaint in zip(rendered, complaints, strict=True):
        if complaint is not None:
            report.bad_row(row.where, complaint)
            continue
        columns["prompt_id"].append(prompt_id(identity(row.prompt, data)))
        columns["prompt"].append(row.prompt)
        columns["prompt_text"].append(text)
        for name, response in zip(names, row.responses, strict=True):
            columns[name].append(response)
        report.kept += 1
    if columns["prompt_id"]:
        yield columns


def _without(table: pa.Table, splits: list[pa.Table], report: ReadReport) -> pa.Table:
    """The rows of all prompts but those of `splits`, which evaluations use; these are counted."""
    texts = pa.concat_tables(splits)["prompt_text"].combine_chunks()
    judged = pc.is_in(table["prompt_text"], texts)
    if leaked := pc.sum(judged).as_py() or 0:
        report.skip(leaked, "prompt belongs to an evaluation split of the demonstrations")
    return table.filter(pc.invert(judged))


def _first_of_each_prompt(table: pa.Table) -> pa.Table:
    row = pa.array(range(table.num_rows), pa.int64())
    first = (
        pa.table({"prompt_id": table["prompt_id"], "row": row})
        .group_by("prompt_id")
        .aggregate([("row", "min")])
    )
    return table.filter(pc.is_in(row, first["row_min"].combine_chunks()))


def _at_most(table: pa.Table, rows: int) -> pa.Table:
    """The `rows` rows with the smallest prompt ids: a random subset, nested in larger ones, in file order."""
    keep = pc.sort_indices(table["prompt_id"])[:rows]
    return table.filter(pc.is_in(pa.array(range(table.num_rows), pa.uint64()), keep))
