"""The scripts that the chart mounts: resume or start, waiting, stopping."""

import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from chart import CHART, script

FILES = CHART / "files"
start, pre_stop = script("start"), script("pre_stop")


def test_the_run_is_started_so_that_it_goes_on_by_itself() -> None:
    line = start.command(Path("/etc/run.toml"), ["--run.steps=7"])
    assert line == ["rlgaf", "train", "/etc/run.toml", "--run.steps=7", "--auto-resume"]


class Jobs:
    """A head's job list in memory: a job that is asked to stop ends after `steps` more looks at it."""

    def __init__(self, steps: int) -> None:
        self.left = {"a": steps, "b": steps}
        self.asked: list[str] = []

    def list_jobs(self) -> list[SimpleNamespace]:
        for job in self.asked:
            self.left[job] -= 1
        jobs = [(job, self.left[job] <= 0) for job in self.left]
        state = [SimpleNamespace(submission_id=job, status=_Status(ended)) for job, ended in jobs]
        return [*state, SimpleNamespace(submission_id=None, status=_Status(False))]

    def stop_job(self, job: str) -> None:
        self.asked.append(job)


class _Status:
    def __init__(self, ended: bool) -> None:
        self.ended = ended

    def is_terminal(self) -> bool:
        return self.ended


def test_the_head_stops_each_job_once_and_waits_for_its_end() -> None:
    jobs = Jobs(steps=2)
    assert pre_stop.wait_for_jobs(jobs, time.monotonic() + 60, role="head")
    assert jobs.asked == ["a", "b"]
    assert not pre_stop.running(jobs)


def test_a_worker_waits_without_stopping_and_gives_up_in_time() -> None:
    jobs = Jobs(steps=2)
    assert not pre_stop.wait_for_jobs(jobs, time.monotonic(), role="worker")
    assert jobs.asked == []


@pytest.mark.parametrize("there", [True, False])
def test_waiting_for_data(tmp_path: Path, there: bool) -> None:
    wanted = tmp_path / "answers.jsonl"
    if there:
        wanted.write_text("{}")
    done = subprocess.run(
        ["sh", str(FILES / "wait_for_data.sh"), "0", str(wanted)], capture_output=True, text=True, check=False
    )
    assert done.returncode == (0 if there else 1)
    assert str(wanted) in (done.stdout if there else done.stderr)
