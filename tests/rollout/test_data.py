import json
import random
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rollout.config import DataConfig
from rollout.data import (
    DEMONSTRATION_SCHEMA,
    SPLITS,
    DataError,
    load_data,
    prompt_id,
    read_demonstrations,
    read_preferences,
    require_at_least,
    split_of,
)
from rollout.readers import BATCH_ROWS


class Words:
    """A renderer whose tokens are words: text as it stands, JSON for chat."""

    def __init__(self, most: int = 50) -> None:
        self.most = most
        self.specials = ["<|end|>", "<|user|>"]

    def render(self, prompt: str) -> str:
        return prompt

    def check_lengths(self, texts: list[str]) -> list[str | None]:
        return [
            None if len(t.split()) <= self.most else f"prompt is too long: {len(t.split())}" for t in texts
        ]


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pairs(prompts: int, each: int = 1) -> list[dict[str, str]]:
    return [
        {"prompt": f"prompt {i}", "response": f"answer {i} {j}"} for i in range(prompts) for j in range(each)
    ]


def read(path: Path, **settings: Any) -> pa.Table:
    return read_demonstrations(path, DataConfig(**settings), Words())[0]


def save_arrow(folder: Path, table: pa.Table) -> None:
    """What `Dataset.save_to_disk` leaves: Arrow streams named in state.json."""
    folder.mkdir(parents=True)
    with (
        pa.OSFile(str(folder / "data-0.arrow"), "wb") as sink,
        pa.ipc.new_stream(sink, table.schema) as writer,
    ):
        writer.write_table(table)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-0.arrow"}]}))


