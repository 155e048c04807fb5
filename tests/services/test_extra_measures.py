"""The user's own measures: which references load, how others are refused, and what may join a row."""

import asyncio
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rollout.data import DEMONSTRATION_SCHEMA, DataSplits
from rollout.templates import Renderer, load_tokenizer
from services.answers import TEXTS, HumanNLL
from services.config import Config, ConfigError, load
from services.evaluation.extra_measures import Answers, load_extra_measures, with_extra_measures
from services.evaluator import Evaluator

GOOD = "def measures(answers):\n    return {'own': float(len(answers.model))}\n"
ANSWERS = Answers(prompts=["p"], human=["h"], model=["m"], demonstrations=["d"], nll=1.5, human_tokens=2.0)


@pytest.fixture(autouse=True)
def same_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))


def write(path: Path, text: str = GOOD) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def refusal(reference: str) -> str:
    with pytest.raises(ConfigError) as refused:
        load_extra_measures(reference)
    return str(refused.value)


def test_a_file_a_file_in_a_package_and_a_module_load(tmp_path: Path, monkeypatch) -> None:
    assert load_extra_measures("") is None
    alone = load_extra_measures(f"{write(tmp_path / 'alone_measures.py')}:measures")
    assert alone is not None
    assert alone(ANSWERS) == {"own": 1.0}
    write(tmp_path / "outer_pkg" / "__init__.py", "")
    write(tmp_path / "outer_pkg" / "inner" / "__init__.py", "")
    write(tmp_path / "outer_pkg" / "inner" / "names.py", "NAME = 'packaged'\n")
    source = "from outer_pkg.inner.names import NAME\ndef measures(answers):\n    return {NAME: 2}\n"
    path = write(tmp_path / "outer_pkg" / "inner" / "own.py", source)
    monkeypatch.chdir(path.parent)
    packaged = load_extra_measures("own.py:measures")
    assert packaged is not None
    assert with_extra_measures({"c2st": 0.5}, packaged, ANSWERS) == {"c2st": 0.5, "packaged": 2.0}
    assert packaged.__module__ == "outer_pkg.inner.own"
    assert load_extra_measures("outer_pkg.inner.own:measures") is packaged


def test_wrong_references_are_refused_with_the_reason(tmp_path: Path) -> None:
    assert "no such file" in refusal(f"{tmp_path}/none.py:measures")
    assert "No module named 'no_such_module'" in refusal("no_such_module:measures")
    path = write(
        tmp_path / "some_measures.py", GOOD + "def other():\n    return {}\ndef _hidden(): ...\nX = 1\n"
    )
    assert "has no 'measure'; it has measures, other" in refusal(f"{path}:measure")
    assert "function of one argument" in refusal(f"{path}:other")
    assert "function of one argument" in refusal(f"{path}:X")
    broken = write(tmp_path / "broken_measures.py", "import not_installed_anywhere\n")
    assert "ModuleNotFoundError: No module named 'not_installed_anywhere'" in refusal(f"{broken}:measures")
    syntax = write(tmp_path / "syntax_measures.py", "def measures(answers) return {}\n")
    assert "SyntaxError" in refusal(f"{syntax}:measures")
    assert "another module named json" in refusal(f"{write(tmp_path / 'json.py')}:measures")
    assert "cannot be imported; rename it" in refusal(f"{write(tmp_path / 'my-file.py')}:measures")


@pytest.mark.parametrize(
    "reference", ["measures", "file.py", "file.py:", ":f", "a/b:f", "a..b:f", "file.py:1f"]
)
def test_the_configuration_refuses_what_names_no_function(reference: str) -> None:
    given = ["--policy.model=m", "--data.demonstrations=d", f"--evaluation.extra_measures={reference}"]
    with pytest.raises(ConfigError, match=r'evaluation\.extra_measures: write "path/to/file\.py:function"'):
        load(None, given)
    good = [*given[:2], "--evaluation.extra_measures=a/b-c.py:f"]
    assert load(None, good).evaluation.extra_measures == "a/b-c.py:f"


