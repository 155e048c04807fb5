"""What lies behind a path: all of one data set and nothing twice, whatever was done to the files."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from damaged_files import TEXTS, Words, lines

from rollout.config import DataConfig
from rollout.data import DataError, ReadReport, read_demonstrations

GOOD = lines(TEXTS)


def read(path: Path, **settings: Any) -> tuple[pa.Table, ReadReport]:
    return read_demonstrations(path, DataConfig(**settings), Words())


def put(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("cases", [150, pytest.param(20_000, marks=pytest.mark.slow)])
def test_damaged_files_give_rows_or_one_sentence_and_never_a_crash(cases: int) -> None:
    script = Path(__file__).with_name("damaged_files.py")
    done = subprocess.run(
        [sys.executable, str(script), str(cases)], capture_output=True, text=True, timeout=60 + cases / 10
    )
    assert done.returncode == 0, done.stderr[-5000:]


@pytest.mark.parametrize("on_error", ["stop", "skip"])
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"prompt,response\nx,y\n", "comma-separated values; convert it"),
        ("a.jsonl", b'"prompt"\t"response"\nx\ty\n', "tab-separated values; convert it"),
        ("a.tsv", b"question\tanswer\nx\ty\n", "a TSV file; convert it"),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        ("a.arrow", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        ("a.jsonl", b"<!DOCTYPE html>\n<html>", "HTML or XML page"),
        ("a.jsonl", GOOD.decode().encode("utf-16"), "UTF-16 text; save it as UTF-8"),
        ("a.jsonl.gz", gzip.compress(GOOD), "gzip-compressed"),
    ],
)
def test_other_kinds_of_files_are_named_as_what_they_are(
    tmp_path: Path, name: str, content: bytes, message: str, on_error: str
) -> None:
    file = put(tmp_path, {name: content}) / name
    with pytest.raises(DataError, match=message) as caught:
        read(file, on_error=on_error)
    assert str(caught.value).startswith(f"{file}: ")


@pytest.mark.parametrize(
    "other", ["b.jsonl.gz", "b.csv", "sub/b.jsonl.zst", "b.jsonl.bak", "b.parquet.crdownload", "b.zip"]
)
def test_shards_that_would_be_left_out_are_refused(tmp_path: Path, other: str) -> None:
    with pytest.raises(DataError, match=r"also holds .*, which would be left out") as caught:
        read(put(tmp_path, {"a.jsonl": GOOD, other: b"x"}))
    assert other in str(caught.value)


def test_shards_under_any_spelling_of_their_format_are_all_read(tmp_path: Path) -> None:
    rows = [GOOD.splitlines(keepends=True)[4 * part : 4 * part + 4] for part in range(3)]
    names = ["a.jsonl", "b.json", "c.JSONL"]
    put(tmp_path, {name: b"".join(part) for name, part in zip(names, rows, strict=True)})
    table, report = read(put(tmp_path, {"dataset_infos.json": b"{}", "README.md": b"#", "_SUCCESS": b""}))
    assert table["response"].to_pylist() == [row["response"] for row in TEXTS]
    assert report.notes == ["3 files"]


@pytest.mark.parametrize(
    "copy", [".ipynb_checkpoints/a-checkpoint.jsonl", ".a.jsonl", "__MACOSX/a.jsonl", "cache-1f.arrow"]
)
def test_hidden_copies_are_not_read_twice(tmp_path: Path, copy: str) -> None:
    table, report = read(put(tmp_path, {"a.jsonl": GOOD, copy: GOOD}))
    assert table.num_rows == len(TEXTS)
    assert report.notes == []


def test_folders_behind_links_are_read_once_and_lost_files_are_refused(tmp_path: Path) -> None:
    half = len(TEXTS) // 2
    put(tmp_path, {"set/a.jsonl": lines(TEXTS[:half]), "elsewhere/b.jsonl": lines(TEXTS[half:])})
    (tmp_path / "set" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "set")
    assert read(tmp_path / "set")[0]["response"].to_pylist() == [row["response"] for row in TEXTS]
    (tmp_path / "set" / "c.jsonl").symlink_to(tmp_path / "blobs" / "lost")
    with pytest.raises(DataError, match=r"c\.jsonl: file is missing"):
        read(tmp_path / "set")


def test_paths_that_cannot_be_read_are_one_sentence(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in ("pipe", "x" * 5000, "a\0b", "\ud800"):
        with pytest.raises(DataError):
            read(tmp_path / path)


def test_rows_that_stand_twice_are_noted(tmp_path: Path) -> None:
    _, report = read(put(tmp_path, {"a.jsonl": GOOD, "copy of a.jsonl": GOOD}))
    assert report.notes == ["2 files", f"{len(TEXTS)} rows repeat another one word for word"]


@pytest.mark.parametrize(
    "layout", ["data/{}-00000-of-00002.jsonl", "set-{}.jsonl", "{}/0.jsonl", "{}.jsonl", "all_{}.jsonl"]
)
def test_the_split_is_chosen_by_its_setting(tmp_path: Path, layout: str) -> None:
    half = len(TEXTS) // 2
    put(tmp_path, {layout.format("train_sft"): lines(TEXTS[:half])})
    put(tmp_path, {layout.format("test_sft"): lines(TEXTS[half:])})
    with pytest.raises(
        DataError, match=r'the splits test_sft, train_sft; set data\.split, as in "train_sft"'
    ):
        read(tmp_path)
    for split, part in {"train_sft": TEXTS[:half], "test_sft": TEXTS[half:]}.items():
        table, report = read(tmp_path, split=split)
        assert table["response"].to_pylist() == [row["response"] for row in part]
        assert report.notes == [f'split "{split}" of test_sft, train_sft']
    with pytest.raises(DataError, match=r"set data\.split"):
        read(tmp_path, split="train")


def test_the_split_of_a_saved_dataset_is_chosen_by_the_same_setting(tmp_path: Path) -> None:
    put(tmp_path, {f"{name}/a.jsonl": lines(TEXTS[:at]) for name, at in {"one": 3, "two": 5}.items()})
    put(tmp_path, {"dataset_dict.json": b'{"splits": ["one", "two"]}'})
    assert read(tmp_path, split="two")[0].num_rows == 5
    with pytest.raises(DataError, match=r'has the splits one, two; set data\.split, as in "one"'):
        read(tmp_path)


def test_files_of_no_split_are_named_when_they_are_left_out(tmp_path: Path) -> None:
    files = {"train.jsonl": GOOD, "test.jsonl": GOOD, "extra.jsonl": GOOD}
    table, report = read(put(tmp_path, files))
    assert table.num_rows == len(TEXTS)
    assert "of no split, and left out: extra.jsonl" in report.notes


@pytest.mark.parametrize(
    "state",
    [
        b"{}",
        b"[]",
        b"nonsense",
        b"\xff",
        b"[" * 5000,
        b'{"_data_files": 3}',
        b'{"_data_files": []}',
        b'{"_data_files": [{}]}',
        b'{"_data_files": [{"filename": "../a.jsonl"}]}',
        b'{"_data_files": [{"filename": ".."}]}',
        b'{"_data_files": [{"filename": "a\\u0000.jsonl"}]}',
        b'{"_data_files": [{"filename": "absent.jsonl"}]}',
    ],
)
def test_a_wrong_description_of_a_saved_dataset_is_one_sentence(tmp_path: Path, state: bytes) -> None:
    saved = put(tmp_path, {"saved/state.json": state, "a.jsonl": GOOD}) / "saved"
    with pytest.raises(DataError) as caught:
        read(saved, on_error="skip")
    assert str(caught.value).startswith(str(saved))
    several = (
        put(tmp_path, {"several/dataset_dict.json": state.replace(b"_data_files", b"splits")}) / "several"
    )
    with pytest.raises(DataError) as caught:
        read(several, on_error="skip")
    assert str(caught.value).startswith(str(several))


@pytest.mark.parametrize("splits", ['["."]', '[".."]', '["/"]'])
def test_a_dataset_cannot_contain_itself(tmp_path: Path, splits: str) -> None:
    with pytest.raises(DataError, match="no list of plain file names"):
        read(put(tmp_path, {"dataset_dict.json": f'{{"splits": {splits}}}'.encode()}))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (pa.table({"prompt": ["p"], "response": [3]}), "column 'response' holds int64, not strings"),
        (
            pa.table({"prompt": pa.nulls(2), "response": ["r", "r"]}),
            "'prompt' holds null, not strings or lists",
        ),
        (pa.table([["p"], ["r"], ["s"]], names=["prompt", "response", "response"]), "'response' is 2 times"),
    ],
)
@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_columns_that_hold_no_text_are_refused(
    tmp_path: Path, table: pa.Table, message: str, kind: str
) -> None:
    if kind == "parquet":
        pq.write_table(table, tmp_path / "a.parquet")
    else:
        with pa.ipc.new_file(str(tmp_path / "a.arrow"), table.schema) as writer:
            writer.write_table(table)
    with pytest.raises(DataError, match=message):
        read(tmp_path / f"a.{kind}", on_error="skip")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"prompt": ' + b"[" * 1500 + b"]" * 1500 + b"}", "nested too deeply"),
        (b'{"prompt": "p", "response": ' + b"9" * 5000 + b"}", "malformed JSON: Exceeds the limit"),
        (
            b'{"response": "r", "prompt": [{"role": "user", "content": "x", "meta": '
            + b"[" * 400
            + b"]" * 400
            + b"}]}",
            "nested more than 100 deep",
        ),
    ],
)
def test_lines_that_python_cannot_parse_are_bad_rows(tmp_path: Path, line: bytes, reason: str) -> None:
    file = put(tmp_path, {"a.jsonl": GOOD + line + b"\n"}) / "a.jsonl"
    with pytest.raises(DataError, match=reason) as caught:
        read(file, prompt_format="chat")
    assert str(caught.value).startswith(f"{file}:{len(TEXTS) + 1}: ")
    table, report = read(file, prompt_format="chat", on_error="skip")
    assert (table.num_rows, sum(report.skipped.values())) == (len(TEXTS), 1)


def test_dates_in_messages_are_no_json(tmp_path: Path) -> None:
    import datetime

    messages = [{"role": "user", "content": "x", "at": datetime.date(2024, 1, 1)}]
    pq.write_table(pa.Table.from_pylist([{"prompt": messages, "response": "r"}]), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="row 1: 'prompt' holds what JSON cannot"):
        read(tmp_path / "a.parquet", prompt_format="chat")


def test_an_arrow_stream_without_its_end_is_noted(tmp_path: Path) -> None:
    table = pa.Table.from_pylist(TEXTS)
    with pa.ipc.new_stream(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table)
    whole = (tmp_path / "a.arrow").read_bytes()
    assert read(tmp_path / "a.arrow")[1].notes == []
    put(tmp_path, {"a.arrow": whole.removesuffix(b"\xff\xff\xff\xff\0\0\0\0")})
    assert read(tmp_path / "a.arrow")[1].notes == ["a.arrow has no end mark and may have lost its last rows"]


def test_special_tokens_spelled_in_prompts_and_answers_are_noted(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a<|end|>", "response": "b"},
        {"prompt": [{"role": "user", "content": "<|end|>"}], "response": "<|end|> <|end|>"},
        {"prompt": "plain", "response": "x"},
    ]
    file = put(tmp_path, {"a.jsonl": lines(rows)}) / "a.jsonl"
    assert read(file, prompt_format="chat")[1].notes == [
        "special tokens spelled in the prompt, read as control tokens: <|end|> (2 rows)",
        "special tokens spelled in the response, read as plain letters: <|end|> (1 rows)",
    ]


def test_null_content_beside_tool_calls_is_empty_text(tmp_path: Path) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    bare = {name: value for name, value in call.items() if name != "content"}
    ends = ({"role": "user", "content": "q"}, {"role": "tool", "content": "4"})
    rows = [{"prompt": [ends[0], turn, ends[1]], "response": "r"} for turn in (call, bare)]
    table, _ = read(put(tmp_path, {"a.jsonl": lines(rows)}) / "a.jsonl", prompt_format="chat")
    for prompt in table["prompt"].to_pylist():
        assert json.loads(prompt)[1] == call | {"content": ""}
    pq.write_table(pa.Table.from_pylist(rows[:1]), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", prompt_format="chat")[0].equals(table.slice(0, 1))
    put(tmp_path, {"a.jsonl": lines([{"prompt": [{**call, "tool_calls": []}, ends[1]], "response": "r"}])})
    with pytest.raises(DataError, match="message 1 has null as content"):
        read(tmp_path / "a.jsonl", prompt_format="chat")