def test_all_formats_give_the_same_table(tmp_path: Path) -> None:
    rows = pairs(40, each=2)
    table = pa.Table.from_pylist(rows)
    expected = read(write_jsonl(tmp_path / "a.jsonl", rows))
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=7)
    save_arrow(tmp_path / "saved" / "train", table)
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    (tmp_path / "parts").mkdir()
    for part in range(2):
        pq.write_table(table.slice(40 * part, 40), tmp_path / "parts" / f"{part}.parquet")
    with pa.OSFile(str(tmp_path / "b.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    assert expected.schema == DEMONSTRATION_SCHEMA
    assert expected["response"].to_pylist() == [row["response"] for row in rows]
    assert expected["prompt_id"].to_pylist() == [prompt_id(row["prompt"]) for row in rows]
    for place in ("a.parquet", "saved", "parts", "b.arrow"):
        assert read(tmp_path / place).equals(expected), place


@pytest.mark.parametrize(
    "layout", ["data/{}-00000-of-00001.parquet", "{}-0.parquet", "{}/0000.parquet", "{}.parquet"]
)
def test_of_a_hub_folders_splits_train_is_read_and_said_so(tmp_path: Path, layout: str) -> None:
    rows = pairs(40)
    for split, some in {"train": rows[:30], "test": rows[30:], "validation": rows[30:]}.items():
        file = tmp_path / "set" / layout.format(split)
        file.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(some), file)
    table, report = read_demonstrations(tmp_path / "set", DataConfig(), Words())
    assert table["response"].to_pylist() == [row["response"] for row in rows[:30]]
    assert 'split "train" of test, train, validation' in report.summary()


def test_other_files_of_a_folder_are_one_data_set(tmp_path: Path) -> None:
    """Shards, names that merely begin like a split's, and the files of one split."""
    for names in (["part-0", "part-1"], ["trainer-0", "testimony"], ["test-0", "test-1"]):
        folder = tmp_path / names[0]
        folder.mkdir()
        for number, name in enumerate(names):
            write_jsonl(folder / f"{name}.jsonl", pairs(40)[20 * number : 20 * number + 20])
        assert read(folder).num_rows == 40
    write_jsonl(tmp_path / "test-0" / "train_sft-0.jsonl", pairs(1))
    with pytest.raises(
        DataError, match=r'has the splits test, train_sft; set data\.split, as in "train_sft"'
    ):
        read(tmp_path / "test-0")


def test_batches_are_bounded_and_complete(tmp_path: Path) -> None:
    rows = pairs(2 * BATCH_ROWS + 5)
    table = read(write_jsonl(tmp_path / "a.jsonl", rows))
    assert table["prompt"].num_chunks == 3
    assert table["response"].to_pylist() == [row["response"] for row in rows]


def test_chat_prompts_from_jsonl_and_parquet(tmp_path: Path) -> None:
    rows = [
        {"prompt": [{"role": "user", "content": "hé"}], "response": "yes"},
        {"prompt": "plain", "response": "no"},
    ]
    table = read(write_jsonl(tmp_path / "a.jsonl", rows), prompt_format="chat")
    assert [json.loads(p) for p in table["prompt"].to_pylist()] == [rows[0]["prompt"], "plain"]
    pq.write_table(pa.Table.from_pylist(rows[:1]), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", prompt_format="chat").equals(table.slice(0, 1))


GOOD = b'{"prompt": "p", "response": "r"}\n'
BAD_FILES = {
    "empty": (b"", "is empty"),
    "blank": (b"\n \n", "blank lines"),
    "binary": (b"\x7fELF\0\0", "binary"),
    "gzip": (b"\x1f\x8b\x08...", "gzip"),
    "array": (b'[{"prompt": 1}]', "JSON array"),
    "parquet.parquet": (b"PAR1 not really", "Parquet"),
    "arrow.arrow": (b"ARROW1 not really", "Arrow"),
}
BAD_ROWS = {
    "malformed": (b'{"prompt": "p", \n', "malformed JSON"),
    "column": (
        b'{"prompt": "p", "answer": "r"}\n',
        "'response' is missing; columns here: 'prompt', 'answer'",
    ),
    "number": (b'{"prompt": "p", "response": 3}\n', "'response' is a number"),
    "null": (b'{"prompt": null, "response": "r"}\n', "'prompt' is null"),
    "blank": (b'{"prompt": "p", "response": " "}\n', "'response' is empty"),
    "messages": (
        b'{"prompt": [{"role": "user", "content": "x"}], "response": "r"}\n',
        'prompt_format = "chat"',
    ),
    "list": (b"[1]\n", "a list where an object"),
    "latin1": (b'{"prompt": "\xe9", "response": "r"}\n', "not UTF-8"),
    "surrogate": (b'{"prompt": "\\ud800", "response": "r"}\n', "surrogate"),
    "long": (b'{"prompt": "' + b"w " * 60 + b'", "response": "r"}\n', "too long: 60"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_unreadable_file_is_named(tmp_path: Path, name: str) -> None:
    content, message = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read(tmp_path / name, on_error="skip")
    assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_row_stops_with_its_line_or_is_counted(tmp_path: Path, name: str) -> None:
    line, message = BAD_ROWS[name]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD + b"\n" + line + GOOD)
    with pytest.raises(DataError) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}:3: ")
    assert message in str(caught.value)
    table, report = read_demonstrations(path, DataConfig(on_error="skip"), Words())
    assert table.num_rows == report.kept == 2
    assert sum(report.skipped.values()) == 1
    assert message in report.examples[0]
    assert "1 skipped" in report.summary()


@pytest.mark.parametrize(
    "bad", [[], [{"role": "user"}], [{"content": "x"}], [{"role": "assistant", "content": "x"}]]
)
def test_bad_messages(tmp_path: Path, bad: list[Any]) -> None:
    with pytest.raises(DataError, match=r":1: 'prompt' "):
        read(write_jsonl(tmp_path / "a.jsonl", [{"prompt": bad, "response": "r"}]), prompt_format="chat")


def test_missing_parquet_column_and_nothing_left(tmp_path: Path) -> None:
    pq.write_table(pa.table({"question": ["q"], "answer": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="'prompt' is missing; columns here: 'question', 'answer'"):
        read(tmp_path / "a.parquet", on_error="skip")
    assert read(tmp_path / "a.parquet", prompt_column="question", response_column="answer").num_rows == 1
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "p", "response": ""}])
    with pytest.raises(DataError, match=r"no usable row; skipped: .*:1: 'response' is empty"):
        read(path, on_error="skip")
    with pytest.raises(DataError, match="no such file"):
        read(tmp_path / "absent")
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match="holds no"):
        read(tmp_path / "folder")


