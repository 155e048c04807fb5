"""Who of a run's processes is alive, whatever the loop waits for.

Invariant: when a process dies without which the run cannot go on, `look` raises within EVERY_S + ANSWER_S,
which is less than ten seconds, also while nobody waits for that process. Silence ends nothing, because a
process may be busy: the deadline of what it was asked for does. There is therefore no way from silent to
dead; a silent process is named once, with the stacks of its threads, and again only after it has answered.

    signs = LifeSigns(system.actors, system.groups, say, folder)
    watching = asyncio.create_task(signs.watch())   # raises DeadProcess
    await signs.look()                              # now
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ray.exceptions import RayError

from services.last_words import Process, Words, last_words, processes
from services.waiting import resolved, within

EVERY_S = 2.0
ANSWER_S = 5.0
SILENT_S = 60.0
WORDS_S = 8.0
STACKS_FILE = "stacks.txt"
LAST_WORDS = "last-words.txt"
VITAL = {"RayTrainWorker", "Mailbox", "ReplayBuffer", "VersionStore"}
REPLACEABLE = {"RolloutWorker": "it is replaced when it is needed"}
"""What else dies is told; Serve's replicas and their like come back by themselves."""
ON_PURPOSE = "ray.kill"
RAY = "Ray's table of actors"


class DeadProcess(RuntimeError):
    """A process without which the run cannot go on has died; the message names it and the cause."""


class Group(Protocol):
    """A worker group that may end by itself (`learner.trainer.TrainerGroup`)."""

    def ended_by(self) -> str:
        """Empty while it runs."""


class Roll:
    """What is known of each process, and what of it is news. Pure: time comes from `clock`."""

    def __init__(self, clock: Callable[[], float], silent_s: float = SILENT_S) -> None:
        self._clock = clock
        self._silent_s = silent_s
        self._asked: dict[str, float] = {}
        """Since when a process owes an answer."""
        self._named: set[str] = set()
        self._buried: set[str] = set()

    def asked(self, name: str) -> None:
        """A question is out; an earlier one that is still open keeps its time."""
        self._asked.setdefault(name, self._clock())

    def answered(self, name: str) -> None:
        """It lives, or its death is told by other means."""
        self._asked.pop(name, None)
        self._named.discard(name)

    def newly_silent(self) -> dict[str, float]:
        """Names and seconds of those that have owed an answer for too long; each once a silence."""
        owed = {name: self._clock() - since for name, since in self._asked.items()}
        news = {name: s for name, s in owed.items() if s >= self._silent_s and name not in self._named}
        self._named |= news.keys()
        return news

    def newly_dead(self, table: Iterable[Process]) -> list[Process]:
        """Those that have died since the last time, but for those that were killed on purpose."""
        news = [process for process in table if process.dead and process.id not in self._buried]
        self._buried |= {process.id for process in news}
        return [process for process in news if ON_PURPOSE not in process.cause]


