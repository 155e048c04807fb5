"""A pod's containers as processes of this machine, in Linux namespaces of their own, so that a pod's
commands see the paths, the addresses and the rights that the pod asks for.

* Network: a namespace with an address for each pod, all on one bridge; every port is the pod's own.
* Files: a root folder with this system's /usr read-only, a small /etc, the running interpreter and this
  project at their own paths (together: the image), and the volumes where the container mounts them;
  read-only where it says so.
* Processes: a PID namespace for each container. Its first process is the container's command; when that
  ends, all of them have ended.
* User and group as given, no capabilities, no new privileges.

CPU and memory limits and network policies are not enforced. All containers of a pod share one root folder.
Needs root, util-linux and iproute2.
"""

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]
COMMAND_S = 30.0
KILL_S = 30.0
SYSTEM = ("bin", "sbin", "lib", "lib32", "lib64", "libx32", "usr")
ETC = ("alternatives", "ld.so.cache", "ld.so.conf", "ld.so.conf.d", "localtime", "ssl")
EMPTY = ("dev", "proc", "run", "sys", "tmp", "var/tmp")
USERS = "root:x:0:0:root:/root:/bin/sh\nrlgaf:x:1000:1000:rlgaf:/home/rlgaf:/bin/sh\n"
GROUPS = "root:x:0:\nrlgaf:x:1000:\n"
IMAGE = tuple(
    path for path in (Path(sys.base_prefix), Path(sys.prefix), ROOT) if not path.is_relative_to("/usr")
)
IMAGE_ENV = {
    "PATH": f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin",
    "PYTHONPATH": str(ROOT),
    "PYTHONUNBUFFERED": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
}
"""What the images set (deploy/docker), with the project as it lies here instead of an installed wheel."""


def needed() -> None:
    """Skip the test where this machine cannot make pods."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("pods are made of Linux namespaces here, which needs root")
    missing = [tool for tool in ("ip", "unshare", "nsenter", "setpriv") if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} missing (Debian: apt-get install util-linux iproute2)")


class Network:
    """A bridge for the pods of one test, in a range that is reserved for benchmarks and never routed."""

    def __init__(self) -> None:
        self.name = f"rl{os.getpid():x}"
        self._net = f"198.18.{os.getpid() % 256}"
        self._given = 1
        _run("ip", "link", "add", self.name, "type", "bridge")
        _run("ip", "address", "add", f"{self._net}.1/24", "dev", self.name)
        _run("ip", "link", "set", self.name, "up")

    def add(self) -> tuple[str, str]:
        """A new namespace and its address."""
        self._given += 1
        space, address = f"{self.name}-{self._given}", f"{self._net}.{self._given}"
        _run("ip", "netns", "add", space)
        _run("ip", "link", "add", space, "type", "veth", "peer", "name", "eth0", "netns", space)
        _run("ip", "link", "set", space, "master", self.name, "up")
        _run("ip", "-n", space, "address", "add", f"{address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            _run("ip", "-n", space, "link", "set", device, "up")
        _run("ip", "-n", space, "route", "add", "default", "via", f"{self._net}.1")
        return space, address

    def close(self) -> None:
        """Remove the bridge; every namespace has been removed by its pod."""
        _run("ip", "link", "delete", self.name)


@dataclass(frozen=True)
class Mount:
    """A folder at a container's path; without source a file system in memory of that size, as in 1g."""

    target: str
    source: Path | None
    read_only: bool = False
    size: str = ""


@dataclass(frozen=True)
class Container:
    """What a container runs, and as whom."""

    name: str
    words: list[str]
    env: dict[str, str]
    folder: str
    mounts: list[Mount]
    user: int
    group: int
    read_only_root: bool

    def identity(self) -> list[str]:
        """Words in front of a command that drop root's rights and change into the folder."""
        who = [f"--reuid={self.user}", f"--regid={self.group}", f"--groups={self.group}"]
        return [
            "setpriv",
            *who,
            "--bounding-set=-all",
            "--inh-caps=-all",
            "--no-new-privs",
            "env",
            "-C",
            self.folder,
        ]

    def variables(self) -> dict[str, str]:
        return IMAGE_ENV | self.env


@dataclass
class Process:
    """A container that was started. `code` is its exit code once it ended (128 + n: killed by signal n)."""

    container: Container
    log: Path
    launched: "subprocess.Popen[bytes]"
    pid: int = 0

    @property
    def code(self) -> int | None:
        code = self.launched.poll()
        return code if code is None or code >= 0 else 128 - code

    def signal(self, number: int) -> None:
        """To the container's first process, the one with id 1 inside."""
        if self.pid and self.code is None:  # process 0 would be this process's own group
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)


