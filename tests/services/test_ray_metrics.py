"""Every documented metric is set by a real step's row, with the value that the row says."""

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest

from services.config import load
from services.metric_names import HAPPENED, METRICS, PREFIX, markdown
from services.ray_metrics import RunMetrics, alarm_samples, row_samples, setting_samples
from services.watching.alarms import CHECKS, Alarm

ROWS = Path(__file__).parent / "metrics-rows.jsonl"
"""Two steps of a run of the tiny model: an evaluation followed the second one, and in it the discriminator
trained."""
CONFIG = load(
    None,
    ["--policy.model=m", "--data.demonstrations=d", "--run.name=tiny", "--run.max_policy_lag=2"],
)


@pytest.fixture(scope="module")
def rows() -> tuple[dict[str, Any], dict[str, Any]]:
    before, row = (json.loads(line) for line in ROWS.read_text().splitlines())
    return before, row


def told(samples: list[Any]) -> dict[tuple[str, str], float]:
    assert len({(s.metric.name, s.label) for s in samples}) == len(samples)
    return {(sample.metric.name, sample.label): sample.value for sample in samples}


def test_names_are_unique_say_their_unit_and_have_one_source():
    names = [metric.name for metric in METRICS]
    assert len(set(names)) == len(names)
    for metric in METRICS:
        assert metric.name.startswith("rlgaf_")
        assert metric.exported == PREFIX + metric.name
        assert metric.name.endswith("_total") == (metric.kind == "counter")
        assert bool(metric.boundaries) == (metric.kind == "histogram")
        assert sum(map(bool, (metric.key, metric.series, metric.setting, metric.live))) == 1


def test_every_documented_metric_is_set_by_a_step(rows):
    before, row = rows
    samples = row_samples(row, before) + setting_samples(CONFIG) + alarm_samples([], [])
    rest = {metric.name for metric in METRICS} - {sample.metric.name for sample in samples}
    beside_the_steps = {"rlgaf_start_timestamp_seconds", "rlgaf_rollout_workers_healthy"}
    assert rest == beside_the_steps | {metric.name for metric in METRICS if metric.when == HAPPENED}
    for metric in METRICS:
        for key in [metric.key, *metric.series.values()]:
            assert not key or key in row or any(name.startswith(key) for name in row if key.endswith("/")), (
                key
            )


def test_values_are_the_rows(rows):
    before, row = rows
    values = told(row_samples(row, before))
    assert values["rlgaf_step", ""] == row["step"]
    assert values["rlgaf_last_step_timestamp_seconds", ""] == row["time"]
    assert values["rlgaf_policy_lag_max", ""] == row["lag/policy_max"]
    assert values["rlgaf_memory_bytes", "learner"] == row["policy/memory_mib/rss"] * 1024 * 1024
    assert values["rlgaf_phase_seconds", "generate"] == row["seconds/generate"]
    phases = {key.split("/")[1] for key in row if key.startswith("seconds/")}
    for name in ("rlgaf_phase_seconds", "rlgaf_phase_spent_seconds_total"):
        assert {label: value for (metric, label), value in values.items() if metric == name} == {
            phase: row[f"seconds/{phase}"] for phase in phases
        }
    trained = row["responses/trained"] - before["responses/trained"]
    assert values["rlgaf_responses_total", "trained"] == trained > 0
    assert values["rlgaf_tokens_total", ""] == row["policy/tokens_response"]


def test_running_totals_are_counted_on_and_begin_again(rows):
    before, row = rows
    totals = {"rollout/replacements": 5, "rollout/sync_failures": 2}
    grown = told(row_samples(row | totals, before | {"rollout/replacements": 3, "rollout/sync_failures": 2}))
    assert grown["rlgaf_rollout_replacements_total", ""] == 2
    assert ("rlgaf_sync_failures_total", "") not in grown
    again = told(row_samples(row | {"rollout/replacements": 1}, before | {"rollout/replacements": 4}))
    assert again["rlgaf_rollout_replacements_total", ""] == 1
    first = told(row_samples(row | totals, None))
    assert first["rlgaf_sync_failures_total", ""] == 2


