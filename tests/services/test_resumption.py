"""`--auto-resume`: what counts as something to go on from, and what becomes of an attempt without it."""

from pathlib import Path

import pytest

from services.config import Config, ConfigError, load
from services.jobs.resumption import find_checkpoint, set_aside
from services.run_folder import checkpoints_of

NOON = 1_700_000_000.0  # 2023-11-14 22:13:20 UTC


def run_of(tmp_path: Path) -> Config:
    return load(None, ["--policy.model=m", "--data.demonstrations=d", f"--run.output={tmp_path}"])


def test_a_finished_checkpoint_is_gone_on_from(tmp_path):
    config = run_of(tmp_path)
    checkpoints_of(config).begin(3)
    checkpoints_of(config).commit(3, {"step": 3})
    found = find_checkpoint(config, auto=True, step=None, say=print)
    assert found is not None
    assert found.state == {"step": 3}
    assert set_aside(config, NOON) is None
    assert config.folder.is_dir()


def test_what_is_begun_is_set_aside_when_the_run_begins_anew(tmp_path):
    config, said = run_of(tmp_path), []
    checkpoints_of(config).begin(3)
    with pytest.raises(ConfigError, match="no finished checkpoint"):
        find_checkpoint(config, auto=False, step=None, say=said.append)
    assert find_checkpoint(config, auto=True, step=None, say=said.append) is None
    assert len(said) == 1
    assert "an earlier attempt left no checkpoint" in said[0]
    assert not config.folder.exists()


def test_an_attempt_without_a_checkpoint_is_renamed_and_kept_whole(tmp_path):
    config = run_of(tmp_path)
    (config.folder / "checkpoints" / ".partial-step-000003").mkdir(parents=True)
    (config.folder / "metrics.jsonl").write_text("{}\n")
    moved = set_aside(config, NOON)
    assert moved == tmp_path / "run.no-checkpoint-20231114-221320"
    assert (moved / "metrics.jsonl").read_text() == "{}\n"
    assert not config.folder.exists()


def test_what_a_failed_start_leaves_is_no_attempt(tmp_path):
    config = run_of(tmp_path)
    assert set_aside(config, NOON) is None
    (config.folder / "tensorboard").mkdir(parents=True)
    (config.folder / "config.toml").write_text("")
    assert set_aside(config, NOON) is None
    assert config.folder.is_dir()
