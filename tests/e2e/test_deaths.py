"""Processes of a real run that die or stand still: whoever it is, the run ends by itself, in time and with a
reason, and nothing of it stays."""

import contextlib
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from launching import Finished, Launch, steps_done

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1800)]

LONG = {
    "run.steps": "100000",
    "run.max_disc_lag": "50",
    "evaluation.every": "100000",
    "rollout.generate_timeout_s": "30",
    "rollout.sync_timeout_s": "15",
    "rollout.max_replacements": "0",
    "learner.step_timeout_s": "40",
    "discriminator.step_timeout_s": "40",
    "discriminator.scoring.timeout_s": "20",
}
DEADLINE_S = 60 + 30 + 20
"""The longest deadline, the end, and a busy machine."""
NEEDED = {
    "learner": "learner rank 0",
    "discriminator": "discriminator rank 0",
    "ray::ServeReplica": "scoring",
    "ray::ReplayBuffer": "replay buffer",
    "ray::VersionStore": "version store",
    "ray::Mailbox": "mailbox",
    "ray::RolloutWorker": "rollout worker 0",
    "VLLM::EngineCore": "rollout worker 0",
}
"""Processes that every step asks for something, and their name in what the run says at its end."""
BYSTANDERS = ["ray::TrainController", "ray::ServeController", "raylet", "gcs_server"]
"""Processes that a run may not miss for long."""


def found(driver: "subprocess.Popen[str]", kind: str) -> psutil.Process:
    """A process of the run by the beginning of its command line; ranks by their folder."""
    children = psutil.Process(driver.pid).children(recursive=True)
    if kind in ("learner", "discriminator"):  # Ray Train's folder is named after the group
        ranks = [p for p in children if title(p).startswith("ray::RayTrainWorker")]
        return next(p for p in ranks if Path(p.cwd()).name == kind)
    return next(p for p in children if Path(title(p).split(" ")[0]).name.startswith(kind))


def title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline()) or "?"
    except psutil.Error:
        return "?"


def after_a_step(
    kind: str, number: signal.Signals, began: list[float]
) -> Callable[["subprocess.Popen[str]", Path], None]:
    """Send a signal to one of the run's processes once it trains; note the time then and at the run's end."""

    def act(driver: "subprocess.Popen[str]", folder: Path) -> None:
        while driver.poll() is None and steps_done(folder) < 2:
            time.sleep(0.1)
        assert driver.poll() is None, "the run ended before"
        found(driver, kind).send_signal(number)
        began.append(time.monotonic())
        driver.wait(timeout=DEADLINE_S + 300)
        began.append(time.monotonic())

    return act


@pytest.fixture(scope="module")
def killed(launch: Launch) -> tuple[Finished, float]:
    times: list[float] = []
    act = after_a_step("discriminator", signal.SIGKILL, times)
    return launch("judge-killed", LONG, meanwhile=act), times[1] - times[0]


def test_a_death_ends_the_run_while_nobody_waits_for_the_dead(killed):
    finished, seconds = killed
    assert finished.code == 1, finished.output[-3000:]
    assert finished.left == []
    assert "discriminator rank 0" in finished.output
    assert seconds < 10 + 5 + 3, "known within ten seconds, aborted within five"
    words = (finished.folder / "last-words.txt").read_text()
    for name in ("learner rank 0", "rollout worker 0", "replay buffer", "discriminator mailbox"):
        assert f"== {name}: " in words
    assert words.count("Current thread") + words.count("Thread 0x") > 4, "stacks of those that live"


@pytest.mark.slow
@pytest.mark.parametrize("kind", NEEDED)
def test_a_process_that_stands_still_ends_the_run_at_a_deadline(launch, kind):
    times: list[float] = []
    act = after_a_step(kind, signal.SIGSTOP, times)
    finished = launch(f"still-{kind.replace(':', '')}", LONG, meanwhile=act)
    assert finished.left == []
    assert finished.code == 1, finished.output[-3000:]
    assert times[1] - times[0] < DEADLINE_S
    assert NEEDED[kind] in finished.output


@pytest.mark.slow
@pytest.mark.parametrize("kind", BYSTANDERS)
def test_a_run_ends_or_goes_on_without_a_process_that_it_does_not_ask(launch, kind):
    steps: list[int] = []

    def act(driver: "subprocess.Popen[str]", folder: Path) -> None:
        while driver.poll() is None and steps_done(folder) < 2:
            time.sleep(0.1)
        stopped = found(driver, kind)
        stopped.send_signal(signal.SIGSTOP)
        for _ in range(2):
            steps.append(steps_done(folder))
            with contextlib.suppress(subprocess.TimeoutExpired):
                driver.wait(timeout=DEADLINE_S / 2)
        steps.append(steps_done(folder))
        if driver.poll() is None:
            stopped.send_signal(signal.SIGCONT)
            driver.send_signal(signal.SIGINT)

    finished = launch(f"beside-{kind.replace(':', '')}", LONG, meanwhile=act)
    assert finished.left == []
    if finished.code == 1:
        assert (finished.folder / "last-words.txt").exists()
    else:
        assert finished.code == 130, finished.output[-3000:]
        assert steps[0] < steps[1] < steps[2], "it stood still in silence"


@pytest.mark.slow
def test_a_closed_terminal_ends_the_run_with_a_checkpoint(launch):
    """It hangs up on every process of the terminal, Ray's included."""

    def hang_up(driver: "subprocess.Popen[str]", folder: Path) -> None:
        while driver.poll() is None and steps_done(folder) < 2:
            time.sleep(0.1)
        for process in [*psutil.Process(driver.pid).children(recursive=True), psutil.Process(driver.pid)]:
            process.send_signal(signal.SIGHUP)

    finished = launch("hung-up", LONG, meanwhile=hang_up)
    assert finished.code == 130, finished.output[-3000:]
    assert finished.left == []
    assert list((finished.folder / "checkpoints").glob("step-*/manifest.json"))