def test_splits_are_disjoint_complete_and_independent_of_order_and_size(tmp_path: Path) -> None:
    rows = pairs(600, each=3)
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    splits = load_data(DataConfig(demonstrations=str(path)), Words())
    members = {name: set(getattr(splits, name)["prompt_id"].to_pylist()) for name in SPLITS}
    assert sum(len(m) for m in members.values()) == len(set().union(*members.values())) == 600
    for name in SPLITS:
        assert set(Counter(getattr(splits, name)["prompt_id"].to_pylist()).values()) == {3}
    # 600 · 0.1 = 60 expected, binomial standard deviation 7.3
    assert all(abs(len(members[name]) - 60) < 30 for name in SPLITS[1:])
    random.Random(0).shuffle(rows)
    write_jsonl(path, rows[:900])
    smaller = load_data(DataConfig(demonstrations=str(path)), Words())
    for name in SPLITS:
        assert set(getattr(smaller, name)["prompt_id"].to_pylist()) <= members[name]
    other = load_data(DataConfig(demonstrations=str(path), split_seed=1), Words())
    assert not set(other.test["prompt_id"].to_pylist()) <= members["test"]


def test_the_quickstarts_split_is_the_one_its_results_were_measured_on() -> None:
    root = Path(__file__).parents[2]
    data = DataConfig(**tomllib.loads((root / "examples" / "quickstart.toml").read_text())["data"])
    bundled = str(root / "services" / "data" / "wordnet-examples.jsonl")
    splits = load_data(data.model_copy(update={"demonstrations": bundled}), Words())
    first = {name: min(getattr(splits, name)["prompt_id"].to_pylist()) for name in SPLITS}
    assert first == {
        "train": "00107d9a27d7f338",
        "heldout": "01203569331c781f",
        "selection": "0044d2e12aebcaac",
        "test": "0063620ca53fe1e7",
    }
    assert [getattr(splits, name).num_rows for name in SPLITS] == [3249, 445, 443, 503]


def test_split_thresholds() -> None:
    data = DataConfig(heldout_fraction=0.2, selection_fraction=0.3, test_fraction=0.1)
    counts = Counter(split_of(prompt_id(str(i)), data) for i in range(20_000))
    for name, share in (("heldout", 0.2), ("selection", 0.3), ("test", 0.1), ("train", 0.4)):
        assert counts[name] / 20_000 == pytest.approx(share, abs=0.015)  # more than four standard deviations


def test_prompts_only_file_never_brings_in_an_evaluation_prompt(tmp_path: Path) -> None:
    demonstrations = write_jsonl(tmp_path / "a.jsonl", pairs(100))
    extra = write_jsonl(tmp_path / "b.jsonl", [{"prompt": f"prompt {i}"} for i in [*range(50, 150), 140]])
    data = DataConfig(demonstrations=str(demonstrations), prompts=str(extra))
    splits = load_data(data, Words())
    judged = {p for name in SPLITS[1:] for p in getattr(splits, name)["prompt"].to_pylist()}
    rollout = splits.rollout_prompts()
    assert set(rollout["prompt"].to_pylist()) == {f"prompt {i}" for i in range(150)} - judged
    assert rollout["prompt_id"].to_pylist() == sorted(set(rollout["prompt_id"].to_pylist()))
    own = set(splits.train["prompt"].to_pylist())
    assert [row["prompt"] in own for row in rollout.to_pylist()] == rollout["demonstrated"].to_pylist()
    assert splits.demonstrated_prompts().equals(
        load_data(DataConfig(demonstrations=str(demonstrations)), Words()).rollout_prompts()
    )
    leaked = len(judged & {f"prompt {i}" for i in range(50, 100)})
    assert splits.reports[1].skipped == {
        "prompt belongs to an evaluation split of the demonstrations": leaked
    }


