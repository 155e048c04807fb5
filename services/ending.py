"""The ways in which a run's driver is told, or finds, that it ends.

Invariant: no end needs the cooperation of what hangs. Signals reach the event loop; where the loop itself
stands still, `Deadman` ends the process.
"""

import asyncio
import faulthandler
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
STILL_S = 60.0
"""After so many seconds a loop that stands still has its stacks written."""
CANCEL_S = 2.0
FAILED = 1


def handle_signals(handler: Callable[[int], None]) -> None:
    """Have the running loop call `handler(number)`; a signal that is ignored (`nohup`) stays so. After a
    hang-up what would be written to the terminal is dropped."""
    loop = asyncio.get_running_loop()
    terminals = [fd for fd in (1, 2) if os.isatty(fd)]

    def called(number: int) -> None:
        if number == signal.SIGHUP:
            _leave(terminals)
        handler(number)

    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            loop.add_signal_handler(number, called, number)


def _leave(terminals: list[int]) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for fd in terminals:
        os.dup2(nowhere, fd)
    os.close(nowhere)


async def first_end(work: "asyncio.Future[int]", watching: "asyncio.Future[None]") -> int:
    """The answer of `work`, unless `watching` ends first: then its error.

    Raises:
        asyncio.CancelledError: `work` was cancelled.
    """
    both: set[asyncio.Future[Any]] = {work, watching}
    await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
    if not work.done():
        work.cancel()
        await asyncio.wait({work}, timeout=CANCEL_S)
        watching.result()
    watching.cancel()
    return work.result()


class Deadman:
    """Ends the process once `beat` has not been called for `limit_s`: its event loop stands still in a call
    that nothing interrupts (a `ray.put` whose raylet hangs), where neither deadlines nor signals reach it.
    Time in which the whole process was stopped does not count."""

    def __init__(self, limit_s: float, say: Callable[[str], Any]) -> None:
        self._limit_s = limit_s
        self._say = say
        self._still = 0
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._count, name="deadman", daemon=True)

    def beat(self) -> None:
        """The loop runs."""
        self._still = 0
        faulthandler.dump_traceback_later(STILL_S, file=sys.__stderr__ or 2)
        if not self._thread.is_alive():
            self._thread.start()

    def close(self) -> None:
        """Watch no more."""
        self._closed.set()
        faulthandler.cancel_dump_traceback_later()

    def _count(self) -> None:
        while not self._closed.wait(1.0):
            self._still += 1
            if self._still > self._limit_s:
                faulthandler.dump_traceback(file=sys.__stderr__ or 2)
                self._say(f"the driver stands still for {self._still} s (stacks above): it ends here")
                os._exit(FAILED)