def test_what_does_not_belong_into_a_row_is_refused() -> None:
    def returning(value: Any) -> Any:
        return lambda answers: value

    row = {"c2st": 0.5}
    assert with_extra_measures(row, returning({"own": np.float32(0.25)}), ANSWERS) == {
        "c2st": 0.5,
        "own": 0.25,
    }
    assert row == {"c2st": 0.5}
    with pytest.raises(ValueError, match="returned float"):
        with_extra_measures(row, returning(1.0), ANSWERS)
    for name in ("c2st", "step"):
        with pytest.raises(ValueError, match=f"'{name}' is the name of a built-in measure"):
            with_extra_measures(row, returning({name: 1.0}), ANSWERS)
    for value in (float("nan"), float("inf"), "1", None, True):
        with pytest.raises(ValueError, match=r"'own' is .*, not a finite number"):
            with_extra_measures(row, returning({"own": value}), ANSWERS)
    with pytest.raises(ValueError, match="3 is no name"):
        with_extra_measures(row, returning({3: 1.0}), ANSWERS)


SPY = """
def measures(answers):
    return {
        "rows": len(answers.model),
        "model_is_human": float(list(answers.model) == list(answers.human)),
        "demonstrations": len(answers.demonstrations),
        "sentence_nll": answers.nll * answers.human_tokens,
        "prompt_letters": sum(map(len, answers.prompts)),
    }
"""


def test_every_row_of_an_evaluation_gets_the_measures(tiny_model: Path, tmp_path: Path) -> None:
    """The evaluator's own rows, with stored test responses in place of a fleet of workers."""
    path = write(tmp_path / "spy_measures.py", SPY)
    given = [f"--policy.model={tiny_model}", "--data.demonstrations=-", f"--run.output={tmp_path}"]
    given += [f"--evaluation.extra_measures={path}:measures", "--evaluation.embedding_model=none"]
    config: Config = load(None, [*given, "--evaluation.bootstrap=100", "--evaluation.self_bleu_texts=10"])
    tokenizer = load_tokenizer(config.policy)
    renderer = Renderer(tokenizer, config.data, config.policy)
    words = ["cat", "dog", "door", "mail"]
    rows = [
        {
            "prompt_id": f"{i:02}",
            "prompt": f"say {i:02}",
            "prompt_text": f"say {i:02}",
            "response": words[i % 4],
        }
        for i in range(40)
    ]
    table = pa.Table.from_pylist(rows, schema=DEMONSTRATION_SCHEMA)
    splits = DataSplits(
        train=table[:8], heldout=table[8:16], selection=table, test=table, extra_prompts=table[:0]
    )

    async def export(folder: Path) -> None:
        folder.mkdir(parents=True)

    async def nll(split: pa.Table, prompts: int) -> HumanNLL:
        return HumanNLL(per_token=2.0, tail=9.0)

    async def sample(split: pa.Table, prompts: int, step: int) -> pa.Table:
        return pa.table({"prompt_id": split["prompt_id"], "response_text": pa.array(["the mat"] * 40)})

    system: Any = SimpleNamespace(
        splits=splits, renderer=renderer, human_nll=nll, sample=sample, export=export
    )
    evaluator = Evaluator(config, system, lambda line: None)
    row, _ = asyncio.run(evaluator.selection(0))
    closing = asyncio.run(evaluator.finish(3))
    tokens = [len(tokenizer(w["response"], add_special_tokens=False)["input_ids"]) + 1 for w in rows]
    for name, found in {"selection": row, **closing}.items():
        assert found["rows"] == 40, name
        assert found["model_is_human"] == (name == "human")
        assert found["demonstrations"] == 8
        assert found["sentence_nll"] == pytest.approx(2.0 * np.mean(tokens))
        assert found["prompt_letters"] == 40 * 6
    assert closing["last"]["step"] == 3
    assert pq.read_schema(tmp_path / "run" / "samples" / "test-last.parquet").names == TEXTS.names


def test_a_function_that_hangs_is_late(monkeypatch: pytest.MonkeyPatch) -> None:
    never = threading.Event()
    monkeypatch.setattr("services.evaluation.extra_measures.DEADLINE_S", 0.2)
    evaluator: Any = Evaluator.__new__(Evaluator)
    evaluator._extra, evaluator._train = lambda answers: never.wait(20), ["d"]
    evaluator.config = load(None, ["--policy.model=m", "--data.demonstrations=d"])
    evaluator.system = SimpleNamespace(renderer=None)
    human = pa.table({"response_ids": [[1, 2]]})
    monkeypatch.setattr("services.evaluator.human_answers", lambda *_: human)
    monkeypatch.setattr("services.evaluator.first_prompts", lambda split, prompts: split)
    texts = pa.table({"prompt": ["p"], "human": ["h"], "model": ["m"]})

    async def asked() -> None:
        try:
            await evaluator._with_extra({}, texts, "model", 1.5, human, 1)
        finally:
            never.set()

    with pytest.raises(RuntimeError, match=r"evaluation\.extra_measures did not finish within"):
        asyncio.run(asked())