@dataclass
class Sandbox:
    """One pod's network namespace and root folder."""

    name: str
    folder: Path
    network: Network
    space: str = field(init=False)
    address: str = field(init=False)
    _started: list[Process] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.root.mkdir(parents=True)
        for name in SYSTEM:
            if (source := Path("/") / name).is_symlink():
                (self.root / name).symlink_to(os.readlink(source))
            elif source.is_dir():
                (self.root / name).mkdir()
        for name in EMPTY:
            (self.root / name).mkdir(parents=True)
        (self.root / "etc").mkdir()
        for name in ETC:
            source, target = Path("/etc") / name, self.root / "etc" / name
            if source.is_dir() and not source.is_symlink():
                shutil.copytree(source, target, symlinks=True, ignore=shutil.ignore_patterns("private"))
            elif source.exists():
                shutil.copy2(source, target)
        (self.root / "etc" / "passwd").write_text(USERS)
        (self.root / "etc" / "group").write_text(GROUPS)
        (self.root / "etc" / "nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files\n")
        self.hosts("")
        self.space, self.address = self.network.add()

    @property
    def root(self) -> Path:
        return self.folder / "root"

    def hosts(self, text: str) -> None:
        """Replace the names that the pod can resolve."""
        new = self.root / "etc" / "hosts.new"
        new.write_text(f"127.0.0.1 localhost\n{text}")
        new.rename(new.with_name("hosts"))

    def start(self, container: Container) -> Process:
        """Start a container; its output goes to a log in the pod's folder."""
        script = self.folder / f"{container.name}.sh"
        script.write_text("\n".join(self._script(container)) + "\n")
        log = self.folder / f"{container.name}.log"
        namespaces = ["unshare", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child=KILL"]
        with log.open("ab") as out:
            launched = subprocess.Popen(
                ["ip", "netns", "exec", self.space, *namespaces, "bash", str(script)],
                env=container.variables(),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        process = Process(container, log, launched)
        self._started.append(process)
        deadline = time.monotonic() + COMMAND_S
        while process.code is None and not self._entered(process):
            if time.monotonic() > deadline:
                raise TimeoutError(f"container {container.name} did not start within {COMMAND_S:.0f} s")
            time.sleep(0.01)
        return process

    def _entered(self, process: Process) -> bool:
        """Whether the container's first process is there and has changed into the pod's root folder."""
        with contextlib.suppress(psutil.NoSuchProcess, FileNotFoundError):
            for child in psutil.Process(process.launched.pid).children():
                process.pid = child.pid
                return os.readlink(f"/proc/{child.pid}/root") != "/"
        return False

    def execute(self, process: Process, words: list[str], name: str) -> Process:
        """Run a command inside a running container, as `kubectl exec` and hooks do."""
        container = process.container
        spaces = ["--mount", "--uts", "--ipc", "--net", "--pid", "--root"]
        inside = ["nsenter", f"--target={process.pid}", *spaces]
        log = self.folder / f"{name}.log"
        with log.open("ab") as out:
            launched = subprocess.Popen(
                [*inside, *container.identity(), *words],
                env=container.variables(),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        entered = Process(container, log, launched, launched.pid)
        self._started.append(entered)
        return entered

    def remove(self) -> None:
        """End what still runs and give the network namespace back. Logs and volumes stay."""
        for process in self._started:
            process.signal(signal.SIGKILL)
        for process in self._started:
            process.launched.wait(KILL_S)
        _run("ip", "netns", "delete", self.space)

    def _script(self, container: Container) -> list[str]:
        """Shell lines that build the container's view of files and become its command."""
        root = str(self.root)
        lines = ["set -eu", f"hostname {self.name[:63]}", f"mount --bind {root} {root}"]

        def bind(source: Path, target: str, *, read_only: bool, recursive: bool = False) -> None:
            inside = shlex.quote(f"{root}{target}")
            lines.append(f"mkdir -p {inside}")
            lines.append(f"mount {'--rbind' if recursive else '--bind'} {shlex.quote(str(source))} {inside}")
            if read_only:
                lines.append(f"mount -o remount,bind,ro {inside}")

        for name in SYSTEM:
            if (Path("/") / name).is_dir() and not (Path("/") / name).is_symlink():
                bind(Path("/") / name, f"/{name}", read_only=True, recursive=True)
        bind(Path("/dev"), "/dev", read_only=False, recursive=True)
        bind(Path("/sys"), "/sys", read_only=True)
        lines.append(f"mount -t proc proc {root}/proc")
        for mount in sorted(container.mounts, key=lambda mount: mount.target.count("/")):
            if mount.source is not None:
                bind(mount.source, mount.target, read_only=mount.read_only)
                continue
            lines.append(f"mkdir -p {root}{mount.target}")
            lines.append(f"mount -t tmpfs -o mode=1777,size={mount.size} tmpfs {root}{mount.target}")
        for path in IMAGE:  # last: a volume may cover its place, as /tmp does where the project lies there
            bind(path, str(path), read_only=True)
        if container.read_only_root:
            lines.append(f"mount -o remount,bind,ro {root}")
        command = ["chroot", root, *container.identity(), *container.words]
        return [*lines, f"exec {shlex.join(command)}"]


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_S, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{shlex.join(command)}: {done.stderr.strip() or done.returncode}")
