"""`rlgaf checkpoint ls | verify | prune`."""

import shutil
from pathlib import Path

import pytest
from run_folders import checkpointed
from typer.testing import CliRunner

from services.cli import app
from services.config import Config, ConfigError, load


@pytest.fixture
def run(tmp_path: Path) -> Config:
    """Whole checkpoints of steps 2 and 4, a broken one of 6, one that was begun, and one given up."""
    words = ["--policy.model=m", "--data.demonstrations=d", f"--run.output={tmp_path}"]
    config = load(None, [*words, "--run.keep_checkpoints=9"])
    for step in (2, 4):
        checkpointed(config, step)
    (checkpointed(config, 6) / "weights").write_text("torn")
    root = config.folder / "checkpoints"
    (root / ".partial-step-000007").mkdir()
    shutil.copytree(root / "step-000004", root / ".superseded-step-000009")
    (root / "step-000008.bak").mkdir()
    return config


def command(*words: str) -> tuple[int, list[str]]:
    done = CliRunner().invoke(app, ["checkpoint", *words], catch_exceptions=False)
    return done.exit_code, done.output.splitlines()


def test_ls_names_all_there_is(run):
    code, lines = command("ls", str(run.folder))
    assert code == 0
    assert sorted(line.split()[0] for line in lines) == [
        ".partial-step-000007",
        ".superseded-step-000009",
        "step-000002",
        "step-000004",
        "step-000006",
    ]
    assert all("MiB" in line and "rlgaf 0.1.0+" in line for line in lines if line.startswith("step-"))


def test_verify_reads_every_file(run):
    code, lines = command("verify", str(run.folder))
    assert code == 1
    assert {line.split()[0]: line.split()[1] for line in lines} == {
        "step-000002": "whole",
        "step-000004": "whole",
        "step-000006": "broken:",
    }
    shutil.rmtree(run.folder / "checkpoints" / "step-000006")
    assert command("verify", str(run.folder))[0] == 0


def test_prune_keeps_the_newest_whole_ones(run):
    root = run.folder / "checkpoints"
    assert command("prune", str(run.folder), "--keep", "2")[0] == 0
    assert sorted(path.name for path in root.iterdir()) == ["step-000002", "step-000004", "step-000008.bak"]
    command("prune", str(run.folder))
    assert sorted(path.name for path in root.iterdir()) == ["step-000004", "step-000008.bak"]
    (root / "step-000004" / "weights").write_text("torn")
    with pytest.raises(ConfigError, match="no whole checkpoint; nothing was removed"):
        command("prune", str(run.folder))
    assert (root / "step-000004").is_dir()


def test_a_folder_that_is_no_run(tmp_path):
    for what in ("ls", "verify", "prune"):
        with pytest.raises(ConfigError, match="has no folder of checkpoints"):
            command(what, str(tmp_path))
