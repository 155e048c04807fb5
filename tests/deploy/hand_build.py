"""Executes a Dockerfile step by step without a container engine: each stage is a folder, each RUN happens in
it with the stage's environment, working directory and mounts, each COPY takes what the .dockerignore leaves.

What stands in for the base image is made once (`clean_root.make_base`). EXPOSE, HEALTHCHECK and CMD only
describe; `HandBuild.healthy` starts the command and asks the check.
"""

import json
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from clean_root import make_base, run
from dockerfile import Stage, Step, context, pairs, stages


@dataclass
class Image:
    """A stage so far."""

    root: Path
    env: dict[str, str] = field(default_factory=dict)
    cwd: str = "/"
    user: str = "0:0"

    def inside(self, place: str) -> Path:
        """A place of the image, from its working directory on, as a path of this machine."""
        return self.root / str(Path(self.cwd) / place).lstrip("/")


@dataclass(frozen=True)
class Done:
    """A step that was executed."""

    stage: str
    step: str
    seconds: float
    mib: int
    """By how much it made the stage larger."""


class StepFailed(RuntimeError):
    """A RUN ended with an error; the message has its output."""


class HandBuild:
    """A build of `dockerfile` with the context `source` in the folder `work`.

    `base` is what stands in for the base image; it is made if it is not there. `replaced` are files of the
    context with other contents. `say` is told each step as it is done.
    """

    def __init__(
        self,
        dockerfile: Path,
        source: Path,
        work: Path,
        base: Path,
        replaced: Mapping[str, str],
        say: Callable[[Done], None],
    ) -> None:
        self.stages = stages(dockerfile)
        self._work, self._base = work, base
        self._say = say
        self._images: dict[str, Image] = {}
        self._context = work / "context"
        for path in context(source, Path(f"{dockerfile}.dockerignore")):
            (self._context / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source / path, self._context / path)
        for name, text in replaced.items():
            if not (self._context / name).exists():
                raise ValueError(f"{name} is not in the context")
            (self._context / name).write_text(text)

    @property
    def image(self) -> Image:
        """The last stage."""
        return self._images[self.stages[-1].name]

    def build(self) -> None:
        """Execute every step.

        Raises:
            StepFailed: a RUN failed.
            ValueError: an instruction that is not known here.
        """
        for stage in self.stages:
            started = time.monotonic()
            self._images[stage.name] = image = self._begin(stage)
            size = _mib(image.root)
            self._say(Done(stage.name, f"FROM {stage.base}", time.monotonic() - started, size))
            for step in stage.steps:
                started = time.monotonic()
                self._execute(step, image)
                if step.name in ("COPY", "RUN"):
                    seconds, before, size = time.monotonic() - started, size, _mib(image.root)
                    self._say(Done(stage.name, f"{step.name} {step.text}", seconds, size - before))

    def run(
        self, command: str, *, network: bool = True, timeout_s: float = 600
    ) -> subprocess.CompletedProcess[str]:
        """A command in the finished image, as its user."""
        image = self.image
        return run(
            image.root,
            command,
            env=image.env,
            cwd=image.cwd,
            user=image.user,
            network=network,
            timeout_s=timeout_s,
        )

    def healthy(self, within_s: int) -> subprocess.CompletedProcess[str]:
        """Start the image's command, without a network, and ask the health check until it says yes."""
        said = {step.name: step.text for step in self.stages[-1].steps}
        command = shlex.join(json.loads(said["CMD"]))
        check = shlex.join(json.loads(said["HEALTHCHECK"].split("CMD", 1)[1]))
        script = (
            f"{command} > /tmp/command.log 2>&1 & process=$!\n"
            f"end=$(($(date +%s) + {within_s}))\n"
            f"until {check} > /tmp/check.log 2>&1; do\n"
            "  kill -0 $process && [ $(date +%s) -lt $end ] || { cat /tmp/c*.log; exit 1; }\n"
            "  sleep 1\n"
            "done\n"
            "kill $process; wait $process; echo healthy"
        )
        return self.run(script, network=False, timeout_s=within_s + 120)

    def _begin(self, stage: Stage) -> Image:
        earlier = self._images.get(stage.base)
        if earlier is None:
            if not self._base.exists():
                making = self._base.with_name(f"{self._base.name}-unfinished")
                shutil.rmtree(making, ignore_errors=True)
                make_base(stage.base, making)
                making.rename(self._base)
            earlier = Image(self._base)
        root = self._work / f"stage-{stage.name}"
        subprocess.run(["cp", "-a", "--reflink=auto", str(earlier.root), str(root)], check=True)
        return Image(root, dict(earlier.env), earlier.cwd, earlier.user)

    def _execute(self, step: Step, image: Image) -> None:
        match step.name:
            case "WORKDIR":
                image.cwd = str(Path(image.cwd) / step.text)
                image.inside(".").mkdir(parents=True, exist_ok=True)
            case "ENV":
                image.env |= pairs(step.text)
            case "USER":
                image.user = step.text
            case "COPY":
                self._copy(step, image)
            case "RUN":
                self._run(step, image)
            case "EXPOSE" | "HEALTHCHECK" | "CMD":
                pass
            case _:
                raise ValueError(f"{step.name} is not known here")

    def _copy(self, step: Step, image: Image) -> None:
        *names, place = shlex.split(step.text)
        origin = self._images[step.flags["from"]].root if "from" in step.flags else self._context
        target = image.inside(place)
        for name in names:
            source = origin / name.lstrip("/")
            if source.is_dir():  # its contents, as Docker does it
                target.mkdir(parents=True, exist_ok=True)
                subprocess.run(["cp", "-a", f"{source}/.", f"{target}/"], check=True)
            else:
                into = target / source.name if place.endswith("/") or len(names) > 1 else target
                into.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, into)

    def _run(self, step: Step, image: Image) -> None:
        bind = {}
        if mount := step.flags.get("mount"):
            said = dict(word.split("=", 1) for word in mount.split(","))
            if said["type"] != "bind":
                raise ValueError(f"--mount={mount} is not known here")
            bind[self._images[said["from"]].root / said["source"].lstrip("/")] = said["target"]
        done = run(image.root, step.text, env=image.env, cwd=image.cwd, user=image.user, bind=bind)
        for place in bind.values():  # where it was mounted
            image.inside(place).rmdir()
        if done.returncode != 0:
            raise StepFailed(f"RUN {step.text}\nended with {done.returncode}:\n{done.stdout[-4000:]}")


def _mib(root: Path) -> int:
    sized = subprocess.run(
        ["du", "-sxm", "--apparent-size", str(root)], capture_output=True, text=True, check=True
    )
    return int(sized.stdout.split()[0])
