"""A finished run of the full system joins a grid's results."""

import json
from pathlib import Path

import pytest

from benchmarks.known_modes import full_system


def test_a_run_folder_becomes_a_result(tmp_path: Path) -> None:
    run, results = tmp_path / "run", tmp_path / "results"
    with pytest.raises(FileNotFoundError):
        full_system.keep(run, "default", "rlgaf", results)
    run.mkdir()
    rows = {
        name: {"mode_tv": tv} for name, tv in (("base", 0.7), ("best", 0.1), ("last", 0.2), ("human", 0.0))
    }
    summary = {
        "method": "rlgaf",
        "demonstrations": 2048,
        "best_step": 40,
        "steps": 60,
        "wall_seconds": 99.0,
        "budget": {"rollout_tokens": 7, "seconds": {"learn": 3.0}},
        "evaluation": rows,
        "alarms": [],
        "learning_curve": [{"step": 0, "c2st": 0.9}],
    }
    (run / "summary.json").write_text(json.dumps(summary))
    (run / "config.toml").write_text(
        '[run]\nseed = 4\noutput = "/home/me/runs"\n[policy]\nmodel = "/home/me/assets/known-modes/base"\n'
    )
    metrics = {"step": 1, "time": 0.0, "reward/mean": 0.5, "policy/kl": 0.01, "sync/wire_s": 0.1}
    (run / "metrics.jsonl").write_text(json.dumps(metrics) + "\n")
    file = full_system.keep(run, "default", "rlgaf", results)
    assert file == results / "default" / "full-system" / "rlgaf.seed4.json"
    ((cell, (result,)),) = full_system.kept("default", results)
    assert cell == "rlgaf, full system"
    assert result["test"] == rows
    assert result["tokens"] == {"rollout_tokens": 7}
    assert result["steps"] == [{"step": 1, "reward": 0.5, "kl": 0.01}]
    assert (result["seed"], result["last_step"]) == (4, 60)
    assert result["config"] == {"run": {"seed": 4}, "policy": {"model": "known-modes/base"}}
    assert full_system.kept("rewards", results) == []
