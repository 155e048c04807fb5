"""One driver at a time writes to a run's folder: who is refused, who waits, whose lease is void."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from services import lease
from services.config import ConfigError, load
from services.jobs.resumption import set_aside, wait_for_an_earlier_driver
from services.lease import LEASE, STALE_S, Lease, holder, wait_until_free
from services.run_folder import check_folder

HOLDS = """
import sys, time
from pathlib import Path
from services.lease import Lease
with Lease(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@contextmanager
def driver(folder: Path) -> "Iterator[subprocess.Popen[str]]":
    """Another process of this host that has the folder's lease."""
    command = [sys.executable, "-c", HOLDS, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def written(folder: Path, **other: Any) -> None:
    """A lease as a driver on another host wrote it."""
    record = {"host": "elsewhere", "space": "pid:[1]", "pid": os.getpid(), "token": "t", "time": time.time()}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / LEASE).write_text(json.dumps(record | other))


def test_a_second_driver_is_refused_until_the_first_is_killed(tmp_path):
    with driver(tmp_path) as process:
        with pytest.raises(ConfigError, match=rf"another driver writes there \(process {process.pid} on"):
            Lease(tmp_path).__enter__()
        process.kill()
        deadline = time.monotonic() + 30  # the kernel may take a moment; nobody has collected it yet
        while holder(tmp_path) is not None:
            assert time.monotonic() < deadline
        with Lease(tmp_path):
            assert holder(tmp_path).pid == os.getpid()  # type: ignore[union-attr]


def test_the_lease_ends_with_the_block_however_it_ends(tmp_path):
    folder = tmp_path / "new" / "run"
    seen: list[list[str]] = []

    def life() -> None:
        with Lease(folder):
            seen.append([path.name for path in folder.iterdir()])
            raise RuntimeError("broke")

    with pytest.raises(RuntimeError, match="broke"):
        life()
    assert seen == [[LEASE]]
    assert list(folder.iterdir()) == []


def test_another_hosts_lease_holds_while_it_is_renewed_whatever_its_process_is_called_here(tmp_path):
    absent = 2**22 + 1  # above the largest number that Linux gives
    for pid in (os.getpid(), absent):
        written(tmp_path, pid=pid)
        with pytest.raises(ConfigError, match="on elsewhere"):
            wait_until_free(tmp_path)
    own = dict(zip(("host", "space"), lease._here(), strict=True))
    written(tmp_path, pid=absent, host=own["host"])  # a container of the same name with numbers of its own
    assert holder(tmp_path) is not None
    written(tmp_path, pid=absent, **own)
    assert holder(tmp_path) is None
    for age in (STALE_S + 5, -STALE_S - 5):
        written(tmp_path, time=time.time() - age)
        assert holder(tmp_path) is None
    (tmp_path / LEASE).write_text("")
    assert holder(tmp_path) is None


def test_a_lease_is_renewed(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "BEAT_S", 0.01)
    with Lease(tmp_path):
        first = holder(tmp_path)
        deadline = time.monotonic() + 30
        while holder(tmp_path).time == first.time:  # type: ignore[union-attr]
            assert time.monotonic() < deadline, "never renewed"
            time.sleep(0.01)


def test_a_driver_whose_lease_was_taken_ends_and_leaves_it(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "BEAT_S", 0.01)
    with Lease(tmp_path) as own:
        own.check()
        written(tmp_path)
        with pytest.raises(RuntimeError, match="another driver has taken over"):
            own.check()
        time.sleep(0.1)
    assert holder(tmp_path).host == "elsewhere"  # type: ignore[union-attr]


def test_waiting_ends_with_the_lease_or_with_the_deadline(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "POLL_S", 0.01)
    said: list[str] = []
    written(tmp_path)
    with pytest.raises(ConfigError, match="another driver"):
        wait_until_free(tmp_path, 0.1, said.append)
    assert len(said) == 1
    assert "waiting up to 0 s" in said[0]
    threading.Timer(0.1, (tmp_path / LEASE).unlink).start()
    wait_until_free(tmp_path, 30, said.append)
    wait_until_free(tmp_path, 30, said.append)
    assert len(said) == 2


def test_neither_resume_nor_set_aside_beneath_a_living_driver(tmp_path, monkeypatch):
    config = load(None, ["--policy.model=m", "--data.demonstrations=d", f"--run.output={tmp_path}"])
    written(config.folder)
    for resume in (False, True):
        with pytest.raises(ConfigError, match="another driver writes there"):
            check_folder(config, resume=resume, auto=False)
    monkeypatch.setattr("services.jobs.resumption.STALE_S", 0.0)
    monkeypatch.setenv("RAY_JOB_STOP_WAIT_TIME_S", "0")
    with pytest.raises(ConfigError, match="another driver writes there"):
        wait_for_an_earlier_driver(config, print)
    written(config.folder, time=0.0)
    wait_for_an_earlier_driver(config, print)
    assert set_aside(config, 0.0) is None, "a lease alone is no attempt"
    check_folder(config, resume=False, auto=False)
