"""Whole runs in one process, a few steps long: every method, the reference rows and an audit."""

import math
from pathlib import Path

import pytest

from benchmarks.known_modes.artefacts import GUARD_OFF
from benchmarks.known_modes.cells import Cell, Data, Task
from benchmarks.known_modes.data import TARGETS, write_data
from benchmarks.known_modes.systems import OneProcessSystem, check
from benchmarks.known_modes.task import carry_out
from benchmarks.known_modes.training import Run
from services.config import ConfigError, load

ROOT = Path(__file__).parents[2]
SMALL = {
    "run.steps": 2,
    "run.prompts_per_step": 4,
    "sampling.group_size": 4,
    "discriminator.batch_size": 16,
    "discriminator.heldout_size": 16,
    "discriminator.warmup_max_steps": 3,
    "evaluation.every": 2,
    "evaluation.prompts": 24,
    "evaluation.test_prompts": 32,
    "evaluation.bootstrap": 100,
    "learner.sft.check_every": 1,
    "learner.sft.batch_size": 16,
}


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("method", ["rlgaf", "gad", "rlhf", "sft"])
def test_every_method_runs_and_is_measured(method, assets: Path) -> None:
    result = carry_out(Task("g", Cell("c", SMALL, method), 1), assets)
    assert result["method"] == ("frozen reward model" if method == "rlhf" else method)
    assert (result["last_step"], result["failed"]) == (2, "")
    assert [row["step"] for row in result["curve"]] == [0, 2]
    for row in (result["test"]["best"], result["test"]["last"]):
        assert all(math.isfinite(row[name]) for name in ("c2st", "mode_tv", "nll_gap", "valid", "moved"))
    assert result["tokens"]["learner_tokens"] > 0
    sampled = result["tokens"]["rollout_tokens"]
    assert sampled == 0 if method == "sft" else sampled > 0
    assert (result["discriminator_accuracy"] is None) == (method == "sft")
    assert {"wall", "cpu", "evaluate", "learn"} <= result["seconds"].keys()


def test_a_run_repeats_itself_and_seeds_differ(assets: Path) -> None:
    def curve(seed: int) -> list:
        rows = carry_out(Task("g", Cell("c", SMALL), seed), assets)["steps"]
        return [(row["step"], row["reward"], row["entropy"], row.get("accuracy")) for row in rows]

    assert curve(1) == curve(1) != curve(2)


def test_reference_rows_and_audits(assets: Path) -> None:
    test = carry_out(Task("g", Cell("c", SMALL, kind="reference"), 0), assets)["test"]
    assert test["base"]["valid"] < 0.2  # untrained
    assert (test["human"]["valid"], test["base"]["moved"]) == (1.0, pytest.approx(0.0, abs=1e-4))
    assert test["human"]["nll_gap"] == pytest.approx(0.0, abs=1.0)
    for plant in ("leading space", "trailing newline"):
        off = Cell("c", {**SMALL, **GUARD_OFF}, data=Data(plant=plant), kind="audit", guard=False)
        found = carry_out(Task("g", off, 0), assets)
        assert "outer whitespace" in {finding["cue"] for finding in found["findings"]}
        # What canonicalisation would leave: the untrained policy's own, of responses that were cut.
        assert found["canonical"]["outer whitespace"] < 0.95 < found["raw"]["outer whitespace"]
    guarded = Cell("c", SMALL, data=Data(plant="leading space"), kind="audit")
    found = carry_out(Task("g", guarded, 0), assets)
    assert found["raw"]["outer whitespace"] > 0.99 > found["canonical"]["outer whitespace"]
    longer = carry_out(Task("g", Cell("c", SMALL, data=Data(source="long"), kind="audit"), 0), assets)
    assert set(longer["raw"]) == set(found["raw"])


def test_planted_demonstrations_reach_an_unguarded_discriminator(assets: Path) -> None:
    cell = Cell("c", {**SMALL, **GUARD_OFF}, data=Data(plant="missing end"), guard=False)
    result = carry_out(Task("g", cell, 0), assets)
    assert 0.0 <= result["test"]["last"]["artefact_rate"] <= 1.0


def test_the_settings_are_those_of_a_run_with_ray(assets: Path, tmp_path: Path) -> None:
    """Discount, schedules and lengths are settled by `services.system`, not here."""
    task = Task("g", Cell("c", {**SMALL, "discriminator.level": "token"}), 0)
    write_data(tmp_path / "data.jsonl", Data(), 0)
    config = task.config(assets / "known-modes" / "base", tmp_path / "data.jsonl", tmp_path)
    system = Run(config, TARGETS["expert"]).system
    assert isinstance(system, OneProcessSystem)
    assert (system.policy.cfg.gamma, system.policy.cfg.schedule_steps) == (0.25, 2)
    assert system.judge.config.threads == 1


@pytest.mark.parametrize(
    ("setting", "said"),
    [("--run.max_policy_lag=1", "share weights"), ("--evaluation.top_p=0.9", "whole distribution")],
)
def test_what_one_process_cannot_do_is_refused(setting: str, said: str) -> None:
    needed = ["--policy.model=m", "--data.demonstrations=d.jsonl"]
    with pytest.raises(ConfigError, match=said):
        check(load(None, [*needed, setting]))
