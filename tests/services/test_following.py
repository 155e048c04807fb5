"""`rlgaf submit` at a dashboard of the tests, with Ray's own client: what it sends, and how it follows a job
over connections that break."""

import asyncio
import io
import logging
import os
import signal
import threading
import time
import zipfile
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from aiohttp import web
from free_ports import free_ports

from services.jobs.submit import FAILED, INTERRUPTED, Submission, submit

LOST_S = 1.0
JOB = "raysubmit_1"
Tail = Callable[[web.Request, web.WebSocketResponse], Awaitable[None]]


class Dashboard:
    """As much of Ray's dashboard as a submission needs. The next of `tails` answers a connection to the
    log; without one left, the job has ended: its whole log is sent, and the connection closed in order."""

    def __init__(self) -> None:
        port = free_ports(1)[0]
        self.address = f"http://127.0.0.1:{port}"
        self.tails: list[Tail] = []
        self.end = "SUCCEEDED"
        self.takes_stops = True
        self.asked: list[str] = []
        self.packages: dict[str, bytes] = {}
        self.runtime_env: dict[str, Any] = {}
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()
        self.runner = web.AppRunner(self._app())
        asyncio.run_coroutine_threadsafe(self._listen(port), self.loop).result(10)

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self.runner.cleanup(), self.loop).result(10)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(10)

    async def _listen(self, port: int) -> None:
        await self.runner.setup()
        await web.TCPSite(self.runner, "127.0.0.1", port, shutdown_timeout=0.1).start()

    def _app(self) -> web.Application:
        app = web.Application()
        answers = {
            "/api/version": {"version": "4", "ray_version": ray.__version__, "ray_commit": ""},
            "/api/jobs/": [],
        }
        for path, answer in answers.items():
            app.router.add_get(path, lambda _, answer=answer: _json(answer))
        app.router.add_post("/api/jobs/", self._submit)
        app.router.add_get("/api/packages/{protocol}/{name}", self._package)
        app.router.add_put("/api/packages/{protocol}/{name}", self._upload)
        app.router.add_get(f"/api/jobs/{JOB}", lambda _: _json(self._details()))
        app.router.add_post(f"/api/jobs/{JOB}/stop", self._stop)
        app.router.add_get(f"/api/jobs/{JOB}/logs/tail", self._tail)
        return app

    def _details(self) -> dict[str, str]:
        status = "RUNNING" if self.tails else self.end
        return {"type": "SUBMISSION", "submission_id": JOB, "status": status, "entrypoint": "train"}

    async def _submit(self, request: web.Request) -> web.StreamResponse:
        self.runtime_env = (await request.json())["runtime_env"]
        return await _json({"job_id": JOB, "submission_id": JOB})

    async def _package(self, request: web.Request) -> web.StreamResponse:
        return web.Response(status=200 if request.match_info["name"] in self.packages else 404)

    async def _upload(self, request: web.Request) -> web.StreamResponse:
        self.packages[request.match_info["name"]] = await request.read()
        return web.Response()

    async def _stop(self, request: web.Request) -> web.StreamResponse:
        self.asked.append("stop")
        if not self.takes_stops:
            drop(request)
        return await _json({"stopped": True})

    async def _tail(self, request: web.Request) -> web.StreamResponse:
        self.asked.append("log")
        answer = web.WebSocketResponse()
        await answer.prepare(request)
        if self.tails:
            await self.tails.pop(0)(request, answer)
        else:
            await answer.send_str("one\ntwo\nthree\n")
        return answer


async def _json(answer: object) -> web.Response:
    return web.json_response(answer)


def drop(request: web.Request) -> None:
    """End a connection without a goodbye, as a port-forward that breaks does."""
    assert request.transport is not None
    request.transport.abort()


def breaks_after(seconds: float, text: str) -> Tail:
    """A connection that sends `text` at once, is silent, and breaks."""

    async def tail(request: web.Request, answer: web.WebSocketResponse) -> None:
        if text:
            await answer.send_str(text)
        await asyncio.sleep(seconds)
        drop(request)

    return tail


def silent_after(text: str) -> Tail:
    """A connection that sends `text` and no more; it holds until the client leaves."""

    async def tail(_: web.Request, answer: web.WebSocketResponse) -> None:
        await answer.send_str(text)
        await answer.receive()

    return tail


