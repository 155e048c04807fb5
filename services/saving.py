"""When checkpoints are written, and what becomes of a run when one cannot be.

Invariant: a checkpoint that fails (a full disk, a storage that is away) leaves nothing behind, is said, and
is tried again after one step, two more, four more and so on, and whenever the next one is due; training goes
on. Only the one that a stopping run promises must succeed.

    if saver.due(step):
        await saver.save(step, write)          # write(folder) returns the state
"""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from services.checkpoint import CheckpointError, Checkpoints


class Saver:
    """Writes the checkpoints of one run, every `every` steps (0: only when told to)."""

    def __init__(self, checkpoints: Checkpoints, every: int, say: Callable[[str], None]) -> None:
        self._checkpoints = checkpoints
        self._every = every
        self._say = say
        self._failures = 0
        self._again: int | None = None
        """Step after which a failed one is tried again."""

    def due(self, step: int) -> bool:
        """Whether a checkpoint is to be written after `step`."""
        regular = self._every > 0 and step % self._every == 0
        return regular or (self._again is not None and step >= self._again)

    async def save(
        self, step: int, write: Callable[[Path], Awaitable[dict[str, Any]]], *, must: bool = False
    ) -> bool:
        """Write and seal one; whether it is there.

        Raises:
            CheckpointError: it `must` be, and could not be written.
        """
        try:
            state = await write(await asyncio.to_thread(self._checkpoints.begin, step))
            await asyncio.to_thread(self._checkpoints.commit, step, state)
        except (OSError, CheckpointError) as error:
            await asyncio.to_thread(self._checkpoints.discard, step)
            self._failed(step, str(error), must)
            return False
        self._failures, self._again = 0, None
        return True

    def _failed(self, step: int, reason: str, must: bool) -> None:
        if must:
            there = self._checkpoints.steps()
            last = f"the last one is of step {there[-1]}" if there else "there is none"
            raise CheckpointError(f"the checkpoint of step {step} could not be written: {reason}; {last}")
        self._again = step + 2**self._failures
        self._failures += 1
        self._say(
            f"the checkpoint of step {step} could not be written: {reason}; training goes on, and the next "
            f"try is after step {self._again}"
        )


async def all_written(*writing: Awaitable[Any]) -> None:
    """Wait for every part of a checkpoint, whose answers are reasons why it could not be written, by rank, or
    empty.

    Raises:
        CheckpointError: a part could not be written; only once no part is being written any more.
    """
    problems: list[str] = []
    for answer in await asyncio.gather(*writing, return_exceptions=True):
        if isinstance(answer, OSError):
            problems.append(str(answer))
        elif isinstance(answer, BaseException):
            raise answer
        else:
            problems += filter(None, answer or ())
    if problems:
        raise CheckpointError("; ".join(dict.fromkeys(problems)))
