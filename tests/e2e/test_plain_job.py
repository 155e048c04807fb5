"""The `ray job submit` line that `rlgaf submit` prints, run as a command on a cluster of `ray start`: nobody
there has said how long a stopped job may take, and `ray job stop` ends a run with a checkpoint.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from free_ports import free_ports
from launching import ROOT, START_S, environment, steps_done
from ray.job_submission import JobStatus, JobSubmissionClient

pytestmark = pytest.mark.e2e
VARIABLE = "RAY_JOB_STOP_WAIT_TIME_S"
CLOSING_S = 6.0  # Ray's own wait is three seconds
DRIVER = f"""
import os, signal, time
from services.ray_cluster import ray_cluster
told = []
with ray_cluster(os.environ["RAY_ADDRESS"]):
    signal.signal(signal.SIGTERM, lambda *_: told.append(True))
    print("joined", flush=True)
    while not told:
        time.sleep(0.1)
    time.sleep({CLOSING_S})
    print("closed", flush=True)
"""


@dataclass(frozen=True)
class Head:
    """A running cluster, its folder and the environment for commands that use it."""

    address: str
    folder: Path
    variables: dict[str, str]

    def supervisor_log(self, job: str) -> str:
        return (self.folder / "session_latest" / "logs" / "jobs" / f"supervisor-{job}.log").read_text()


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    folder = Path(tempfile.mkdtemp(prefix="rlgaf-ray-", dir="/tmp"))  # Ray's socket paths must stay short
    gcs, dashboard, client, metrics, agent = free_ports(5)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    variables = environment() | {"PATH": path, "HOME": str(tmp_path_factory.mktemp("home"))}
    variables.pop(VARIABLE, None)
    command = [
        *("ray", "start", "--head", "--block", "--disable-usage-stats", f"--temp-dir={folder}"),
        *("--node-ip-address=127.0.0.1", f"--port={gcs}", f"--dashboard-port={dashboard}"),
        *(f"--ray-client-server-port={client}", f"--metrics-export-port={metrics}"),
        *(f"--dashboard-agent-listen-port={agent}", "--min-worker-port=0", "--max-worker-port=0"),
        *("--num-cpus=8", "--num-gpus=0", f"--object-store-memory={200 * 2**20}"),
    ]
    log = folder / "start.log"
    with log.open("w") as out:
        process = psutil.Popen(command, cwd=ROOT, env=variables, stdout=out, stderr=subprocess.STDOUT)
    try:
        address = f"http://127.0.0.1:{dashboard}"
        until(lambda: takes_jobs(address), 180, log.read_text)
        yield Head(address, folder, variables)
    finally:
        processes = [process, *process.children(recursive=True)]
        process.terminate()
        for left in psutil.wait_procs(processes, timeout=10)[1]:
            left.kill()
        shutil.rmtree(folder, ignore_errors=True)


def until(condition: Callable[[], bool], seconds: float, words: Callable[[], str]) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, words()
        time.sleep(0.5)


def takes_jobs(address: str) -> bool:
    try:
        return JobSubmissionClient(address).list_jobs() == []
    except (ConnectionError, RuntimeError):
        return False


def stop(head: Head, job: str) -> None:
    """`ray job stop`, which waits for the job's end."""
    command = ["ray", "job", "stop", "--address", head.address, job]
    subprocess.run(command, env=head.variables, check=True, capture_output=True, timeout=120)


@pytest.mark.parametrize(("variables", "closed"), [({}, True), ({VARIABLE: "1"}, False)])
def test_a_time_of_ones_own_counts_and_none_is_enough_to_close(head, tmp_path, variables, closed):
    client = JobSubmissionClient(head.address)
    (tmp_path / "driver.py").write_text(DRIVER)  # a log begins with the entrypoint's words
    entrypoint = f"exec {sys.executable} {tmp_path / 'driver.py'}"
    job = client.submit_job(entrypoint=entrypoint, runtime_env={"env_vars": variables})
    until(lambda: "joined" in client.get_job_logs(job), 120, lambda: client.get_job_logs(job))
    stop(head, job)
    assert client.get_job_status(job) == JobStatus.STOPPED
    assert ("closed" in client.get_job_logs(job)) == closed, head.supervisor_log(job)


@pytest.mark.slow  # a whole run; one that `rlgaf submit` started is stopped and resumed in every suite
def test_the_printed_line_starts_a_run_that_ray_job_stop_ends_with_a_checkpoint(
    head, configuration, tiny_demonstrations, tmp_path
):
    (tmp_path / "answers.jsonl").write_bytes(tiny_demonstrations.read_bytes())
    text = configuration.read_text().replace(str(tiny_demonstrations), "answers.jsonl")
    (tmp_path / "run.toml").write_text(re.sub("steps = 8", "steps = 500", text))
    runs, log = tmp_path / "runs", tmp_path / "log"
    words = ["run.toml", "--working-dir=.", "--address", head.address, f"--run.output={runs}"]
    printed = subprocess.run(
        [sys.executable, "-m", "services.cli", "submit", *words, "--dry-run"],
        cwd=tmp_path,
        env=head.variables | {"PYTHONPATH": str(ROOT)},
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    ).stdout
    (line,) = [line for line in printed.splitlines() if line.startswith("ray job submit ")]
    with log.open("w") as out:
        submitter = subprocess.Popen(
            line, shell=True, cwd=tmp_path, env=head.variables, stdout=out, stderr=subprocess.STDOUT
        )
    try:
        run = runs / "run"
        until(lambda: steps_done(run) >= 2 or submitter.poll() is not None, START_S, log.read_text)
        found = re.search(r"Job '(\w+)' submitted", log.read_text())
        assert found is not None, log.read_text()
        stop(head, found[1])
        submitter.wait(timeout=120)
    finally:
        submitter.kill()
    done = steps_done(run)
    assert f"stopped at step {done}; go on with --resume" in log.read_text()
    assert (run / "checkpoints" / f"step-{done:06d}").is_dir()
    assert JobSubmissionClient(head.address).get_job_status(found[1]) == JobStatus.STOPPED
    assert "terminated gracefully with SIGTERM" in head.supervisor_log(found[1])