def test_max_demonstrations_cuts_training_only_and_nests(tmp_path: Path) -> None:
    path = str(write_jsonl(tmp_path / "a.jsonl", pairs(200)))
    full = load_data(DataConfig(demonstrations=path), Words())
    small, large = (
        load_data(DataConfig(demonstrations=path, max_demonstrations=n), Words()) for n in (20, 50)
    )
    assert (small.train.num_rows, large.train.num_rows) == (20, 50)
    assert set(small.train["prompt"].to_pylist()) < set(large.train["prompt"].to_pylist())
    assert all(getattr(small, name).equals(getattr(full, name)) for name in SPLITS[1:])


def test_require_at_least() -> None:
    table = pa.table({"prompt": ["a", "b"]})
    require_at_least(table, 2, "training demonstrations", "add some")
    with pytest.raises(DataError, match="training demonstrations: 2 rows, at least 3 needed; add some"):
        require_at_least(table, 3, "training demonstrations", "add some")


def preferences(prompts: int) -> list[dict[str, str]]:
    return [{"prompt": f"prompt {i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(prompts)]


def test_preference_pairs_from_jsonl_and_parquet_under_any_names(tmp_path: Path) -> None:
    rows = preferences(20)
    table, report = read_preferences(write_jsonl(tmp_path / "p.jsonl", rows), DataConfig(), Words())
    assert table.select(["prompt", "chosen", "rejected"]).to_pylist() == rows
    assert table["prompt_id"].to_pylist() == [prompt_id(row["prompt"]) for row in rows]
    assert report.kept == 20
    renamed = pa.Table.from_pylist(rows).rename_columns(["question", "better", "worse"])
    pq.write_table(renamed, tmp_path / "p.parquet")
    names = DataConfig(prompt_column="question", chosen_column="better", rejected_column="worse")
    assert read_preferences(tmp_path / "p.parquet", names, Words())[0].equals(table)
    with pytest.raises(DataError, match="'chosen' is missing; columns here: 'question', 'better', 'worse'"):
        read_preferences(
            tmp_path / "p.parquet", names.model_copy(update={"chosen_column": "chosen"}), Words()
        )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p", "chosen": "a"}, "column 'rejected' is missing; columns here: 'prompt', 'chosen'"),
        ({"prompt": "p", "chosen": "a", "rejected": None}, "'rejected' is null, not a string"),
        ({"prompt": "p", "chosen": [{"role": "assistant"}], "rejected": "b"}, "'chosen' is a list"),
        ({"prompt": "p", "chosen": " ", "rejected": "b"}, "'chosen' is empty"),
        ({"prompt": "p", "chosen": "a", "rejected": "a"}, "'chosen' and 'rejected' hold the same text"),
    ],
)
def test_bad_preference_pairs_stop_with_their_line_or_are_counted(
    tmp_path: Path, row: dict[str, Any], message: str
) -> None:
    path = write_jsonl(tmp_path / "p.jsonl", [*preferences(2), row])
    with pytest.raises(DataError) as caught:
        read_preferences(path, DataConfig(), Words())
    assert str(caught.value).startswith(f"{path}:3: ")
    assert message in str(caught.value)
    table, report = read_preferences(path, DataConfig(on_error="skip"), Words())
    assert table.num_rows == 2
    assert sum(report.skipped.values()) == 1


def test_preference_pairs_of_evaluation_prompts_train_no_reward_model(tmp_path: Path) -> None:
    demonstrations = write_jsonl(tmp_path / "a.jsonl", pairs(200))
    path = write_jsonl(tmp_path / "p.jsonl", preferences(400))
    data = DataConfig(demonstrations=str(demonstrations), preferences=str(path))
    splits = load_data(data, Words())
    judged = {p for name in ("selection", "test") for p in getattr(splits, name)["prompt"].to_pylist()}
    train = set(splits.preferences["prompt"].to_pylist())
    held = set(splits.heldout_preferences["prompt"].to_pylist())
    assert train | held == {f"prompt {i}" for i in range(400)} - judged
    assert not train & held
    assert not train & set(splits.heldout["prompt"].to_pylist())
    assert 20 <= len(held) <= 70, "a tenth of 400, standard deviation 6"
    assert sum(splits.reports[-1].skipped.values()) == len(judged)
    without = load_data(DataConfig(demonstrations=str(demonstrations)), Words())
    assert without.preferences.num_rows == without.heldout_preferences.num_rows == 0
    assert without.train.equals(splits.train)
