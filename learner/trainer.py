"""A training role (learner or discriminator) as a Ray Train worker group driven by commands.

Protocol: `TorchTrainer.fit()` runs in a thread of its own; every rank builds its handler and then asks the
group's `Mailbox` actor for commands, in order. A command runs on all ranks (they share collectives) and is
done when all have replied. A command carries a number; a rank that sees a number again sends its first reply
again, so a repeated delivery is harmless. The group is never restarted in place: a rank that fails ends the
run with its own traceback, and the run resumes from its last checkpoint, so there is one recovery path
instead of two.

    group = TrainerGroup("learner", build_rank, build_config, plan)
    await group.start()
    metrics = await group.call("train_step", timeout_s=600, table=ref)
    await group.stop()
"""

import asyncio
import math
import os
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray

from learner.environment import worker_environment
from rollout.stacks import show_stacks_on_signal

POLL_S = 20.0
FETCH_S = 300.0
"""Deadline of a table's way to a rank."""
TELL_S = 60.0
"""Deadline of a rank's word to its mailbox."""
ABORT_S = 3.0
# Ray Train's controller polls its ranks only to see them die; what they do is seen through the mailbox. Its
# preemption watcher has nobody to tell.
TRAIN_CONTROLLER = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "2", "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}


class RankError(RuntimeError):
    """A command failed on a rank, or the worker group died; the message names role, rank and command."""


@dataclass(frozen=True)
class GroupPlan:
    """Resources of one training role. Threads are torch intra-op threads per rank."""

    ranks: int
    cpus_per_rank: float
    use_gpu: bool
    threads: int
    storage: str
    start_timeout_s: float
    step_timeout_s: float
    """Deadline of every collective of the ranks."""


class Mailbox:
    """Async Ray actor between the controller and one group's ranks. Holds only the command in progress."""

    def __init__(self, ranks: int) -> None:
        show_stacks_on_signal()
        self.ranks = ranks
        self.number = 0
        self.command: tuple[int, str, dict[str, Any]] | None = None
        self.replies: dict[int, tuple[bool, Any]] = {}
        self.ready: dict[int, Any] = {}
        self.changed = asyncio.Condition()

    async def call(self, method: str, payload: dict[str, Any]) -> list[tuple[bool, Any]]:
        """Run a command on all ranks; returns (ok, result or traceback) by rank, as soon as one failed or all
        replied.
        """
        async with self.changed:
            self.number += 1
            self.command = (self.number, method, payload)
            self.replies = {}
            self.changed.notify_all()
            await self.changed.wait_for(
                lambda: len(self.replies) == self.ranks or any(not ok for ok, _ in self.replies.values())
            )
            self.command = None
            return [self.replies.get(rank, (True, None)) for rank in range(self.ranks)]

    async def next(self, after: int) -> tuple[int, str, dict[str, Any]] | None:
        """The command in progress if its number is above `after`; None when `POLL_S` seconds brought none."""
        async with self.changed:
            fresh = lambda: self.command is not None and self.command[0] > after  # noqa: E731
            try:
                await asyncio.wait_for(self.changed.wait_for(fresh), POLL_S)
            except TimeoutError:
                return None
            return self.command

    async def reply(self, rank: int, number: int, ok: bool, result: Any) -> None:
        """Record a rank's result; a second reply to the same command changes nothing."""
        async with self.changed:
            if self.command is not None and number == self.command[0]:
                self.replies.setdefault(rank, (ok, result))
                self.changed.notify_all()

    async def set_ready(self, rank: int, info: Any) -> None:
        """A rank has built its handler."""
        async with self.changed:
            self.ready[rank] = info
            self.changed.notify_all()

    async def wait_ready(self) -> list[Any]:
        """What each rank reported once all ranks are up."""
        async with self.changed:
            await self.changed.wait_for(lambda: len(self.ready) == self.ranks)
            return [self.ready[rank] for rank in range(self.ranks)]


def _serve_rank(config: dict[str, Any]) -> None:
    """Runs on every rank inside Ray Train: build the handler, then execute commands until told to stop."""
    import torch

    context = ray.train.get_context()
    rank, ranks = context.get_world_rank(), context.get_world_size()
    mailbox = config["mailbox"]
    show_stacks_on_signal()
    torch.set_num_threads(config["threads"])
    build, build_config = ray.get(config["job"], timeout=TELL_S)
    handler = build(rank=rank, ranks=ranks, **build_config)
    me = {"pid": os.getpid(), "actor": ray.get_runtime_context().current_actor}
    ray.get(mailbox.set_ready.remote(rank, me), timeout=TELL_S)
    done, last = 0, (True, None)
    while True:
        command = ray.get(mailbox.next.remote(done), timeout=3 * POLL_S)
        if command is None:
            continue
        number, method, payload = command
        if method == "stop":
            ray.get(mailbox.reply.remote(rank, number, True, None), timeout=TELL_S)
            return
        try:
            last = (True, getattr(handler, method)(**payload))
        except Exception:  # told to the controller first, then raised: the group ends with it
            ray.get(mailbox.reply.remote(rank, number, False, traceback.format_exc()), timeout=TELL_S)
            raise
        done = number
        ray.get(mailbox.reply.remote(rank, number, *last), timeout=TELL_S)


