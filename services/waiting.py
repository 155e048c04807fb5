"""Waiting for Ray, always with a deadline and a message."""

import asyncio
from typing import Any


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
