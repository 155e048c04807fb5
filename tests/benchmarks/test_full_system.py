"""A finished run of the full system joins a grid's results."""

from pathlib import Path

import pytest
from run_folders import finished_run

from benchmarks.known_modes import full_system


def test_a_run_folder_becomes_a_result(tmp_path: Path) -> None:
    run, results = tmp_path / "run", tmp_path / "results"
    with pytest.raises(FileNotFoundError):
        full_system.keep(run, "default", "rlgaf", results)
    finished_run(run, seed=4)
    file = full_system.keep(run, "default", "rlgaf", results)
    assert file == results / "default" / "full-system" / "rlgaf.seed4.json"
    ((cell, (result,)),) = full_system.kept("default", results)
    assert cell == "rlgaf, full system"
    assert result["test"]["best"] == {"mode_tv": 0.1, "c2st": 0.6, "nll": 1.2, "chrf": -0.6}
    assert result["tokens"] == {"rollout_tokens": 7}
    assert result["steps"] == [{"step": 1, "reward": 0.5, "kl": 0.01}, {"step": 60}]
    assert (result["seed"], result["last_step"]) == (4, 60)
    assert result["config"] == {
        "run": {"seed": 4, "method": "rlgaf"},
        "policy": {"model": "known-modes/base"},
        "discriminator": {"model": ""},
        "evaluation": {"embedding_model": "assets/minilm"},
    }
    assert [(row["minutes"], row["samples"]) for row in result["curve"]] == [(0.0, 0.0), (2.0, 640.0)]
    assert full_system.kept("rewards", results) == []
