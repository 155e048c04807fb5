"""`rlgaf submit`: a run as a job of a Ray cluster, followed to its end.

Everything that can be checked without the cluster is checked before anything is sent. What is sent is what
the printed `ray job submit` line sends. The driver reserves no GPU. It is told to stop as `ray job stop` does
it, by SIGTERM, upon which the run finishes its step, writes a checkpoint and ends. How long Ray waits for
that is the cluster's own RAY_JOB_STOP_WAIT_TIME_S, which a job replaces only if told to (`stop_wait_s`);
`stop_wait.py` sees to clusters that have none.

The job does not depend on this process: when it is killed, the job goes on.
"""

import asyncio
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rollout.credentials import fields_with_credentials
from services.config import Config, ConfigError, given, load, refuse_credentials
from services.jobs.client import JobClient, JobEnd, LostJob
from services.jobs.working_dir import carried, check_paths

INTERRUPTED = 130
FAILED = 1
RUN_KEY = "rlgaf-run"
"""Key of the job's metadata that names the run's folder: two jobs must not write into one."""


@dataclass(frozen=True)
class Submission:
    """A job as it will be sent."""

    address: str
    entrypoint: list[str]
    run: str
    working_dir: Path | None = None
    image: str = ""
    driver_cpus: float = 0.0
    stop_wait_s: int | None = None
    """Seconds that replace the cluster's own; None leaves it to the cluster."""
    notes: list[str] = field(default_factory=list)

    @property
    def command(self) -> str:
        """The entrypoint as one shell line."""
        return shlex.join(self.entrypoint)

    def environment(self) -> dict[str, Any]:
        """Ray's runtime environment, without the working directory."""
        variables = {"RAY_JOB_STOP_WAIT_TIME_S": str(self.stop_wait_s)}
        stop_wait = {"env_vars": variables} if self.stop_wait_s else {}
        return stop_wait | ({"image_uri": self.image} if self.image else {})

    def plain_line(self) -> str:
        """The `ray job submit` line that does the same."""
        words = ["ray", "job", "submit", "--address", self.address]
        if self.working_dir is not None:
            words += ["--working-dir", str(self.working_dir)]
        if environment := self.environment():
            words += ["--runtime-env-json", json.dumps(environment)]
        if self.driver_cpus:
            words += ["--entrypoint-num-cpus", f"{self.driver_cpus:g}"]
        words += ["--metadata-json", json.dumps({RUN_KEY: self.run})]
        return shlex.join([*words, "--", *self.entrypoint])


def prepare(
    file: Path,
    overrides: Sequence[str],
    address: str,
    *,
    working_dir: Path | None = None,
    image: str = "",
    resume: bool = False,
    driver_cpus: float = 0.0,
    stop_wait_s: int | None = None,
) -> Submission:
    """Check a run and how it is to be sent, without the cluster.

    Without a working directory the TOML file's settings travel in the entrypoint, and only paths that exist
    on the nodes (or in the image) can work.

    Raises:
        ConfigError: the configuration cannot run, a file of it would not arrive, or the combination is not
        supported.
    """
    config = load(file, list(overrides))
    refuse_credentials(list(fields_with_credentials({"--address": address, "--image": image})))
    if not address.startswith(("http://", "https://")):
        raise ConfigError(
            f"--address {address}: give the dashboard's address, as in http://localhost:8265 "
            "(on Kubernetes: kubectl port-forward svc/…-head-svc 8265)"
        )
    if stop_wait_s is not None and stop_wait_s < 1:
        raise ConfigError(f"--stop-wait {stop_wait_s}: seconds that a stopping run has for its checkpoint")
    if image:
        _check_image(config, working_dir)
    sent = carried(working_dir) if working_dir is not None else None
    notes = check_paths(config, sent)
    if sent is not None:
        notes.append(f"{len(sent.files)} files, {sent.bytes / 2**20:.1f} MiB, travel in {sent.root}")
        if not sent.holds(file.absolute()):
            raise ConfigError(f"{file} is not among the files that --working-dir {sent.root} sends")
        words = [str(file.absolute().relative_to(sent.root)), *overrides]
    else:
        settings = _flat(given(file, list(overrides)))
        words = ["/dev/null", *(f"--{name}={_word(value)}" for name, value in settings.items())]
    return Submission(
        address=address.rstrip("/"),
        # `exec`: a driver that is a child of the job's shell becomes a zombie when the shell is stopped in a
        # container whose first process reaps none, and Ray would wait for it to end.
        entrypoint=["exec", "rlgaf", "train", *words, *["--auto-resume"] * resume],
        run=str(config.folder),
        working_dir=sent.root if sent is not None else None,
        image=image,
        driver_cpus=driver_cpus,
        stop_wait_s=stop_wait_s,
        notes=notes,
    )


