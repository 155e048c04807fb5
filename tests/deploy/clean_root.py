"""Folders as root file systems: a minimal Debian with Python in /usr/local, as the images
`python:X.Y.Z-slim-…` have it, and commands that run in such a folder as if it were the machine.

Commands have mounts and processes of their own, so whatever a command mounts or leaves running ends with it.
They have the machine's kernel, network, certificates and pip settings. Needs root with the right to mount.
"""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from fetched_tools import debootstrap

PATH = "/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin"
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
LIBRARIES = (
    "ca-certificates,netbase,tzdata,libbz2-1.0,libffi8,libgdbm6,liblzma5,libncursesw6,libreadline8,"
    "libsqlite3-0,libssl3,libuuid1,zlib1g"
)
"""What the interpreter links against, and what the images have beside it."""
BASE = re.compile(r"python:(?P<version>3\.\d+)\.\d+-slim-(?P<suite>\w+)")


def obstacle(base: str) -> str:
    """Why `make_base(base, …)` cannot work here; empty if it can."""
    if (match := BASE.fullmatch(base)) is None:
        return f"{base} is no python:X.Y.Z-slim-SUITE"
    if os.geteuid() != 0:
        return "only root can change the root folder"
    if subprocess.run(["unshare", "--mount", "--pid", "--fork", "true"], check=False).returncode:
        return "this machine does not let root have mounts of its own"
    own = f"{sys.version_info.major}.{sys.version_info.minor}"
    return "" if match["version"] == own else f"the image has Python {match['version']}, this is {own}"


def make_base(base: str, root: Path) -> None:
    """Make `root` what the image `base` is, with this interpreter for its Python.

    Raises:
        RuntimeError: Debian cannot be installed there; the message has the last words.
    """
    match = BASE.fullmatch(base)
    assert match is not None, base
    package = debootstrap()
    command = [
        *("unshare", "--mount", "--pid", "--fork", "--kill-child", str(package / "usr/sbin/debootstrap")),
        *("--variant=minbase", f"--include={LIBRARIES}", match["suite"], str(root)),
    ]
    done = subprocess.run(
        command,
        env=os.environ | {"DEBOOTSTRAP_DIR": str(package / "usr/share/debootstrap")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1800,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"debootstrap: {done.stdout[-2000:]}")
    _copy_python(match["version"], root / "usr" / "local")
    for name in ("python", "python3"):
        (root / "usr/local/bin" / name).symlink_to(f"python{match['version']}")
    finish = "ldconfig && python -m ensurepip && ln -s pip3 /usr/local/bin/pip"
    done = run(root, f"{finish} && apt-get clean && rm -rf /var/lib/apt/lists/*")
    if done.returncode != 0:
        raise RuntimeError(f"Python in {root}: {done.stdout[-2000:]}")


def _copy_python(version: str, target: Path) -> None:
    own, name = Path(sys.base_prefix), f"python{version}"
    (target / "bin").mkdir(parents=True, exist_ok=True)
    shutil.copy2(own / "bin" / name, target / "bin" / name)
    left = shutil.ignore_patterns("site-packages", "__pycache__", "test", "config-*")
    shutil.copytree(own / "lib" / name, target / "lib" / name, symlinks=True, ignore=left)
    shutil.copytree(own / "include" / name, target / "include" / name)
    (target / "lib" / name / "site-packages").mkdir()
    for library in own.glob("lib/libpython*.so*"):
        shutil.copy2(library, target / "lib" / library.name, follow_symlinks=False)


def run(
    root: Path,
    command: str,
    *,
    env: Mapping[str, str] | None = None,
    cwd: str = "/",
    user: str = "0:0",
    bind: Mapping[Path, str] | None = None,
    network: bool = True,
    timeout_s: float = 3600,
) -> subprocess.CompletedProcess[str]:
    """Run a shell command in `root`; its output, errors among it, is `stdout`. `bind` shows folders of the
    machine, read-only, at places in `root`; without `network` there is a loopback of its own only."""
    settings, shown = _machines_pip()
    shown |= {path: str(path) for path in (CERTIFICATES, Path("/etc/resolv.conf"), Path("/etc/hosts"))}
    lines = ["set -e"]
    for path, place in {**shown, **(bind or {})}.items():
        there = root / place.lstrip("/")
        if path.is_dir():
            lines.append(f"mkdir -p {shlex.quote(str(there))}")
        else:
            lines.append(f"mkdir -p {shlex.quote(str(there.parent))} && touch {shlex.quote(str(there))}")
        lines.append(f"mount --bind -o ro {shlex.quote(str(path))} {shlex.quote(str(there))}")
    quoted = shlex.quote(str(root))
    lines += [
        f"mount --rbind /dev {quoted}/dev && mount -t tmpfs shm {quoted}/dev/shm",
        f"mount -t proc proc {quoted}/proc && mount --rbind /sys {quoted}/sys",
        *([] if network else ["ip link set lo up"]),
    ]
    known = {"PATH": PATH, "LANG": "C.UTF-8", "HOME": "/root"} | settings | dict(env or {})
    inside = [
        *("chroot", f"--userspec={user}", f"--groups={user.split(':')[1]}", str(root)),
        *("/usr/bin/env", "-i", f"--chdir={cwd}", *(f"{name}={value}" for name, value in known.items())),
        *("/bin/sh", "-c", command),
    ]
    lines.append(f"exec {shlex.join(inside)}")
    spaces = ["--mount", "--pid", "--fork", "--kill-child", *([] if network else ["--net"])]
    return subprocess.run(
        ["unshare", *spaces, "sh", "-c", "\n".join(lines)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def _machines_pip() -> tuple[dict[str, str], dict[Path, str]]:
    """pip's settings here as environment variables, and the folders they name: a local index's files lie
    beside it."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    )
    settings, folders = {}, {}
    for line in listed.stdout.splitlines():
        name, value = line.split("=", 1)
        settings["PIP_" + name.split(".")[-1].upper().replace("-", "_")] = ast.literal_eval(value)
    for word in " ".join(settings.values()).split():
        path = Path(word.removeprefix("file://"))
        if path.is_absolute() and path.is_dir():
            shown = path.parent if word.startswith("file://") else path
            folders[shown] = str(shown)
    return settings, folders
