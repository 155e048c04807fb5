"""Waiting, always with a deadline and a message, and on threads that no end of a process waits for."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

T = TypeVar("T")
CALL = "rlgaf-call"
"""Name of the threads; that of `learner.trainer`'s begins like it."""


class DaemonThreads(ThreadPoolExecutor):
    """An event loop's threads for blocking calls (`asyncio.to_thread`). A call that hangs is left behind:
    neither the loop's end nor the interpreter's joins its thread."""

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> "Future[T]":
        """Start `fn` at once, on a thread of its own."""
        future: Future[T] = Future()
        future.set_running_or_notify_cancel()  # from here on whoever gives up does not cancel it
        call = partial(fn, *args, **kwargs)
        threading.Thread(target=_settle, args=(future, call), name=CALL, daemon=True).start()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Nothing: every thread ends with its call or with the process."""


def _settle(future: "Future[T]", call: Callable[[], T]) -> None:
    try:
        future.set_result(call())
    except BaseException as error:  # it belongs to whoever waits
        future.set_exception(error)


async def resolved(ref: Any) -> Any:
    """What an object reference or Serve response resolves to, as a coroutine that asyncio can time out."""
    return await ref


async def within(timeout_s: float, what: str, call: Any) -> Any:
    """The answer of `call`.

    Raises:
        RuntimeError: `what` did not finish within the deadline.
    """
    try:
        return await asyncio.wait_for(resolved(call), timeout_s)
    except TimeoutError:
        raise RuntimeError(f"{what} did not finish within {timeout_s:.0f} s") from None


def bounded(timeout_s: float, what: str, function: Callable[[], T]) -> T:
    """The answer of a blocking `function`; where it is late, its thread is left behind.

    Raises:
        TimeoutError: `what` did not finish within the deadline.
    """
    future = DaemonThreads().submit(function)
    try:
        return future.result(timeout_s)
    except TimeoutError:
        if future.done():
            raise
        raise TimeoutError(f"{what} did not finish within {timeout_s:g} s") from None


def left_behind() -> bool:
    """Whether a call still runs that nobody waits for: the interpreter's own end could hang with it."""
    return any(thread.name.startswith("rlgaf-") for thread in threading.enumerate())