def test_what_is_not_finite_or_not_there_is_left_out():
    values = told(row_samples({"step": 3, "policy/loss": math.nan, "reward/mean": None, "time": 1.5}, None))
    assert values == {("rlgaf_step", ""): 3, ("rlgaf_last_step_timestamp_seconds", ""): 1.5}


def test_a_counter_is_told_increases_only(rows):
    """Ray's counters refuse everything else."""
    _, row = rows
    for previous in (None, row):
        counted = [sample for sample in row_samples(row, previous) if sample.metric.kind == "counter"]
        assert counted
        assert all(sample.value > 0 for sample in counted)


def test_settings_are_the_configurations():
    values = told(setting_samples(CONFIG))
    assert values["rlgaf_policy_lag_bound", ""] == 2
    assert values["rlgaf_steps_wanted", ""] == CONFIG.run.steps
    assert values["rlgaf_sync_deadline_seconds", ""] == CONFIG.rollout.sync_timeout_s


def test_alarms_are_counted_when_raised_and_shown_while_active():
    samples = alarm_samples([Alarm(4, "mode_collapse", "…")], ["mode_collapse", "repetition"])
    values = told(samples)
    assert values["rlgaf_alarms_total", "mode_collapse"] == 1
    active = {label for (name, label), value in values.items() if name == "rlgaf_alarm_active" and value}
    assert active == {"mode_collapse", "repetition"}
    assert {label for name, label in values if name == "rlgaf_alarm_active"} == set(CHECKS)


def test_gauges_are_repeated_until_the_end(monkeypatch):
    """Ray forgets those that are not; counters would count twice."""
    recorded: list[list[tuple[str, float]]] = []
    exported = RunMetrics(CONFIG)
    monkeypatch.setattr("services.ray_metrics.REPEAT_EVERY_S", 0.01)
    monkeypatch.setattr(
        exported, "_record", lambda samples: recorded.append([(s.metric.name, s.value) for s in samples])
    )
    exported.begin()
    exported.step({"step": 3, "policy/tokens_response": 5}, None)
    exported.step({"step": 4}, None)
    told_by_then = len(recorded)
    deadline = time.monotonic() + 30
    while len(recorded) < told_by_then + 2:
        assert time.monotonic() < deadline, "nothing was repeated"
        time.sleep(0.01)
    exported.close()
    ended = len(recorded)
    assert [name for one in recorded for name, _ in one].count("rlgaf_tokens_total") == 1
    for one in recorded[told_by_then:]:
        assert ("rlgaf_step", 4) in one
        assert ("rlgaf_steps_wanted", CONFIG.run.steps) in one
        assert len(one) == len(dict(one))
    time.sleep(0.1)
    assert len(recorded) == ended


def test_rays_instruments_take_every_sample(rows):
    before, row = rows
    exported = RunMetrics(CONFIG)
    exported.begin()
    exported.step(row | {"rollout/sync_failures": 1, "rollout/replacements": 1}, before)
    exported.alarms([Alarm(4, "mode_collapse", "…")], ["mode_collapse"])
    exported.close()
    made = {name: instrument.info for name, instrument in exported._instruments.items()}
    assert set(made) == {metric.name for metric in METRICS} - {"rlgaf_rollout_workers_healthy"}
    for metric in METRICS:
        if metric.name in made:
            assert made[metric.name]["tag_keys"] == (("run", metric.label) if metric.label else ("run",))
            assert made[metric.name]["description"] == metric.what


def test_the_documented_table_is_this_one():
    page = (Path(__file__).parents[2] / "docs" / "deploy.md").read_text()
    assert markdown() in page, "docs/deploy.md: replace the table by `python -m services.metric_names`"
