"""`--auto-resume`: what counts as something to go on from, and what becomes of an attempt without it."""

from pathlib import Path

from services.checkpoint import Checkpoints
from services.config import Config, load
from services.jobs.resumption import goes_on, set_aside

NOON = 1_700_000_000.0  # 2023-11-14 22:13:20 UTC


def run_of(tmp_path: Path) -> Config:
    return load(None, ["--policy.model=m", "--data.demonstrations=d", f"--run.output={tmp_path}"])


def test_a_finished_checkpoint_is_gone_on_from(tmp_path):
    config = run_of(tmp_path)
    checkpoints = Checkpoints(config.folder / "checkpoints", 2)
    checkpoints.begin(3)
    assert not goes_on(config)  # begun is not finished
    checkpoints.commit(3, {})
    assert goes_on(config)
    assert set_aside(config, NOON) is None
    assert config.folder.is_dir()


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
