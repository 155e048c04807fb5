"""The configuration as text: what is printed or written loads again, and names every option."""

import re
import subprocess
import sys
from datetime import date
from pathlib import Path

import pytest
from pydantic import BaseModel

from services.config import Config, ConfigError, field_paths, load
from services.config_text import to_toml

ROOT = Path(__file__).parents[2]
NEEDED = ["--policy.model=m", "--data.demonstrations=d.jsonl"]


def test_round_trip_of_the_defaults(tmp_path):
    config = load(None, NEEDED)
    (tmp_path / "run.toml").write_text(to_toml(config))
    assert load(tmp_path / "run.toml") == config


def test_a_template_says_nothing_until_its_lines_are_uncommented(tmp_path):
    config = load(None, NEEDED)
    template = to_toml(config, template=True)
    (tmp_path / "run.toml").write_text(template)
    presets = [load(path, [*NEEDED, "--run.method", "gad"]) for path in (None, tmp_path / "run.toml")]
    assert presets[0] == presets[1]
    (tmp_path / "run.toml").write_text(re.sub(r"^#(?=\w)", "", template, flags=re.MULTILINE))
    assert load(tmp_path / "run.toml") == config


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.toml")), ids=lambda path: path.stem)
@pytest.mark.parametrize("method", ["rlgaf", "gad", "rlhf"])
def test_examples_load_and_go_round(tmp_path, example, method):
    config = load(example, [f"--run.method={method}"])
    assert config.discriminator.reward.clip == (5.0 if method == "rlgaf" else None)
    (tmp_path / "run.toml").write_text(to_toml(config))
    assert load(tmp_path / "run.toml") == config


@pytest.mark.parametrize(
    "text", ['say "hi"', "back\\slash", "two\nlines\ttab", "\r\b\f\x1b\x01\x7f", "Größe 東京 🙂", "'", "#"]
)
def test_any_text_goes_round(tmp_path, text):
    config = load(None, NEEDED)
    config = config.model_copy(update={"data": config.data.model_copy(update={"system_prompt": text})})
    (tmp_path / "run.toml").write_text(to_toml(config), encoding="utf-8", newline="")
    assert load(tmp_path / "run.toml").data.system_prompt == text


def test_variables_and_the_date_of_a_template_go_round(tmp_path):
    variables = {"enable_thinking": False, "a key": ['say "hi"', {"deep": 1.5}]}
    words = ["--data.template_variables.enable_thinking", "false", "--data.today=2026-11-30"]
    config = load(None, [*NEEDED, *words])
    assert config.data.template_variables == {"enable_thinking": False}
    assert config.data.today == date(2026, 11, 30)
    config = config.model_copy(
        update={"data": config.data.model_copy(update={"template_variables": variables})}
    )
    (tmp_path / "run.toml").write_text(to_toml(config))
    assert load(tmp_path / "run.toml") == config


def test_printed_default_loads_once_the_two_required_fields_are_set(tmp_path):
    printed = subprocess.run(
        [sys.executable, "-m", "services.cli", "config"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    (tmp_path / "run.toml").write_text(printed)
    with pytest.raises(ConfigError, match=r"policy\.model"):
        load(tmp_path / "run.toml")
    filled = printed.replace('\n#model = ""', '\nmodel = "m"', 1).replace(
        '\n#demonstrations = ""', '\ndemonstrations = "d.jsonl"', 1
    )
    (tmp_path / "run.toml").write_text(filled)
    assert load(tmp_path / "run.toml") == load(None, NEEDED)
    undocumented = [
        path for path, section in field_paths().items() if section is None and path not in mentioned(printed)
    ]
    assert not undocumented


def test_the_template_names_every_option_and_upper_bounds():
    printed = to_toml(load(None, NEEDED), template=True)
    for line in (
        '# One of "bce", "hinge", "least_squares", "bradley_terry", "wasserstein".',
        "# At least 1, at most 3.",
        "# At least 0, below 2147483648.",
    ):
        assert line in printed.splitlines()


def mentioned(toml: str) -> set[str]:
    """Dotted paths of all fields that stand in a TOML text, those commented out too."""
    found, section = set(), ""
    for line in toml.splitlines():
        if line.startswith("["):
            section = line.strip("[]") + "."
        elif " =" in line:
            found.add(section + line.lstrip("# ").split(" =")[0])
    return found


def all_sections(model: type[BaseModel] = Config) -> set[type[BaseModel]]:
    return {model, *(section for section in field_paths(model).values() if section is not None)}


@pytest.mark.parametrize(
    "section", sorted(all_sections(), key=lambda s: s.__name__), ids=lambda s: s.__name__
)
def test_every_field_is_documented(section):
    assert section.__doc__
    assert section.__doc__ != BaseModel.__doc__
    for name, field in section.model_fields.items():
        is_section = section is Config
        assert is_section or (field.description or "").strip().endswith((".", '"')), (
            f"{section.__name__}.{name}"
        )
