"""Ray's job API as `rlgaf submit` uses it: every request has a deadline and every failure a message.

The token is sent whenever there is one, whatever this machine's RAY_AUTH_MODE says, by https or to this
machine only; a cluster without authentication ignores it. RAY_ADDRESS and RAY_API_SERVER_ADDRESS of this
machine are not read: they would override the address that was given.
"""

import asyncio
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from services.config import ConfigError
from services.jobs.working_dir import packed
from services.ray_access import private, token_source, token_value

CONNECT_S = 15.0
REQUEST_S = 120.0
LOST_S = 300.0
"""How long a cluster may be out of reach while a job is followed."""
QUIET_S = 300.0
"""How long a log may be silent before the cluster is asked whether it is still there."""
POLL_S = 1.0


class LostJob(RuntimeError):
    """The cluster cannot be reached any more; the job may still be running."""


@dataclass(frozen=True)
class Job:
    """A job that has not ended."""

    id: str
    status: str
    metadata: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class JobEnd:
    """How a job ended: SUCCEEDED, STOPPED or FAILED, with Ray's message and, where Ray knows it, the
    driver's exit code."""

    status: str
    message: str
    exit_code: int | None


class JobClient:
    """One cluster's jobs.

    Raises ConfigError when the address does not answer, is no Ray dashboard, or refuses the token.
    """

    def __init__(self, address: str) -> None:
        for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
            os.environ.pop(name, None)
        import requests
        from ray.exceptions import AuthenticationError
        from ray.job_submission import JobSubmissionClient

        class Client(JobSubmissionClient):
            def _do_request(self, method: str, endpoint: str, **arguments: Any) -> Any:
                return super()._do_request(method, endpoint, timeout=(CONNECT_S, REQUEST_S), **arguments)

        self.address = address
        token = token_value()
        sent = token and private(address)
        # Ray adds a token of its own finding where there is no such header.
        headers = {"Authorization": f"Bearer {token}" if sent else ""} if token else {}
        try:
            self._client = Client(address, headers=headers)
        except AuthenticationError:
            remedy = "put it into the variable RAY_AUTH_TOKEN or the file ~/.ray/auth_token"
            if token and not sent:
                remedy = "it is sent by https or to this machine only: use ssh -L or kubectl port-forward"
            given = f"and refuses the one in {token_source()}" if sent else "and got none"
            raise ConfigError(f"{address} asks for a token {given}; {remedy}") from None
        except (requests.Timeout, ConnectionError, requests.ConnectionError):
            raise ConfigError(
                f"{address} does not answer within {CONNECT_S:.0f} s: is the cluster up and is this its "
                "dashboard's address? (`rlgaf up` starts one here; on Kubernetes: kubectl port-forward "
                "svc/…-head-svc 8265)"
            ) from None
        except (requests.RequestException, RuntimeError, KeyError, ValueError) as error:
            raise ConfigError(f"{address} is no Ray dashboard that takes jobs: {error}") from None

    def active(self) -> list[Job]:
        """Jobs that have not ended and were submitted (drivers that connected by themselves have no id)."""
        return [
            Job(job.submission_id, str(job.status), job.metadata or {})
            for job in self._client.list_jobs()
            if job.submission_id is not None and not job.status.is_terminal()
        ]

    def submit(
        self, command: str, *, runtime_env: dict[str, Any], metadata: dict[str, str], driver_cpus: float
    ) -> str:
        """Upload the working directory if there is one, start the job and return its id."""
        try:
            with tempfile.TemporaryDirectory() as scratch:
                if "working_dir" in runtime_env:
                    file = packed(Path(runtime_env["working_dir"]), Path(scratch))
                    runtime_env = runtime_env | {"working_dir": str(file)}
                return self._client.submit_job(
                    entrypoint=command,
                    runtime_env=runtime_env,
                    metadata=metadata,
                    entrypoint_num_cpus=driver_cpus or None,
                )
        except (RuntimeError, ValueError) as error:
            raise ConfigError(f"{self.address} does not take the job: {error}") from None

    def stop(self, job: str) -> None:
        """SIGTERM to the job's driver; returns at once.

        Raises:
            LostJob: the cluster did not confirm it.
        """
        try:
            self._client.stop_job(job)
        except (OSError, RuntimeError) as error:  # those of requests are OSErrors
            raise LostJob(
                f"{self.address} did not confirm the stop ({error}); job {job} may go on. To stop it: "
                f"ray job stop --address {self.address} {job}"
            ) from None

    async def follow(self, job: str, write: Callable[[str, int], None]) -> JobEnd:
        """Hand on the job's log until it ends: `write(text, position in the log)`.

        A connection that breaks is made again, and begins with the log's first line.

        Raises:
            LostJob: the cluster was out of reach for five minutes.
        """
        import aiohttp

        lost: float | None = None
        """Time of the first failure since the cluster was last heard."""

        def hand_on(text: str, position: int) -> None:
            nonlocal lost
            lost = None
            write(text, position)

        while True:
            try:
                whole = await self._tail(job, hand_on)
                info = await asyncio.to_thread(self._client.get_job_info, job)
            except (aiohttp.ClientError, OSError, RuntimeError) as error:  # those of requests are OSErrors
                lost = lost or time.monotonic()
                if time.monotonic() - lost > LOST_S:
                    raise LostJob(f"{self.address} is out of reach ({error}); job {job} may go on") from None
            else:
                lost = None
                if whole and info.status.is_terminal():
                    return JobEnd(str(info.status), info.message or "", info.driver_exit_code)
            await asyncio.sleep(POLL_S)

    async def _tail(self, job: str, write: Callable[[str, int], None]) -> bool:
        """Hand on the log to its end; False where it fell silent before."""
        position = 0
        chunks = self._client.tail_job_logs(job)
        while True:
            try:
                text = await asyncio.wait_for(anext(chunks), QUIET_S)
            except StopAsyncIteration:
                return True
            except TimeoutError:
                return False
            write(text, position)
            position += len(text)
