"""The lease on a run's folder: one driver at a time writes there.

Invariant: a driver that writes to a run's folder has its lease in it, a file with host, process and the time
of its last sign of life, which a thread renews. Whoever would write there and finds a living lease refuses
or waits for its end. A lease is void once its process has ended (which its host knows at once), and
everywhere when it has not been renewed for STALE_S. No lock is taken, so any file system that the hosts share
will do; their clocks may differ by less than STALE_S. Of two that begin in the same moment the later one has
the lease, as has whoever came while a driver was frozen for longer than STALE_S; the other finds out and ends
before it writes again.

    wait_until_free(folder, 600, print)
    with Lease(folder) as lease:
        lease.check()                   # before each write: raises when another driver has taken over
"""

import contextlib
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Self

import psutil
from pydantic import BaseModel, Field, FiniteFloat

from rollout.files import read_record, write_whole
from rollout.printable import one_line
from services.config import ConfigError

LEASE = ".lease"
BEAT_S = 10.0
STALE_S = 120.0
POLL_S = 1.0


class Holder(BaseModel):
    """Who has a folder's lease, and when it last showed a sign of life (Unix time)."""

    host: str
    space: str
    """The host's process namespace: containers of one host name may number their processes apart."""
    pid: Annotated[int, Field(gt=0, lt=2**31)]
    token: str
    time: FiniteFloat

    def __str__(self) -> str:
        age = time.time() - self.time
        return f"process {self.pid} on {one_line(self.host)}, last sign of life {age:.0f} s ago"


def holder(folder: Path) -> Holder | None:
    """The driver that writes to this folder; None when there is none any more.

    Raises:
        ConfigError: the lease cannot be read.
    """
    try:
        found = _read(folder / LEASE)
    except OSError as error:
        raise ConfigError(f"{folder / LEASE} cannot be read: {error.strerror}") from None
    if found is None or abs(time.time() - found.time) > STALE_S:
        return None
    here = (found.host, found.space) == _here()
    return None if here and _ended(found.pid) else found


def wait_until_free(
    folder: Path, deadline_s: float = 0.0, say: Callable[[str], None] = lambda text: None
) -> None:
    """Return once no other driver writes to this folder; `say` is told when there is something to wait for.

    Raises:
        ConfigError: it still does so at the deadline.
    """
    ends = time.monotonic() + deadline_s
    told = False
    while (other := holder(folder)) is not None:
        if time.monotonic() >= ends:
            raise ConfigError(
                f"{folder}: another driver writes there ({other}); stop it first, or give another run.name. "
                f"If it was killed elsewhere, the folder is free {STALE_S:.0f} s after that sign"
            )
        if not told:
            say(f"{folder}: another driver writes there ({other}); waiting up to {deadline_s:.0f} s")
            told = True
        time.sleep(POLL_S)


class Lease:
    """This driver's lease on a run's folder, for as long as the block lasts.

    Raises:
        ConfigError: another driver has it.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / LEASE
        host, space = _here()
        self._own = Holder(host=host, space=space, pid=os.getpid(), token=uuid.uuid4().hex, time=0.0)
        self._ended = threading.Event()
        self._beating = threading.Thread(target=self._beat, name="lease", daemon=True)

    def __enter__(self) -> Self:
        wait_until_free(self.path.parent)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._write()
        self._beating.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._beating.join(timeout=BEAT_S)  # a daemon: it may stay behind when the disk hangs
        if self._taken_by() is None:
            self.path.unlink(missing_ok=True)

    def check(self) -> None:
        """Raise RuntimeError when another driver has taken the folder over: it is not to be written to."""
        if (other := self._taken_by()) is not None:
            raise RuntimeError(f"{self.path.parent}: another driver has taken over ({other}); this one ends")

    def _taken_by(self) -> Holder | None:
        found = _read(self.path)
        return None if found is None or found.token == self._own.token else found

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_S):
            with contextlib.suppress(OSError):  # a shared disk that hangs for a while: the next beat counts
                if self._taken_by() is None:
                    self._write()

    def _write(self) -> None:
        now = self._own.model_copy(update={"time": time.time()})
        write_whole(self.path, now.model_dump_json(), lasting=False)


def _read(path: Path) -> Holder | None:
    try:
        return read_record(path, Holder)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # damaged: who lives writes it anew
        return None


def _here() -> tuple[str, str]:
    return socket.gethostname(), os.readlink("/proc/self/ns/pid")


def _ended(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