class LifeSigns:
    """Watches the processes of one run.

    Args:
        actors: handles of the run's actors by name, as they are now.
        groups: the worker groups.
        say: takes a line for the console.
        folder: where the stacks of silent processes are written.
        table: Ray's table of the run's actors; blocks.
    """

    def __init__(
        self,
        actors: Callable[[], Mapping[str, Any]],
        groups: Callable[[], Sequence[Group]],
        say: Callable[[str], None],
        folder: Path,
        table: Callable[[], list[Process]] = processes,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._actors = actors
        self._groups = groups
        self._say = say
        self._folder = folder
        self._read_table = table
        self._roll = Roll(clock)
        self._questions: dict[str, asyncio.Task[None]] = {}
        self._dead: DeadProcess | None = None
        self._ending = False
        self.up = False
        """Whether all processes have started; before, they may be too busy to answer."""

    async def watch(self, beat: Callable[[], None]) -> None:
        """Look again and again, `beat` before each time. Raises DeadProcess."""
        while True:
            beat()
            await self.look()
            await asyncio.sleep(EVERY_S)

    def expect_ends(self) -> None:
        """Whatever dies from here on dies because the run ends."""
        self._ending = True

    async def look(self) -> None:
        """Raise DeadProcess after a death, and say who is silent. Takes ANSWER_S at most, but for stacks."""
        table = await self._table()
        if self._ending:
            return
        ends = [*self._deaths(table), *filter(None, (group.ended_by() for group in self._groups()))]
        if ends and self._dead is None:
            self._dead = DeadProcess("\n".join(ends))
        if self._dead is not None:
            raise self._dead
        if self.up:
            self._ask()
        for name, seconds in self._roll.newly_silent().items():
            where = await self._write_stacks(name, table)
            self._say(f"{name} has not answered for {seconds:.0f} s; {where}")

    async def unanswering(self) -> list[str]:
        """Names of those that do not answer within ANSWER_S, asked now. Raises DeadProcess."""
        await self.look()
        self._ask()
        await asyncio.wait(self._questions.values(), timeout=ANSWER_S)
        return [name for name, question in self._questions.items() if not question.done()]

    async def _table(self) -> list[Process]:
        self._roll.asked(RAY)
        try:
            table: list[Process] = await within(ANSWER_S, RAY, asyncio.to_thread(self._read_table))
        except (RuntimeError, OSError, RayError):  # `newly_silent` will say so
            return []
        self._roll.answered(RAY)
        return table

    def _deaths(self, table: Sequence[Process]) -> list[str]:
        """New deaths that end the run; the others are only told."""
        ends = [f"Ray's own {kind} ended; its logs are in Ray's session folder" for kind in _dead_ray()]
        for process in self._roll.newly_dead(table):
            what = f"{self.name(process)} (process {process.pid}) died: {process.cause}"
            if process.kind in VITAL:
                ends.append(what)
            else:
                self._say("; ".join(filter(None, [what, REPLACEABLE.get(process.kind, "")])))
        return ends

    def name(self, process: Process) -> str:
        """The run's own name of a process, or its class."""
        names = {actor._actor_id.hex(): name for name, actor in self._actors().items()}
        return names.get(process.id, process.kind)

    def _ask(self) -> None:
        for name, actor in self._actors().items():
            if name not in self._questions or self._questions[name].done():
                self._roll.asked(name)
                self._questions[name] = asyncio.create_task(self._question(name, actor))

    async def _question(self, name: str, actor: Any) -> None:
        with contextlib.suppress(RayError):  # dead: the table tells
            await resolved(actor.__ray_ready__.remote())
        self._roll.answered(name)

    async def _write_stacks(self, name: str, table: Sequence[Process]) -> str:
        asked = [process for process in table if not process.dead and self.name(process) == name]
        try:
            reading = asyncio.to_thread(last_words, asked)
            found = await within(WORDS_S, "reading its stacks", reading)
            with (self._folder / STACKS_FILE).open("a") as file:
                file.writelines(self.text(process, found.get(process.id)) for process in asked)
        except (RuntimeError, OSError, RayError) as failed:  # no reason to end a run
            return f"where it stands is not known: {failed}"
        return f"where it stands: {self._folder / STACKS_FILE}"

    async def post_mortem(self, error: BaseException) -> str:
        """What those processes said last that died, hang or are named in the error, for the console; what all
        said is written to LAST_WORDS."""
        try:
            table = await self._table()
            found = await within(WORDS_S, "reading the processes' logs", asyncio.to_thread(last_words, table))
            texts = {process: self.text(process, found.get(process.id)) for process in table}
            (self._folder / LAST_WORDS).write_text("".join(texts.values()))
        except (RuntimeError, OSError, RayError) as failed:  # the run's own error has been said already
            return f"what its processes said last is not known: {failed}"
        guilty = [text for process, text in texts.items() if self._suspect(process, found, str(error))]
        return "".join([*guilty, f"what all processes said last: {self._folder / LAST_WORDS}"])

    def _suspect(self, process: Process, found: Mapping[str, Words], error: str) -> bool:
        if ON_PURPOSE in process.cause:
            return False
        stopped = process.id in found and found[process.id].state == "stopped"
        return process.dead or stopped or self.name(process) in error

    def text(self, process: Process, said: Words | None) -> str:
        """A process's last words under its name."""
        head = f"== {self.name(process)}: {process.kind}, process {process.pid} on node {process.node[:8]}, "
        if said is None:
            return f"{head}{process.cause or 'its node did not answer'}\n"
        state = "dead" if process.dead else said.state
        return f"{head}{state}\n{process.cause}\n{said.log}\n{said.stacks}\n"


def _dead_ray() -> list[str]:
    """Kinds of those processes of a Ray of this driver's own that have ended."""
    from ray._private.worker import _global_node

    return [kind for kind, _ in _global_node.dead_processes()] if _global_node is not None else []