def control_c_after(text: str) -> Tail:
    """A connection that sends `text`; then the user presses Ctrl-C. It holds until the client leaves."""

    async def tail(_: web.Request, answer: web.WebSocketResponse) -> None:
        await answer.send_str(text)
        os.kill(os.getpid(), signal.SIGINT)
        await answer.receive()

    return tail


@pytest.fixture
def dashboard(monkeypatch: pytest.MonkeyPatch) -> Iterator[Dashboard]:
    monkeypatch.setattr("services.jobs.client.LOST_S", LOST_S)
    monkeypatch.setattr("services.jobs.client.POLL_S", 0.05)
    made = Dashboard()
    yield made
    made.close()


def followed(dashboard: Dashboard) -> tuple[int, str]:
    """Exit code of a submission, and what it said beside the log."""
    said: list[str] = []
    code = submit(Submission(dashboard.address, ["train"], "/runs/run"), said.append)
    return code, "\n".join(said)


def test_the_job_gets_the_folder_although_a_file_in_it_grows(dashboard: Dashboard, tmp_path: Path) -> None:
    """As with `rlgaf submit … --working-dir . > run.log`: what Ray says goes into the folder it packs."""
    (tmp_path / ".gitignore").write_text("/left\n")
    (tmp_path / "run.toml").write_text("here")
    (tmp_path / "left").write_text("here too")
    output = logging.FileHandler(tmp_path / "run.log")
    logging.getLogger("ray").addHandler(output)
    try:
        submission = Submission(dashboard.address, ["train"], "/runs/run", working_dir=tmp_path)
        assert submit(submission, lambda _: None) == 0
    finally:
        logging.getLogger("ray").removeHandler(output)
    assert (tmp_path / "run.log").stat().st_size > 0
    ((name, package),) = dashboard.packages.items()
    assert dashboard.runtime_env["working_dir"] == f"gcs://{name}"
    with zipfile.ZipFile(io.BytesIO(package)) as held:
        assert held.read("run.toml") == b"here"
        assert "left" not in held.namelist()


def test_a_connection_that_breaks_is_made_again_however_long_it_held(dashboard, capsys):
    dashboard.tails = [breaks_after(1.2 * LOST_S, "one\n"), breaks_after(1.2 * LOST_S, "one\ntwo\n")]
    code, said = followed(dashboard)
    assert code == 0, said
    assert dashboard.asked == ["log"] * 3
    assert capsys.readouterr().out == "one\ntwo\nthree\n"


def test_a_cluster_that_is_out_of_reach_for_longer_is_given_up(dashboard, capsys):
    dashboard.tails = [breaks_after(0, "one\n"), *[breaks_after(0, "")] * 1000]
    code, said = followed(dashboard)
    assert code == FAILED
    assert f"{dashboard.address} is out of reach (" in said
    assert f"job {JOB} may go on" in said
    assert capsys.readouterr().out == "one\n"
    assert 3 <= len(dashboard.asked) <= 2 + LOST_S / 0.05, "it tries again all the while, and no longer"


def test_a_connection_that_is_dead_without_a_word_does_not_hold_it(dashboard, monkeypatch, capsys):
    monkeypatch.setattr("services.jobs.client.QUIET_S", 0.5)
    dashboard.tails = [silent_after("one\n")]
    began = time.monotonic()
    code, said = followed(dashboard)
    assert code == 0, said
    assert time.monotonic() - began < 20
    assert dashboard.asked == ["log", "log"]
    assert capsys.readouterr().out == "one\ntwo\nthree\n"


def test_control_c_stops_the_job_and_follows_it_to_its_end(dashboard, capsys):
    dashboard.tails = [control_c_after("one\n")]
    dashboard.end = "STOPPED"
    code, said = followed(dashboard)
    assert code == INTERRUPTED
    assert "stopping after this step with a checkpoint" in said
    assert dashboard.asked == ["log", "stop", "log"]
    assert capsys.readouterr().out == "one\ntwo\nthree\n"


def test_a_stop_that_does_not_arrive_is_said_with_the_line_that_repeats_it(dashboard):
    dashboard.tails = [control_c_after("one\n")]
    dashboard.takes_stops = False
    code, said = followed(dashboard)
    assert code == FAILED
    assert f"job {JOB} may go on" in said
    assert f"ray job stop --address {dashboard.address} {JOB}" in said
