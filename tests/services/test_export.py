"""`rlgaf export`: a copy, whole or absent, and nothing overwritten."""

from pathlib import Path

import pytest
import torch

from services.cli import _config_of_run
from services.config import ConfigError
from services.export import export_model


@pytest.fixture
def run(tmp_path: Path, tiny_model: Path) -> Path:
    """A run folder that has a best model and no last one."""
    folder = tmp_path / "runs" / "tiny"
    folder.mkdir(parents=True)
    (folder / "best").symlink_to(tiny_model)
    (folder / "config.toml").write_text("[sampling]\nmax_tokens = 7\n")
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
    assert (out / "rlgaf.toml").read_text() == (run / "config.toml").read_text()
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
