"""Ends of a driver in which something hangs. Each is a process of its own, with its exit code."""

import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from services.last_words import Process, words

ROOT = Path(__file__).parents[2]


def run(script: str, *, stdout: int = subprocess.PIPE, session: bool = False) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=ROOT,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=session,
    )


def ended(script: str, within_s: float) -> tuple[int, str]:
    """Exit code and output of a driver whose command is `work()` of the script."""
    process = run(f"import services.cli as cli\n{script}\ncli.app = work\ncli.main()")
    try:
        out, errors = process.communicate(timeout=within_s)
    except subprocess.TimeoutExpired:
        process.kill()
        pytest.fail("the process does not end")
    return process.returncode, out + errors


def test_a_mirror_that_hangs_does_not_keep_the_driver(tmp_path):
    """A FIFO takes the place of a file in the copy: to open it for writing blocks for ever."""
    here, there = tmp_path / "r", tmp_path / "copies" / "r"
    here.mkdir()
    there.mkdir(parents=True)
    (here / "config.toml").write_text("")
    os.mkfifo(there / "config.toml")
    script = f"""
import asyncio, sys
from pathlib import Path
from types import SimpleNamespace
from services.mirror import Mirror
from services.run_life import RunLife
async def main():
    life = RunLife.__new__(RunLife)
    life.mirror = Mirror(Path("{here}"), "file://{there.parent}")
    life.config = SimpleNamespace(run=SimpleNamespace(mirror="there", mirror_timeout_s=.3))
    life.display = SimpleNamespace(note=print)
    from services.metrics import PhaseTimer
    life.controller = SimpleNamespace(timer=PhaseTimer())
    async def work(): return 7 if not await life._copy() else 0
    life.signs = SimpleNamespace(watch=lambda beat: asyncio.sleep(99))
    life.exported = life.log = SimpleNamespace(close=lambda: None)
    life.config.learner = SimpleNamespace(step_timeout_s=60)
    life._work = work
    return await RunLife.main(life)
def work(): sys.exit(asyncio.run(main()))
"""
    code, output = ended(script, 60)
    assert code == 7, output
    assert "not done within 0.3 s" in output


def test_a_cluster_that_is_gone_is_named_at_the_deadline():
    script = "import services.ray_cluster as c\ndef work(): c.join('127.0.0.1:1', 2.0)"
    began = time.monotonic()
    code, output = ended(script, 60)
    assert code == 2, output
    assert time.monotonic() - began < 30
    assert "rlgaf: RAY_ADDRESS = 127.0.0.1:1: joining it did not finish within 2 s" in output


def test_an_event_loop_that_stands_still_ends_with_its_stacks():
    script = """
import asyncio, time
from services.ending import Deadman
async def main():
    Deadman(1.0, print).beat()
    time.sleep(99)
def work(): asyncio.run(main())
"""
    code, output = ended(script, 60)
    assert code == 1
    assert "stands still" in output
    assert "in main" in output


SIGNALLED = """
import asyncio, signal, sys
from services.ending import handle_signals
async def main():
    told = asyncio.Event()
    handle_signals(lambda number: told.set())
    print("ready", flush=True)
    await asyncio.wait_for(told.wait(), 20)
    print("written to what may be gone", flush=True)
asyncio.run(main())
open(sys.argv[1] if len(sys.argv) > 1 else "{mark}", "w").close()
"""


def test_a_hang_up_is_handled_and_the_gone_terminal_is_not_written_to(tmp_path):
    mark = tmp_path / "ended well"
    ours, theirs = pty.openpty()
    process = run(SIGNALLED.format(mark=mark), stdout=theirs, session=True)
    os.close(theirs)
    said = b""
    while b"\n" not in said:
        said += os.read(ours, 100)
    os.close(ours)  # the terminal is gone: writing to it fails from here on
    process.send_signal(signal.SIGHUP)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 0, errors
    assert mark.exists()


def test_a_hang_up_that_nohup_ignores_stays_ignored(tmp_path):
    script = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n" + SIGNALLED.format(
        mark=tmp_path / "m"
    )
    process = run(script)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 0


def test_last_words_are_log_state_and_stacks_and_do_not_kill_who_has_none(tmp_path):
    def started(identity: str, script: str) -> tuple["subprocess.Popen[str]", Process]:
        log = tmp_path / f"worker-{identity}.err"
        process = subprocess.Popen(
            [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, stderr=log.open("w"), text=True
        )
        assert process.stdout is not None
        process.stdout.readline()
        log.rename(tmp_path / f"worker-{identity}-01-{process.pid}.err")
        return process, Process(identity, "RolloutWorker", process.pid, "node")

    told = "import sys, time\nfor word in ('before', 'the cause'): print(word, file=sys.stderr, flush=True)"
    hangs = "def stuck_here():\n    time.sleep(99)\nprint(1, flush=True); stuck_here()"
    tells, one = started("a", f"{told}\nimport rollout.stacks as s; s.show_stacks_on_signal()\n{hangs}")
    stops, two = started("b", f"{told}\n{hangs}")
    stops.send_signal(signal.SIGSTOP)
    try:
        said = words([one, two], tmp_path, lines=1)
        assert (said["a"].state, said["a"].log) == ("sleeping", "the cause")
        assert "stuck_here" in said["a"].stacks
        assert (said["b"].state, said["b"].log, said["b"].stacks) == ("stopped", "the cause", "")
        stops.send_signal(signal.SIGCONT)
        time.sleep(0.2)
        assert stops.poll() is None
    finally:
        for process in (tells, stops):
            process.kill()
            process.wait()
