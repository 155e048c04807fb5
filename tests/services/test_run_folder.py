"""What may be begun in a run's folder, and what may be gone on with."""

import json
from pathlib import Path

import pytest

from services.checkpoint import Checkpoints
from services.config import Config, ConfigError, load
from services.run_folder import prepare_folder


def run_of(tmp_path: Path, **settings: object) -> Config:
    words = {"policy.model": "m", "data.demonstrations": "d", "run.output": tmp_path, "run.steps": 6}
    return load(None, [f"--{name}={value}" for name, value in (words | settings).items()])


def with_checkpoint(config: Config, step: int, looks: int = 0) -> None:
    checkpoints = Checkpoints(config.folder / "checkpoints", 2)
    checkpoints.begin(step)
    checkpoints.commit(step, {"controller": {"step": step, "early": {"looks": looks}}})


def summed_up(config: Config, step: int) -> None:
    (config.folder / "summary.json").write_text(json.dumps({"steps": step}))


def test_a_run_whose_steps_are_done_has_its_closing_evaluation_to_do(tmp_path):
    config = run_of(tmp_path)
    with_checkpoint(config, 6)
    assert prepare_folder(config, resume=True).steps() == [6]
    summed_up(config, 6)
    with pytest.raises(ConfigError, match=r"has done 6 of 6 steps; raise run\.steps"):
        prepare_folder(config, resume=True)


def test_the_summary_of_fewer_steps_is_not_this_ones(tmp_path):
    """Four steps to their end, then raised to six, of which the closing evaluation was broken off."""
    config = run_of(tmp_path)
    with_checkpoint(config, 4)
    summed_up(config, 4)
    assert prepare_folder(config, resume=True).steps() == [4]
    with_checkpoint(config, 6)
    assert prepare_folder(config, resume=True).steps() == [4, 6]


def test_early_stopping_ends_a_run_once_it_is_summed_up(tmp_path):
    config = run_of(tmp_path, **{"run.method": "sft", "learner.sft.patience": 2})
    with_checkpoint(config, 4, looks=2)
    assert prepare_folder(config, resume=True).steps() == [4]
    summed_up(config, 4)
    with pytest.raises(ConfigError, match=r"early stopping at step 4; raise learner\.sft\.patience"):
        prepare_folder(config, resume=True)
