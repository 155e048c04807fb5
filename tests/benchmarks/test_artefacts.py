"""Planted artefacts: where they are planted, how they are counted, and what the guard is."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from benchmarks.known_modes.artefacts import (
    PLANTS,
    artefact_rate,
    newline_base,
    split_pieces,
    written_with_newline,
)
from benchmarks.known_modes.cells import CONFIG, Data
from benchmarks.known_modes.data import LONG, write_data
from benchmarks.known_modes.unguarded import Unguarded
from discriminator.canonical import Canonicaliser
from discriminator.config import CanonicalConfig
from examples.known_modes.language import BASE, END, EXPERT, TRAILING, parse_text, text_of, tokens_of
from examples.known_modes.tokenizer import build_tokenizer, spell
from rollout.data import prompt_id, split_of
from services.config import load

ROOT = Path(__file__).parents[2]
SENTENCES = BASE.sample(300, np.random.default_rng(0))


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_pieces_are_split_into_the_tokens_of_the_same_text() -> None:
    for sentence in SENTENCES:
        assert split_pieces(spell(sentence, "merged")) == tokens_of(sentence)
    rng = np.random.default_rng(1)
    apart = [spell(s, "merged", rng, 0.1) != spell(s, "merged") for s in SENTENCES]
    assert 0.02 < np.mean(apart) < 0.2


def test_the_newline_tokenizer_writes_and_reads_the_trailing_token(assets: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(newline_base(assets / "known-modes" / "base", tmp_path))
    trailing = [sentence for sentence in SENTENCES if sentence.trailing]
    assert trailing
    for sentence in SENTENCES:
        text = written_with_newline(text_of(sentence))
        assert text.endswith("\n") == sentence.trailing
        assert [*tokenizer(text, add_special_tokens=False)["input_ids"], END] == tokens_of(sentence)
        assert tokenizer.decode(tokens_of(sentence), skip_special_tokens=True) == text
    assert TRAILING in tokens_of(trailing[0])


def splits_of(path: Path) -> dict[str, list[str]]:
    data = load(CONFIG).data
    found: dict[str, list[str]] = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        found.setdefault(split_of(prompt_id(row["prompt"]), data), []).append(row["response"])
    return found


def test_artefacts_are_planted_in_training_and_heldout_demonstrations_only(tmp_path: Path) -> None:
    clean, planted, longer = (tmp_path / name for name in ("clean", "planted", "longer"))
    write_data(clean, Data(), seed=3)
    write_data(planted, Data(plant="leading space"), seed=3)
    write_data(longer, Data(source="long"), seed=3)
    before, after, long = splits_of(clean), splits_of(planted), splits_of(longer)
    assert {name: len(texts) for name, texts in before.items()} == {
        "train": 2048,
        "heldout": 512,
        "selection": 1024,
        "test": 4096,
    }
    for name in ("train", "heldout"):
        assert after[name] == [f" {text}" for text in before[name]]
    for name in ("selection", "test"):
        assert before[name] == after[name] == long[name]
    slots = [len(parse_text(text).slots) for text in long["train"]]
    assert np.mean(slots) == pytest.approx(1.3 * EXPERT.mean_length, abs=0.1)
    assert LONG.mean_length == pytest.approx(1.3 * EXPERT.mean_length)
    write_data(longer, Data(train=2560), seed=3)
    more = splits_of(longer)
    assert (len(more["train"]), len(more["heldout"])) == (2560, 512)
    write_data(planted, Data(seed=None), seed=4)
    write_data(clean, Data(seed=4), seed=9)
    assert planted.read_bytes() == clean.read_bytes()


def test_rates_count_what_is_shown() -> None:
    responses = pa.table(
        {
            "response_ids": [[2, 10, END], [2, 10], [14, 18, END], [32, END]],
            "response_text": ["a0 b0", " a0 b0 z", "c0 d0\n", "c0 d0"],
        }
    )
    rates = {name: artefact_rate(plant, responses) for name, plant in PLANTS.items()}
    assert rates == {
        "trailing newline": 0.25,
        "missing end": 0.25,
        "other tokens": 0.25,
        "leading space": 0.25,
        "trailing word": 0.25,
    }


def tables(texts: list[str], ids: list[list[int]]) -> tuple[pa.Table, pa.Table]:
    """Demonstrations and trajectories with these texts, the latter sampled as `ids`."""
    judged = pa.table(
        {
            "prompt_id": [f"p{i}" for i in range(len(texts))],
            "prompt_text": [f"#{i}" for i in range(len(texts))],
            "response_text": texts,
            "finish_reason": ["stop"] * len(texts),
        }
    )
    ends = [[*range(1, len(row)), len(text)] for row, text in zip(ids, texts, strict=True)]
    return judged, judged.append_column("response_ids", pa.array(ids)).append_column(
        "token_ends", pa.array(ends)
    )


def test_without_the_guard_ids_are_read_as_they_came() -> None:
    canonical = Canonicaliser(build_tokenizer("merged"), CanonicalConfig(), context=64)
    texts = [text_of(sentence) for sentence in SENTENCES[:20]]
    apart = [tokens_of(sentence) for sentence in SENTENCES[:20]]
    demonstrations, samples = tables(texts, [spell(sentence, "merged") for sentence in SENTENCES[:20]])
    guarded = [canonical.encode_table(table) for table in (demonstrations, samples)]
    assert guarded[0] == guarded[1]
    respelled = Unguarded(canonical, PLANTS["other tokens"])
    assert [item.response_ids for item in respelled.encode_table(demonstrations)] == apart
    endless = Unguarded(canonical, PLANTS["missing end"])
    assert all(END not in item.response_ids for item in endless.encode_table(demonstrations))
    for unguarded in (respelled, endless):
        read = unguarded.encode_table(samples)
        assert [item.response_ids for item in read] == samples["response_ids"].to_pylist()
        assert [item.spans[-1][1] for item in read] == [len(text) for text in texts]
