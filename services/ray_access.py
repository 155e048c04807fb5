"""Who may reach a Ray that this code starts or joins: its address and its token.

Invariant: without a named host every Ray port is on the loopback address, and whoever connects needs a token,
because Ray runs the code of everyone who connects.
"""

import os
import secrets
import stat
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from services.config import ConfigError

LOOPBACK = ("127.0.0.1", "localhost", "::1")
TOKEN, TOKEN_PATH, MODE = "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"
ON_LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""Ray's switch for clusters of one machine: a node's address is then 127.0.0.1. Without it Ray replaces
127.0.0.1 by the machine's outer address, for a cluster that it starts and for one that it joins."""


def guard(address: str | None) -> None:
    """Prepare this process for the cluster at `address`, or for one of its own with a token that nobody else
    has. Before `ray.init`.

    Raises:
        ConfigError: a token is asked for and not there.
    """
    here = address is None or host_of(address) in LOOPBACK
    if here:
        os.environ.update(ON_LOOPBACK)
        if token_value() is not None:
            os.environ.setdefault(MODE, "token")  # a cluster here without a token does not look at it
    if os.environ.get(MODE) == "token" and token_value() is None and address:
        raise ConfigError(
            f"{MODE} = token, and there is no token for {address}: put it into {TOKEN} or {token_file()}"
        )
    if address is None:
        os.environ.update({MODE: "token", TOKEN: secrets.token_hex(32)})
        os.environ.setdefault("RAY_TMPDIR", str(own_folder()))
    reread()


def reread() -> None:
    """Have Ray look again at what it read of the environment when it was imported."""
    from ray._private import ray_constants
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

    ray_constants.ENABLE_RAY_CLUSTER = os.environ.get(next(iter(ON_LOOPBACK))) != "0"
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def own_folder() -> Path:
    """Folder for Ray's sessions that nobody else can enter. Their own folders are open to everyone, who could
    put another socket in the place of Ray's. Its name is short because the paths of sockets must be.

    Raises:
        ConfigError: it is somebody else's.
    """
    folder = Path(f"/tmp/rlgaf-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise ConfigError(f"{folder} must be a folder that only you can enter: remove it, or chmod 700 it")
    return folder


def token_value() -> str | None:
    """The token Ray would use: RAY_AUTH_TOKEN, else the file RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token."""
    if text := os.environ.get(TOKEN, "").strip():
        return text
    try:
        return token_file().read_text().strip() or None
    except FileNotFoundError:
        return None


def token_source() -> str:
    """Where `token_value` finds it, for messages."""
    return f"the variable {TOKEN}" if os.environ.get(TOKEN, "").strip() else f"the file {token_file()}"


def token_file() -> Path:
    """Where Ray looks for the token, if it is in no variable."""
    return Path(os.environ.get(TOKEN_PATH) or Path.home() / ".ray" / "auth_token")


def private(url: str) -> bool:
    """Whether nobody on the way can read what is sent there: https, or this machine."""
    parts = urlsplit(url)
    own = {address.address for addresses in psutil.net_if_addrs().values() for address in addresses}
    return parts.scheme == "https" or parts.hostname in {*LOOPBACK, *own}


def host_of(address: str) -> str:
    """`ray://[::1]:10001` → `::1`, `node:6379` → `node`."""
    return address.rpartition("/")[2].rpartition(":")[0].strip("[]")