def submit(submission: Submission, say: Callable[[str], None]) -> int:
    """Send the job, follow it, and return the exit code of its driver (130 when it was stopped).

    Ctrl-C asks the run to stop with a checkpoint and waits for that; a second one leaves at once, and the job
    goes on stopping.

    Raises:
        ConfigError: the cluster cannot be reached, refuses the token, or trains this run already.
    """
    for note in submission.notes:
        say(f"note: {note}")
    say(submission.plain_line())
    client = JobClient(submission.address)
    for other in client.active():
        if other.metadata.get(RUN_KEY) == submission.run:
            raise ConfigError(
                f"job {other.id} is {other.status.lower()} and writes to {submission.run}; stop it first "
                f"(ray job stop --address {submission.address} {other.id}), or give another run.name"
            )
    job = client.submit(
        submission.command,
        runtime_env=submission.environment()
        | ({"working_dir": str(submission.working_dir)} if submission.working_dir else {}),
        metadata={RUN_KEY: submission.run},
        driver_cpus=submission.driver_cpus,
    )
    say(f"job {job}")
    return _follow(client, job, submission, say)


def _check_image(config: Config, working_dir: Path | None) -> None:
    if working_dir is not None:
        raise ConfigError(
            "--image and --working-dir exclude each other: Ray starts an image with nothing beside it; put "
            "the run's files into the image"
        )
    asked = [
        f"{name}.device"
        for name, device in (
            ("rollout", config.rollout.device),
            ("learner", config.learner.device),
            ("discriminator", config.discriminator.device),
        )
        if device == "cuda"
    ]
    if asked:
        raise ConfigError(
            f'--image with {", ".join(asked)} = "cuda": Ray starts the image with podman and hands it no '
            "GPU; let the cluster's own pods or machines have the image, and submit without --image"
        )


def _flat(section: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"run": {"steps": 5}} → {"run.steps": 5}."""
    out: dict[str, Any] = {}
    for name, value in section.items():
        out |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return out


def _word(value: Any) -> str:
    """The value of an override: JSON's scalars and lists are TOML's."""
    return "none" if value is None else json.dumps(value, ensure_ascii=False)


def _follow(client: JobClient, job: str, submission: Submission, say: Callable[[str], None]) -> int:
    log = _Log()
    try:
        return _ended(asyncio.run(client.follow(job, log.write)), say)
    except LostJob as lost:
        say(str(lost))
        return FAILED
    except KeyboardInterrupt:
        say("stopping after this step with a checkpoint; once more to leave it to the cluster")
    try:
        client.stop(job)
        return _ended(asyncio.run(client.follow(job, log.write)), say)
    except KeyboardInterrupt:
        say(f"the job goes on stopping: ray job status --address {submission.address} {job}")
        return INTERRUPTED
    except LostJob as lost:
        say(str(lost))
        return FAILED


def _ended(end: JobEnd, say: Callable[[str], None]) -> int:
    """The exit code to pass on, and the reason in one line."""
    if end.status == "SUCCEEDED":
        return 0
    if end.status == "STOPPED":
        say("the job was stopped; `rlgaf submit … --auto-resume` goes on from its newest checkpoint")
        return INTERRUPTED
    if end.exit_code is None:
        say(f"the job failed without an exit code: {end.message}")
        return FAILED
    code = 128 - end.exit_code if end.exit_code < 0 else end.exit_code
    say(f"the job failed with exit code {code}")
    return code


class _Log:
    """Writes what is new of a job's log. A connection that is made again begins with the log's first line."""

    def __init__(self) -> None:
        self.seen = 0

    def write(self, text: str, position: int) -> None:
        """`text` stands at `position` of the log; what was written before is left out."""
        fresh = text[max(0, self.seen - position) :]
        if fresh:
            sys.stdout.write(fresh)
            sys.stdout.flush()
            self.seen = position + len(text)
