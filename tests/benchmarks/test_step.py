"""Every part of the speed benchmark, end to end on a tiny model; TRL's only where it is installed."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PARTS = ["a", "b", "c", *(["d"] if importlib.util.find_spec("trl") else []), "full"]
SIZE = ("--prompts", "2", "--group-size", "4", "--prompt-tokens", "24", "--response-tokens", "6")


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_a_part_runs_and_compares(tiny_model: Path, tmp_path: Path, part: str) -> None:
    command = ("benchmarks.step", "--model", str(tiny_model), "--part", part, "--out", str(tmp_path))
    ended = subprocess.run(
        [sys.executable, "-m", *command, *SIZE, "--synthetic-prompts", "--repeats", "1", "--threads", "1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-2000:]
    found = json.loads((tmp_path / "step.json").read_text())["parts"][part]
    for contender in found["contenders"].values():
        assert all(turn["seconds"] > 0 for turn in contender["details"])
        assert len(contender["details"]) == 1
        assert sum(contender["peak_mib"].values()) > 100
    for ratio in found["ratios"]:
        assert ratio["wall"][0] > 0
    assert "|" in (tmp_path / "step.md").read_text()
