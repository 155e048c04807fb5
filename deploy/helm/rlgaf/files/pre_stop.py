"""What a pod does before Kubernetes ends it: let a run write its checkpoint first.

Head: every running job is stopped as `ray job stop` does it (Ray signals a job once, however often it is
asked; a second signal would make `rlgaf train` give up its checkpoint), and waited for. Worker: wait while
jobs run, because the ranks on this pod are needed for that checkpoint; the pod serves them meanwhile. Both
give up after the seconds given, which lie inside the pod's grace period.

    pre_stop.py head|worker SECONDS
"""

import os
import socket
import sys
import time
from typing import Any


def running(client: Any) -> list[str]:
    """Submission ids of the jobs that have not ended."""
    return [
        job.submission_id
        for job in client.list_jobs()
        if job.submission_id is not None and not job.status.is_terminal()
    ]


def wait_for_jobs(client: Any, deadline: float, *, stop: bool) -> bool:
    """Wait until no job runs, asking each to stop first when `stop`; False when the deadline came first."""
    if stop:
        for job in running(client):
            client.stop_job(job)
    while running(client):
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
    from ray.job_submission import JobSubmissionClient

    try:
        host = "127.0.0.1" if role == "head" else head_address()
        client = JobSubmissionClient(f"http://{host}:8265")
        wait_for_jobs(client, time.monotonic() + seconds, stop=role == "head")
    except OSError as error:
        print(f"the head answers no more: {error}", file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
