"""`rlgaf export`: a copy, whole or absent, and nothing overwritten."""

from pathlib import Path

import pytest
import torch

from discriminator.config import DiscriminatorConfig
from discriminator.exported import read_exported, write_exported
from discriminator.trainer import Published
from services.cli import _config_of_run
from services.config import ConfigError, load
from services.config_text import to_toml
from services.export import export_model

OVERRIDES = [
    "--policy.model=/private/model",
    "--data.demonstrations=/private/answers.jsonl",
    "--run.output=/private/runs",
    "--evaluation.extra_measures=/private/measures.py:f",
    "--data.system_prompt=Be\nbrief",
    "--sampling.max_tokens=7",
    "--learner.lora.rank=4",
]


@pytest.fixture
def run(tmp_path: Path, tiny_model: Path) -> Path:
    """A run folder that has a best model and no last one."""
    folder = tmp_path / "runs" / "tiny"
    folder.mkdir(parents=True)
    (folder / "best").symlink_to(tiny_model)
    (folder / "config.toml").write_text(to_toml(load(None, OVERRIDES)))
    return folder


def test_the_copy_is_a_model_of_its_own(run, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = export_model(run, tmp_path / "out", "best")
    assert out == tmp_path / "out"
    copy, original = (AutoModelForCausalLM.from_pretrained(folder) for folder in (out, run / "best"))
    for mine, theirs in zip(copy.parameters(), original.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert AutoTokenizer.from_pretrained(out).eos_token == "<|end|>"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "runs"]


def test_generate_and_evaluate_find_the_configuration_of_a_run_and_of_a_copy(run, tmp_path):
    out = export_model(run, tmp_path / "out", "best")
    assert _config_of_run(str(run / "best")) == run / "config.toml"
    assert _config_of_run(str(out)) == out / "rlgaf.toml"
    assert _config_of_run("HuggingFaceTB/SmolLM2-135M-Instruct") is None


def test_into_folders_that_do_not_exist_yet(run, tmp_path):
    assert (export_model(run, tmp_path / "a" / "b" / "out", "best") / "config.json").is_file()


def test_nothing_is_overwritten(run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("keep")
    with pytest.raises(ConfigError, match="exists already"):
        export_model(run, tmp_path / "out", "best")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_what_is_not_there_is_named_beside_what_is(run, tmp_path):
    with pytest.raises(ConfigError, match=r"last holds no model; .* has: best"):
        export_model(run, tmp_path / "out", "last")
    with pytest.raises(ConfigError, match="holds no model"):
        export_model(tmp_path / "nowhere", tmp_path / "out", "best")
    with pytest.raises(ConfigError, match="it can be best or last"):
        export_model(run, tmp_path / "out", "first")
    assert not (tmp_path / "out").exists()


def test_an_earlier_attempt_that_was_killed_does_no_harm(run, tmp_path):
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "junk").write_text("half")
    out = export_model(run, tmp_path / "out", "best")
    assert not (out / "junk").exists()


def test_a_copy_can_be_given_away(run, tmp_path, tiny_model):
    out = export_model(run, tmp_path / "out", "best")
    for file in out.iterdir():
        assert b"/private" not in file.read_bytes(), file
        assert str(tmp_path).encode() not in file.read_bytes(), file
        assert file.stat().st_mode & 0o777 == out.stat().st_mode & 0o666, file
    at = load(out / "rlgaf.toml", [f"--policy.model={out}", "--data.demonstrations=d.jsonl"])
    was = load(run / "config.toml")
    assert at.sampling == was.sampling
    assert at.learner == was.learner
    assert at.data == was.data.model_copy(update={"demonstrations": "d.jsonl"})


def test_an_exported_discriminator_names_no_folder_and_can_be_read_by_others(tmp_path, tiny_model):
    config = DiscriminatorConfig(model=str(tiny_model), dropout=0.25)
    write_exported(
        tmp_path / "discriminator",
        Published(3, {"w": torch.zeros(1)}, "sum"),
        config,
        str(tiny_model),
        "float32",
    )
    for file in (tmp_path / "discriminator").iterdir():
        assert str(tiny_model).encode() not in file.read_bytes()
        assert file.stat().st_mode & 0o777 == file.parent.stat().st_mode & 0o666
    read = read_exported(tmp_path / "discriminator")
    assert read.config == config.model_copy(update={"model": ""})
    assert read.version == 3
    write_exported(
        tmp_path / "hub", Published(3, {"w": torch.zeros(1)}, "sum"), config, "org/model", "float32"
    )
    assert read_exported(tmp_path / "hub").model == "org/model"
