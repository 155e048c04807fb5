"""The rollout fleet: N rollout workers behind one object.

Row i of a batch goes to worker i mod N, always, and results come back in order of their ids, so the same
batch gives the same table whatever finishes first. A worker that died or broke in a weight update is replaced
before the next batch (`replace`), and serves only after a sync: it comes up with the base weights, hence
STALE.
"""

import asyncio
from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from learner.environment import worker_environment
from rollout.worker import RolloutWorker
from services.config import Config
from services.plan import ResourcePlan
from services.waiting import resolved


class FleetError(RuntimeError):
    """Rollout workers failed; the message names them, `actors` holds those that did, by index. Who asked
    together learns of the same failure: by the time one of them acts, another worker may be in that place.
    """

    def __init__(self, message: str, actors: dict[int, Any]) -> None:
        super().__init__(message)
        self.actors = actors


class RolloutFleet:
    """All rollout workers of a run that begins, or goes on, at step `start`."""

    def __init__(self, config: Config, plan: ResourcePlan, start: int = 0) -> None:
        self.config = config
        self.start_step = start
        self.created = 0
        self.role = plan.role("rollout")
        self.device = plan.devices["rollout"]
        self.actors: list[Any] = [self._create(i) for i in range(self.role.count)]

    def _create(self, index: int) -> Any:
        config = self.config
        environment = worker_environment() | {
            "OMP_NUM_THREADS": str(self.role.threads),
            "TOKENIZERS_PARALLELISM": "false",
        }
        # Requests without a seed draw from the engine's generator: with a seed used before, a worker that
        # takes over or a resumed run would draw the noise of its beginning once more.
        seed = np.random.SeedSequence([config.run.seed, index, self.start_step, self.created])
        self.created += 1
        actor = ray.remote(RolloutWorker).options(
            num_cpus=self.role.cpus,
            num_gpus=self.role.gpus,
            max_concurrency=64,
            runtime_env={"env_vars": environment},
        )
        return actor.remote(
            index,
            config.rollout,
            config.policy,
            config.sampling,
            model=config.policy.model,
            device=self.device,
            max_model_len=config.max_model_len,
            threads=self.role.threads,
            seed=int(seed.generate_state(1)[0]),
            release_together=config.run.exact,
        )

    async def start(self) -> None:
        """Wait until every worker is up.

        Raises:
            FleetError: a worker failed or the deadline passed.
        """
        await self._started(range(len(self.actors)))

    async def replace(self, indices: list[int]) -> None:
        """Kill the named workers and bring fresh ones up in their place; they hold the base weights until
        synced.

        Raises:
            FleetError: some of them did not come up; the others did.
        """
        for i in indices:
            ray.kill(self.actors[i])
            self.actors[i] = self._create(i)
        await self._started(indices)

    async def _started(self, indices: Iterable[int]) -> None:
        await self._all("start", indices, self.config.rollout.start_timeout_s)

    async def generate(self, requests: pa.Table, min_version: int) -> pa.Table:
        """Trajectories for all requests, sorted by trajectory_id, from workers at `min_version` or newer."""
        shares = [
            requests.take(list(range(i, requests.num_rows, len(self.actors))))
            for i in range(len(self.actors))
        ]
        busy = [i for i, share in enumerate(shares) if share.num_rows]
        tables = await self._all(
            "generate", busy, self.config.rollout.generate_timeout_s, [(shares[i], min_version) for i in busy]
        )
        return _in_order(tables)

    async def sample(self, requests: pa.Table, sampling: dict[str, Any], min_version: int) -> pa.Table:
        """Like `generate`, with other sampling settings: for evaluations."""
        shares = [
            requests.take(list(range(i, requests.num_rows, len(self.actors))))
            for i in range(len(self.actors))
        ]
        busy = [i for i, share in enumerate(shares) if share.num_rows]
        tables = await self._all(
            "sample",
            busy,
            self.config.rollout.generate_timeout_s,
            [(shares[i], sampling, min_version) for i in busy],
        )
        return _in_order(tables)

    async def timings(self) -> list[dict[str, float]]:
        """Seconds of the last sync per worker: wire, checksum, load."""
        return await self._all("sync_timings", range(len(self.actors)), 30.0)

    async def _all(
        self, method: str, indices: Any, timeout_s: float, arguments: list[tuple[Any, ...]] | None = None
    ) -> list[Any]:
        asked = {i: self.actors[i] for i in indices}
        given = arguments or [()] * len(asked)
        calls = [
            asyncio.wait_for(resolved(getattr(actor, method).remote(*given[k])), timeout_s)
            for k, actor in enumerate(asked.values())
        ]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        failed = {i: a for i, a in zip(asked, answers, strict=True) if isinstance(a, BaseException)}
        if failed:
            reasons = []
            for i, answer in failed.items():
                if isinstance(answer, TimeoutError):
                    reasons.append(f"rollout worker {i} did not finish {method} within {timeout_s:.0f} s")
                else:
                    reasons.append(f"rollout worker {i} failed in {method}: {answer}")
            raise FleetError("; ".join(reasons), {i: asked[i] for i in failed})
        return answers


def _in_order(tables: list[pa.Table]) -> pa.Table:
    table = pa.concat_tables(tables)
    return table.sort_by([("group_id", "ascending"), ("sample", "ascending")]).combine_chunks()
