"""Metrics rows, phase timing and alarms."""

import contextlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
from run_folders import full_disk

from services.metrics import MetricsLog, PhaseTimer, flatten, process_memory, read_metrics, strict
from services.watching.alarms import CHECKS, AlarmBounds, Alarms


def refuse_constant(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


def test_rows_are_flat_strict_json_with_histograms(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, tensorboard=False, clock=lambda: 12.5)
    row = log.log(
        1, {"reward": {"mean": np.float32(0.5), "max": math.inf}, "lag": {"policy": [2, 0, 2], "disc": []}}
    )
    log.close()
    assert row["reward/max"] == math.inf
    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=refuse_constant) == {
        "step": 1,
        "time": 12.5,
        "reward/mean": 0.5,
        "reward/max": None,
        "lag/policy": {"0": 1, "2": 2},
        "lag/policy_mean": pytest.approx(4 / 3),
        "lag/policy_max": 2,
        "lag/disc": {},
    }
    assert flatten({"a": {"b": {"c": 1}}, "d": 2}) == {"a/b/c": 1, "d": 2}
    assert strict({"a": [math.nan, {"b": np.float64(1)}]}) == {"a": [None, {"b": 1.0}]}


def test_a_step_is_on_disk_at_once_and_never_twice(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, tensorboard=False)
    log.log(1, {"a": 1})
    assert len(read_metrics(log.path)) == 1
    with pytest.raises(ValueError, match="step 1"):
        log.log(1, {"a": 1})
    log.close()


def test_resume_drops_later_steps_and_a_line_cut_by_a_kill(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, tensorboard=False)
    for step in range(1, 6):
        log.log(step, {"a": step})
    log.close()
    with log.path.open("a") as file:
        file.write('{"step": 6, "a"')
    assert [row["step"] for row in read_metrics(log.path)] == [1, 2, 3, 4, 5]
    resumed = MetricsLog(tmp_path, tensorboard=False)
    assert resumed.truncate_after(3) == 3
    resumed.log(4, {"a": 40})
    with pytest.raises(RuntimeError, match="first row"):
        resumed.truncate_after(3)
    resumed.close()
    assert [row["a"] for row in read_metrics(log.path)] == [1, 2, 3, 40]
    assert MetricsLog(tmp_path / "new", tensorboard=False).truncate_after(3) == 0


def test_damage_in_the_middle_names_the_line(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step"\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2"):
        MetricsLog(tmp_path).truncate_after(3)


def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def write(first: int, last: int, value: float, resume: bool) -> None:
        log = MetricsLog(tmp_path)
        if resume:
            log.truncate_after(first - 1)
        for step in range(first, last + 1):
            log.log(step, {"reward": {"mean": value}, "bad": math.nan, "lag": {"policy": [0, 1, 1]}})
        log.close()

    write(1, 4, 0.25, resume=False)
    write(3, 4, 0.75, resume=True)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("reward/mean")] == [
        (1, 0.25),
        (2, 0.25),
        (3, 0.75),
        (4, 0.75),
    ]
    assert "bad" not in events.Tags()["scalars"]
    assert events.Histograms("lag/policy")[0].histogram_value.num == 3


def test_phase_timer_with_a_clock_of_its_own() -> None:
    now = [0.0]
    timer = PhaseTimer(lambda: now[0])
    with timer("generate"):
        now[0] += 2
        with timer("score"):
            now[0] += 1
    with contextlib.suppress(KeyError), timer("learn"):
        now[0] += 4
        raise KeyError
    timer.tokens("generate", 30)
    assert timer.take() == {"score": 1, "generate": 3, "learn": 4}
    timer.add("generate", 0.5)
    assert timer.take() == {"generate": 0.5}
    other = PhaseTimer()
    other.load_state_dict(json.loads(json.dumps(timer.state_dict())))
    assert other.totals() == timer.totals()
    assert timer.totals()["generate"] == {"seconds": 3.5, "tokens": 30}


def test_memory_is_that_of_this_process() -> None:
    import resource

    assert 10 < process_memory()["rss"] <= resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 + 1


STEADY = {
    "reward/std": 0.3,
    "discriminator/accuracy_heldout": 0.8,
    "policy/mismatch_mean": 0.01,
    "reward/length_correlation": 0.1,
    "policy/entropy": 3.0,
    "response/truncated_rate": 0.1,
    "policy/gumbel_masked": 0.2,
}


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("not_finite", "policy/kl", math.nan),
        ("reward_flat", "reward/std", 1e-6),
        ("discriminator_saturated", "discriminator/accuracy_heldout", 1.0),
        ("logprob_mismatch", "policy/mismatch_mean", 0.3),
        ("length_reward", "reward/length_correlation", -0.8),
        ("entropy_collapse", "policy/entropy", 0.2),
        ("truncation", "response/truncated_rate", 1.0),
        ("gumbel_masked", "policy/gumbel_masked", 0.9),
    ],
)
def test_each_alarm_is_raised_once_when_it_begins(name: str, key: str, value: float) -> None:
    alarms = Alarms()
    rows = [{"step": step, **STEADY} for step in range(1, 13)]
    for end in range(1, 13):
        assert alarms.check(rows[:end]) == []
    rows += [{"step": step, **STEADY, key: value} for step in range(13, 30)]
    for end in range(13, 30):
        alarms.check(rows[:end])
    assert [alarm.name for alarm in alarms.raised] == [name]
    assert alarms.raised[0].step >= 13
    copy = Alarms()
    copy.load_state_dict(json.loads(json.dumps(alarms.state_dict())))
    assert copy.check(rows) == []
    assert copy.raised == alarms.raised


def test_an_alarm_comes_back_after_a_pause_and_absent_metrics_are_silent() -> None:
    alarms = Alarms(AlarmBounds(logprob_mismatch=0.1))
    rows: list[dict] = []
    for step, value in enumerate([0.5, 0.5, 0.0, 0.5]):
        rows.append({"step": step, "policy/mismatch_mean": value})
        alarms.check(rows)
    assert [alarm.step for alarm in alarms.raised] == [0, 3]
    assert all(check([{"step": 1}], AlarmBounds()) is None for check in CHECKS.values())
    assert alarms.check([]) == []


def test_rows_that_a_full_disk_does_not_take_come_later(tmp_path):
    """The kernel refuses to let the file grow; the row it cuts is completed once there is room."""
    log = MetricsLog(tmp_path, tensorboard=False, clock=lambda: 0.0)
    log.log(1, {"a": 1})
    with full_disk(room=log.path.stat().st_size + 10):
        log.log(2, {"a": 2})
        assert "could not be written: File too large" in log.problem
        log.log(3, {"a": 3})
    assert [row["step"] for row in read_metrics(log.path)] == [1]
    log.log(4, {"a": 4})
    assert log.problem == ""
    assert [row["a"] for row in read_metrics(log.path)] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "line",
    [
        b"\0\0\0\0", b"[1]", b"7", b'{"a": 1}', b'{"step": "x"}', b'{"step": true}', b'{"step": -1}', b"\xff",
        b'{"step": 1}', b'{"step": 3, "a": [1]}', b'{"step": 3, "a": NaN}', b"[" * 100_000,
        b'{"step": 3, "a": 1' + b"0" * 400 + b"}",
    ],
)  # fmt: skip
def test_a_damaged_row_is_named_and_one_that_is_not_read_does_not_matter(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n' + line + b'\n{"step": 4}\n')
    with pytest.raises(ValueError, match=rf"^{path}:3: .*; delete the line$"):
        read_metrics(path)
    assert [row["step"] for row in read_metrics(path, 2)] == [1, 2]