class TrainerGroup:
    """Controller-side handle of one training role."""

    def __init__(
        self, role: str, build: Callable[..., Any], build_config: dict[str, Any], plan: GroupPlan
    ) -> None:
        self.role = role
        self.plan = plan
        self.mailbox: Any = (
            ray.remote(Mailbox).options(num_cpus=0, max_concurrency=4 + 4 * plan.ranks).remote(plan.ranks)
        )
        self._loop_config = {
            "mailbox": self.mailbox,
            # By reference: Ray Train's controller unpacks this too, and need not import what only ranks do.
            "job": ray.put((build, build_config)),
            "threads": plan.threads,
        }
        self._ended: asyncio.Future[None] | None = None
        self._thread: threading.Thread | None = None
        self._turn = asyncio.Lock()
        self.info: list[dict[str, Any]] = []

    async def start(self) -> None:
        """Bring the ranks up.

        Raises:
            RankError: a rank failed while building, or the deadline passed.
        """
        loop = asyncio.get_running_loop()
        self._ended = loop.create_future()
        self._thread = threading.Thread(
            target=self._fit, args=(loop, self._ended), daemon=True, name=f"rlgaf-fit-{self.role}"
        )
        self._thread.start()
        self.info = await self._wait(
            self.mailbox.wait_ready.remote(), self.plan.start_timeout_s, f"start of {self.plan.ranks} rank(s)"
        )

    async def call(self, method: str, *, timeout_s: float, **payload: Any) -> list[Any]:
        """Run `method(**payload)` of the handler on every rank; returns the results by rank. One command at a
        time.

        Raises:
            RankError: with the rank's traceback, or when `timeout_s` passed.
        """
        async with self._turn:
            replies = await self._wait(self.mailbox.call.remote(method, payload), timeout_s, method)
        for rank, (ok, result) in enumerate(replies):
            if not ok:
                raise RankError(f"{self.role} rank {rank} failed in {method}:\n{result}")
        return [result for _, result in replies]

    async def stop(self, timeout_s: float = 30.0) -> None:
        """End the ranks' loops and the fit thread; a group that is already down is left as it is."""
        if self._ended is None or self._ended.done():
            return
        try:
            await self.call("stop", timeout_s=timeout_s)
            await asyncio.wait_for(asyncio.shield(self._ended), timeout_s)
        finally:
            ray.kill(self.mailbox)

    def actors(self) -> dict[str, Any]:
        """Handles of the group's actors by name; its ranks' once they are ready."""
        ranks = {f"{self.role} rank {rank}": info["actor"] for rank, info in enumerate(self.info)}
        return {f"{self.role} mailbox": self.mailbox, **ranks}

    def ended_by(self) -> str:
        """What the worker group ended by, without being told to; empty while it runs."""
        if self._ended is None or not self._ended.done():
            return ""
        return f"{self.role} worker group went down: {self._ended.exception() or 'it ended by itself'}"

    async def abort(self) -> None:
        """End the group without its cooperation: its ranks and mailbox are killed, and with them goes the
        fit thread. Takes ABORT_S at most; a fit thread that is still there then must not see `ray.shutdown`,
        which it does not survive.
        """
        ending = asyncio.ensure_future(asyncio.to_thread(self._kill))
        await asyncio.wait({ending}, timeout=ABORT_S)
        if ending.done():
            ending.result()

    def _kill(self) -> None:
        for actor in self.actors().values():
            ray.kill(actor)
        if self._thread is not None:
            self._thread.join(ABORT_S)

    def _fit(self, loop: asyncio.AbstractEventLoop, ended: "asyncio.Future[None]") -> None:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer

        from learner.process_group import NodeTorchConfig

        for name, value in TRAIN_CONTROLLER.items():
            os.environ.setdefault(name, value)
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", f"{self.plan.start_timeout_s:g}")
        resources: dict[str, float] = {"CPU": self.plan.cpus_per_rank}
        if self.plan.use_gpu:
            resources["GPU"] = 1
        trainer = TorchTrainer(
            _serve_rank,
            train_loop_config=self._loop_config,
            scaling_config=ScalingConfig(
                num_workers=self.plan.ranks, use_gpu=self.plan.use_gpu, resources_per_worker=resources
            ),
            torch_config=NodeTorchConfig(timeout_s=math.ceil(self.plan.step_timeout_s)),
            run_config=RunConfig(
                name=self.role,
                storage_path=self.plan.storage,
                worker_runtime_env={"env_vars": worker_environment()},
                failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),  # type: ignore[call-arg]
            ),
        )
        error: BaseException | None = None
        try:
            trainer.fit()
        except Exception as caught:
            error = caught
        if not loop.is_closed():
            loop.call_soon_threadsafe(self._set_ended, ended, error)

    def _set_ended(self, ended: "asyncio.Future[None]", error: BaseException | None) -> None:
        if ended.done():
            return
        if error is None:
            ended.set_result(None)
        else:
            ended.set_exception(error)
            ended.exception()  # mark as retrieved: `_wait` reports it when somebody waits

    async def _wait(self, ref: "ray.ObjectRef", timeout_s: float, what: str) -> Any:
        assert self._ended is not None, "start() first"
        answer = asyncio.ensure_future(_as_coroutine(ref))
        try:
            await asyncio.wait({answer, self._ended}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        finally:  # a run that is stopped at once waits no more either
            if not answer.done():
                answer.cancel()
        if answer.done() and not answer.cancelled():
            return answer.result()
        if self._ended.done():
            reason = self._ended.exception() or "the worker group ended by itself"
            raise RankError(f"{self.role} worker group went down during {what}: {reason}")
        raise RankError(
            f"{self.role} did not finish {what} within {timeout_s:.0f} s; "
            f"raise {self.role}.step_timeout_s (or start_timeout_s) if the work is really that long"
        )


async def _as_coroutine(ref: "ray.ObjectRef") -> Any:
    return await ref
