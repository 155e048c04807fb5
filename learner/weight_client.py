"""Control side of a weight sync: vLLM's client protocol over Ray actors, with deadlines and names in the
errors.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import ray

RELEASE_S = 10.0
PING_S = 15.0
MIN_WAIT_S = 0.1  # beyond the deadline too, so that answers already given are taken
State = Literal["idle", "paused", "began", "updated"]


class WeightSyncError(RuntimeError):
    """A sync failed; the text names workers and tensors.

    failures: worker index -> reason. broken: workers that must be restarted, because they are gone or their
    update began and did not end. Workers in neither kept or got a whole set of weights and are usable
    (stale or current).
    """

    def __init__(
        self, message: str, failures: dict[int, str] | None = None, broken: Sequence[int] = ()
    ) -> None:
        super().__init__(message, failures, broken)
        self.failures = failures or {}
        self.broken = tuple(broken)

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(frozen=True)
class WorkerRef:
    """A rollout worker as the sender sees it: its number, its actor handle, and its engine's TP x PP."""

    index: int
    handle: Any
    world: int = 1


def rank_offsets(worlds: Sequence[int]) -> list[int]:
    """First rank of each worker in the transfer group: rank 0 is the sender, then worker after worker, TP x
    PP each.
    """
    offsets = [1]
    for world in worlds[:-1]:
        offsets.append(offsets[-1] + world)
    return offsets[: len(worlds)]


class WorkerClient:
    """vLLM's `VLLMWeightSyncClient` over Ray actors of RolloutWorker; what vLLM's own Ray client lacks is
    here.

    Each worker gets its own rank offset, every call has a deadline, errors name the worker, generation
    pauses before and resumes after, and the version is set. `failures` fills while a call is still running.
    """

    def __init__(self, workers: Sequence[WorkerRef], deadline_s: float) -> None:
        self.workers = tuple(workers)
        self.version = 0
        self.failures: dict[int, str] = {}
        self._deadline_s = deadline_s
        self._expires = 0.0
        self._state: dict[int, State] = {}
        self.reset()

    def reset(self, version: int = 0) -> None:
        """Begin a round: its deadline starts now."""
        self.version = version
        self.failures = {}
        self._state = {worker.index: "idle" for worker in self.workers}
        self._expires = time.monotonic() + self._deadline_s

    def ping(self) -> None:
        """Ask every worker's engine for a sign of life within PING_S, before any of them is made to wait for
        the others.
        """
        self._call("policy_version", self.workers, within_s=PING_S)
        self._raise("reaching the rollout workers")

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        offsets = rank_offsets([worker.world for worker in self.workers])
        infos = [init_info | {"rank_offset": offset} for offset in offsets]
        self._call("init_weight_transfer", self.workers, infos)
        self._raise("connecting the weight transfer")

    def start_weight_update(self) -> None:
        """Pause all, then start all; a second call in the same round does nothing."""
        if "began" in self._state.values():
            return
        self._call("pause", self.workers, state="paused")
        self._raise("pausing")
        for worker in self.workers:  # before the call: a start whose answer is lost may have happened
            self._state[worker.index] = "began"
        self._call("start_weight_update", self.workers)
        self._raise("starting the weight update")

    def update_weights(self, update_info: Any) -> None:
        reference = ray.put(update_info)
        self._call("update_weights", self.workers, [reference] * len(self.workers), state="updated")
        self._raise("updating weights")

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Finish the workers that got everything, and let them and those that never began generate again."""
        updated = self._in_state("updated")
        version = self.version if weight_version is None else int(weight_version)
        self._call("finish_weight_update", updated, [version] * len(updated), state="paused")
        self._call("resume", self._in_state("paused"), state="idle")
        self._raise("finishing the weight update")

    def release(self) -> None:
        """After a failure: bring the workers that hold a whole set of weights back to work, within
        RELEASE_S.
        """
        self._expires = max(self._expires, time.monotonic() + RELEASE_S)
        updated = self._in_state("updated")
        self._call("finish_weight_update", updated, [self.version] * len(updated), state="paused")
        self._call("resume", self._in_state("paused"), state="idle")

    def timings(self) -> dict[str, float]:
        """The workers' sync_timings, the slowest (and largest) worker's for each key."""
        answers = self._call("sync_timings", self.workers)
        self._raise("reading timings")
        return {key: max(answer[key] for answer in answers) for key in answers[0]}

    def remaining(self) -> float:
        """Seconds of the round's deadline that are left, not below MIN_WAIT_S."""
        return max(MIN_WAIT_S, self._expires - time.monotonic())

    def broken(self) -> list[int]:
        """Workers that must be restarted: gone, silent, or with an update that began and did not end."""
        return sorted(
            worker.index
            for worker in self.workers
            if worker.index in self.failures or self._state[worker.index] in ("began", "updated")
        )

    def _in_state(self, state: str) -> list[WorkerRef]:
        return [
            worker
            for worker in self.workers
            if self._state[worker.index] == state and worker.index not in self.failures
        ]

    def _call(
        self,
        method: str,
        workers: Sequence[WorkerRef],
        arguments: Sequence[Any] | None = None,
        state: State | None = None,
        within_s: float = math.inf,
    ) -> list[Any]:
        """Call one method on all workers at once; each success moves the worker to `state`, each failure is
        noted. The round's deadline holds, and `within_s` where that is shorter.
        """
        expires = min(self._expires, time.monotonic() + within_s)
        started = time.monotonic()
        answers: dict[int, Any] = {}
        pending: dict[Any, WorkerRef] = {}
        for position, worker in enumerate(workers):
            given = () if arguments is None else (arguments[position],)
            pending[getattr(worker.handle, method).remote(*given)] = worker
        while pending:
            left = max(MIN_WAIT_S, expires - time.monotonic())
            done, _ = ray.wait(list(pending), num_returns=1, timeout=left)
            if not done:
                waited = time.monotonic() - started
                for worker in pending.values():
                    self.failures[worker.index] = f"no answer to {method} within {waited:.1f} s"
                break
            worker = pending.pop(done[0])
            try:
                answers[worker.index] = ray.get(done[0], timeout=left)
            except ray.exceptions.RayTaskError as error:
                self.failures[worker.index] = str(error.cause)
            except ray.exceptions.RayError as error:
                self.failures[worker.index] = f"{type(error).__name__} in {method}: {_first_line(error)}"
            else:
                if state is not None:
                    self._state[worker.index] = state
        return [answers.get(worker.index) for worker in workers]

    def _raise(self, what: str) -> None:
        if self.failures:
            reasons = "; ".join(f"rollout worker {i}: {why}" for i, why in sorted(self.failures.items()))
            raise WeightSyncError(f"{what} failed: {reasons}", dict(self.failures))


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "")
