"""The hook of a pod that ends, against a real Ray head: who stops a job, how it ends, and who only waits."""

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from chart import ROOT, script
from free_ports import free_ports
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from services.ray_access import reread

pytestmark = pytest.mark.e2e
pre_stop = script("pre_stop")
CLOSING_S = 2.0
DRIVER = f"""
import signal, sys, time
import ray
told = []
ray.init(log_to_driver=False)
signal.signal(signal.SIGTERM, lambda *_: told.append(time.sleep({CLOSING_S})))
print("join" + "ed", flush=True)  # the log begins with this text itself, which must not hold the word
while not told:
    time.sleep(0.1)
sys.exit(130)
"""


@pytest.fixture(scope="module")
def dashboard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    gcs, dashboard, client, metrics = free_ports(4)
    folder = tmp_path_factory.mktemp("state")
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token")}
    variables = os.environ | token | {"XDG_STATE_HOME": str(folder)}
    variables.pop("RAY_ADDRESS", None)
    rlgaf = [sys.executable, "-m", "services.cli"]
    ports = [f"--port={gcs}", f"--dashboard-port={dashboard}", f"--client-port={client}"]
    options = [*ports, f"--metrics-port={metrics}", "--cpus=2", "--object-store-mib=100"]
    subprocess.run([*rlgaf, "up", *options], cwd=ROOT, env=variables, check=True)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in token.items():  # as KubeRay gives it to a pod
            patch.setenv(name, value)
        reread()
        yield dashboard
    reread()
    subprocess.run([*rlgaf, "down", f"--port={gcs}"], cwd=ROOT, env=variables, check=True)


@pytest.fixture
def client(dashboard: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> JobSubmissionClient:
    """Of the head, in a pod's environment as KubeRay makes it once the head's service is gone."""
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    made = JobSubmissionClient(f"http://127.0.0.1:{dashboard}")
    monkeypatch.setattr(pre_stop, "DASHBOARD", dashboard)
    monkeypatch.setenv("FQ_RAY_IP", "127.0.0.1")
    monkeypatch.setenv("RAY_ADDRESS", "demo-head-svc.default.svc.cluster.invalid:6379")
    return made


def started(client: JobSubmissionClient) -> str:
    """A job whose driver has joined the cluster and takes its time to end."""
    job = client.submit_job(entrypoint=f"exec {sys.executable} -c {shlex.quote(DRIVER)}")
    deadline = time.monotonic() + 120
    while "joined" not in client.get_job_logs(job):
        assert time.monotonic() < deadline, client.get_job_logs(job)
        time.sleep(0.2)
    return job


def end(client: JobSubmissionClient, job: str) -> tuple[JobStatus, int | None]:
    found: JobDetails = client.get_job_info(job)
    return found.status, found.driver_exit_code


def test_a_worker_waits_and_a_rayjob_s_head_ends_its_job_as_failed(
    client: JobSubmissionClient, capsys: pytest.CaptureFixture[str]
) -> None:
    job = started(client)
    began = time.monotonic()
    pre_stop.main("worker", 3)
    assert time.monotonic() >= began + 3, capsys.readouterr().err
    assert end(client, job) == (JobStatus.RUNNING, None)
    began = time.monotonic()
    pre_stop.main("job-head", 60)
    assert CLOSING_S <= time.monotonic() - began < 60
    assert end(client, job) == (JobStatus.FAILED, 130), "KubeRay repeats no job that ends otherwise"
    assert capsys.readouterr().err == ""


def test_another_head_stops_its_jobs_as_ray_does(client: JobSubmissionClient) -> None:
    client.submit_job(entrypoint="true", submission_id="ended")
    job = started(client)
    pre_stop.main("head", 60)
    assert end(client, job)[0] == JobStatus.STOPPED
    assert end(client, "ended")[0] == JobStatus.SUCCEEDED
