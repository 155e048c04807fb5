"""What a pod does before Kubernetes ends it: let a run write its checkpoint first.

Head: every running job is asked to stop, and waited for. Worker: wait while jobs run, because the ranks on
this pod are needed for that checkpoint; the pod serves them meanwhile. Both give up after the seconds given,
which lie inside the pod's grace period.

    pre_stop.py head|job-head|worker SECONDS

A `head` stops jobs as `ray job stop` does it. A `job-head` is a RayJob's: KubeRay repeats a job that FAILED
but takes one that was STOPPED for complete, so there the driver itself is told, and ends with code 130.
"""

import contextlib
import os
import signal
import socket
import sys
import time
from typing import Any

DASHBOARD = 8265


def running(client: Any) -> list[Any]:
    """The submitted jobs that have not ended."""
    jobs = client.list_jobs()
    return [job for job in jobs if job.submission_id is not None and not job.status.is_terminal()]


def ask_to_stop(client: Any, job: Any, role: str) -> bool:
    """Ask a job to stop, where `role` does that; False while its driver has yet to join the cluster here."""
    if role == "head":
        client.stop_job(job.submission_id)
    elif role == "job-head":
        import psutil

        here = {address.address for addresses in psutil.net_if_addrs().values() for address in addresses}
        if job.driver_info is None or job.driver_info.node_ip_address not in here:
            return False
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(job.driver_info.pid), signal.SIGTERM)
    return True


def wait_for_jobs(client: Any, deadline: float, *, role: str) -> bool:
    """Wait until no job runs, a head asking each once to stop; False when the deadline came first."""
    asked: set[str] = set()
    while jobs := running(client):
        fresh = [job for job in jobs if job.submission_id not in asked]
        asked |= {job.submission_id for job in fresh if ask_to_stop(client, job, role)}
        if time.monotonic() >= deadline:
            return False
        time.sleep(1)
    return True


def head_address() -> str:
    """The head's address on a worker.

    KubeRay gives every worker the name of the head's service. With a RayJob or RayCluster that is deleted the
    service goes too, perhaps before this pod is asked to: then this node's own connection to the head tells.
    """
    import psutil

    try:
        return socket.gethostbyname(os.environ["FQ_RAY_IP"])
    except socket.gaierror:
        raylets = [process for process in psutil.process_iter(["name"]) if process.info["name"] == "raylet"]
        for connection in (found for raylet in raylets for found in raylet.net_connections("tcp")):
            if connection.raddr and connection.raddr.port == int(os.environ["RAY_PORT"]):
                return str(connection.raddr.ip).removeprefix("::ffff:")
        raise


def main(role: str, seconds: float) -> None:
    """See the module's docstring."""
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        os.environ.pop(name, None)  # KubeRay's variable: it would override the address below
    from ray.job_submission import JobSubmissionClient

    try:
        host = head_address() if role == "worker" else "127.0.0.1"
        client = JobSubmissionClient(f"http://{host}:{DASHBOARD}")
        wait_for_jobs(client, time.monotonic() + seconds, role=role)
    except OSError as error:
        print(f"the head answers no more: {error}", file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
