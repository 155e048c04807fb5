"""`rlgaf evaluate` and `rlgaf generate` before an engine is there: what they read, and what they refuse."""

import json
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from rollout.data import load_data
from rollout.templates import Renderer, load_tokenizer
from services import standalone
from services.cli import main
from services.config import load


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """`refused("evaluate", …)` → the message; an engine that is started fails the test."""

    async def starts(*_: object) -> pa.Table:
        raise AssertionError("an engine was started")

    monkeypatch.setattr(standalone, "_sample", starts)

    def call(*words: object) -> str:
        monkeypatch.setattr(sys, "argv", ["rlgaf", *map(str, words), "--data.max_prompt_tokens=32"])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2
        return " ".join(capsys.readouterr().err.split())

    return call


def test_prompts_that_do_not_fit_are_refused(refused, tiny_model):
    words = ("--prompt", "say cat: ", "--prompt", "word " * 60)
    message = refused("generate", tiny_model, *words)
    assert "--prompt number 2: prompt is too long" in message
    assert "data.max_prompt_tokens is 32" in message
    assert "--prompt number 1: prompt is empty" in refused("generate", tiny_model, "--prompt", "")


def test_too_few_demonstrations_are_refused(refused, tiny_model, tmp_path):
    rows = [{"prompt": f"say {i}: ", "response": "the cat"} for i in range(30)]
    few, one = tmp_path / "few.jsonl", tmp_path / "one.jsonl"
    few.write_text("".join(json.dumps(row) + "\n" for row in rows))
    one.write_text("".join(json.dumps(rows[0]) + "\n" for _ in range(30)))
    assert f"{one} has 1 prompts; an evaluation needs at least 8" in refused("evaluate", tiny_model, one)
    message = refused("evaluate", tiny_model, few, "--test-split")
    assert f"the test split of {few} has" in message


def test_what_would_fail_at_the_end_is_refused_at_once(refused, tiny_model, tiny_demonstrations, tmp_path):
    out = tmp_path / "no" / "out.json"
    assert f"there is no folder {out.parent}" in refused(
        "evaluate", tiny_model, tiny_demonstrations, "--json", out
    )
    message = refused("evaluate", tiny_model, tiny_demonstrations, "--evaluation.embedding_model=/nowhere")
    assert "evaluation.embedding_model = '/nowhere'" in message


def test_a_file_is_read_whole_or_as_a_run_splits_it(tiny_model, tiny_demonstrations):
    words = [f"--policy.model={tiny_model}", f"--data.demonstrations={tiny_demonstrations}"]
    config = load(None, [*words, "--data.test_fraction=0.2", "--data.prompts=read-by-nobody.jsonl"])
    renderer = Renderer(load_tokenizer(config.policy), config.data, config.policy)
    human, train = standalone._demonstrations(config, renderer, test_split=False)
    assert (human.num_rows, train) == (160, [])
    splits = load_data(config.data.model_copy(update={"prompts": ""}), renderer)
    human, train = standalone._demonstrations(config, renderer, test_split=True)
    assert set(human["prompt"].to_pylist()) == set(splits.test["prompt"].to_pylist())
    assert train == splits.train["response"].to_pylist()
    small = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"test_prompts": 8})})
    assert standalone._demonstrations(small, renderer, test_split=False)[0].num_rows == 8


def test_a_run_is_reminded_that_it_knows_the_file(refused, tiny_model, tiny_demonstrations, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "best").symlink_to(Path(tiny_model))
    (run / "config.toml").write_text(
        f'[policy]\nmodel = "m"\n[data]\ndemonstrations = "{tiny_demonstrations}"\n'
    )
    late = ("--json", tmp_path / "no" / "out.json")
    assert "--test-split leaves" in refused("evaluate", run / "best", tiny_demonstrations, *late)
    assert "--test-split" not in refused("evaluate", run / "best", tiny_demonstrations, "--test-split", *late)
    assert "--test-split" not in refused("evaluate", tiny_model, tiny_demonstrations, *late)
