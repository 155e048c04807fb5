"""Any configuration file and command line gives a configuration or sentences that name what is wrong."""

import math
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.config import Config, ConfigError, field_paths, load
from services.config_text import tables_to_toml, to_toml
from services.foreign_names import FOREIGN_NAMES

FIELDS = sorted(path for path, section in field_paths().items() if section is None)
VALUE: Any = st.one_of(
    st.sampled_from(
        [0, -1, 1, 10**20, -(10**20), 2**31, 0.0, -0.5, 1e308, 5e-324, "", "none", "auto", "cuda"]
    ),
    st.sampled_from([True, False, float("inf"), float("-inf"), float("nan")]),
    st.integers(),
    st.floats(),
    st.text(st.characters(codec="utf-8"), max_size=8),
    st.lists(
        st.one_of(st.integers(), st.floats(), st.text(st.characters(codec="utf-8"), max_size=4)), max_size=3
    ),
)
SAID = st.lists(
    st.tuples(st.sampled_from([*FIELDS, *field_paths(), "x", "method.sft.run.steps"]), VALUE), max_size=6
)
BASE = {"policy.model": "org/model", "data.demonstrations": "answers.jsonl"}
FILE = to_toml(load(None, [f"--{name}={value}" for name, value in BASE.items()]))


def outcome(text: bytes | None, overrides: list[str]) -> Config | str:
    """The configuration, or the message; anything else escapes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.toml"
        if text is not None:
            path.write_bytes(text)
        try:
            return load(path if text is not None else None, overrides)
        except ConfigError as error:
            return str(error)


def holds(found: Config | str) -> None:
    """A message is short lines; a configuration is finite and survives its own file."""
    if isinstance(found, str):
        assert found.strip()
        assert "Traceback" not in found
        return
    assert outcome(to_toml(found).encode(), []) == found
    for path in FIELDS:
        value: Any = found
        for part in path.split("."):
            value = getattr(value, part)
        assert not isinstance(value, float) or math.isfinite(value), path
        assert not path.endswith("seed") or 0 <= value < 2**31, path


def nested(said: list[tuple[str, Any]]) -> dict[str, Any]:
    tables: dict[str, Any] = {}
    for dotted, value in [*BASE.items(), *said]:
        node = tables
        *parents, leaf = dotted.split(".")
        for parent in parents:
            inner = node.setdefault(parent, {})
            node = inner if isinstance(inner, dict) else {}
        node[leaf] = value
    return tables


def fuzz_tables(said: list[tuple[str, Any]]) -> None:
    holds(outcome(tables_to_toml(nested(said)).encode(), []))


def fuzz_command_line(said: list[tuple[str, Any]]) -> None:
    words = [f"--{name}={value}" for name, value in BASE.items()]
    holds(outcome(None, [*words, *(f"--{dotted}={value}" for dotted, value in said)]))


def fuzz_bytes(cut: tuple[int, int], put: bytes) -> None:
    whole = FILE.encode()
    start, length = cut[0] % len(whole), cut[1] % 40
    holds(outcome(whole[:start] + put + whole[start + length :], []))


CUT = st.tuples(st.integers(0, 10**6), st.integers(0, 10**6))


@settings(max_examples=60, deadline=None)
@given(said=SAID)
def test_tables(said: list[tuple[str, Any]]) -> None:
    fuzz_tables(said)


@settings(max_examples=60, deadline=None)
@given(said=SAID)
def test_command_lines(said: list[tuple[str, Any]]) -> None:
    fuzz_command_line(said)


@settings(max_examples=30, deadline=None)
@given(cut=CUT, put=st.binary(max_size=8))
def test_bytes(cut: tuple[int, int], put: bytes) -> None:
    fuzz_bytes(cut, put)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@settings(max_examples=4000, deadline=None)
@given(said=SAID, cut=CUT, put=st.binary(max_size=8))
def test_twelve_thousand_configurations(
    said: list[tuple[str, Any]], cut: tuple[int, int], put: bytes
) -> None:
    fuzz_tables(said)
    fuzz_command_line(said)
    fuzz_bytes(cut, put)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--learner.lr=inf", "learner.lr: Input should be a finite number"),
        ("--sampling.temperature=nan", "sampling.temperature: Input should be a finite number"),
        ("--run.seed=-1", "run.seed: Input should be greater than or equal to 0"),
        ("--run.seed=100000000000000000000", "run.seed: Input should be less than 2147483648"),
        ("--data.split_seed=-1", "data.split_seed: Input should be greater"),
        ("--evaluation.seed=-1", "evaluation.seed: Input should be greater"),
        ("--rollout.start_timeout_s=1e20", r"rollout.start_timeout_s: 1e\+20 seconds is more than"),
        ("--run.steps=100000000000000000000", r"run.steps: 1e\+20 is more than"),
        ("--data.system_prompt=a\0b", "data.system_prompt: holds a NUL"),
        ("--learning_rate=1", "unknown field learning_rate; here it is learner.lr$"),
        ("--discriminator.learning_rate=1", "here it is discriminator.lr$"),
        ("--num-generations=4", "here it is sampling.group_size$"),
    ],
)
def test_the_message_names_field_and_reason(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(None, [*(f"--{name}={value}" for name, value in BASE.items()), override])


def test_no_field_takes_infinity() -> None:
    for dotted in FIELDS:
        found = outcome(None, [*(f"--{name}={text}" for name, text in BASE.items()), f"--{dotted}=inf"])
        if not isinstance(found, str):  # a text field
            assert f'{dotted.rpartition(".")[2]} = "inf"' in to_toml(found), dotted


def test_foreign_names_lead_to_fields_that_exist() -> None:
    known = field_paths()
    for theirs, ours in FOREIGN_NAMES.items():
        named = [word.strip("(),:[]") for word in ours.split() if "." in word.strip("(),:[]")]
        assert all(word in known for word in named), theirs
        assert theirs not in known
