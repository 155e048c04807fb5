"""The policy's side of a run, which every method has: rollout workers and learner, and the sync between them.

Failure rule: rollout workers are replaceable (they hold nothing but weights), so one that dies or breaks in a
sync is replaced, synced and asked again, at most `rollout.max_replacements` times a run. Anything else that
dies ends the run with its own error; the run resumes from its last checkpoint.
"""

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray

from learner.rank import LearnerRank
from learner.trainer import GroupPlan, TrainerGroup
from rollout.data import DataSplits
from rollout.prompts import evaluation_requests
from rollout.templates import Renderer
from services.answers import HumanNLL, first_prompts, human_answers
from services.config import Config
from services.fleet import FleetError, RolloutFleet
from services.plan import ResourcePlan


class PolicySide:
    """Rollout fleet and learner of one run; the systems of the methods add what else they need."""

    fleet: RolloutFleet
    learner: TrainerGroup
    policy_version: int
    """Version of the last `sync`, which every worker has; the learner's weights may be newer."""

    def __init__(
        self, config: Config, plan: ResourcePlan, splits: DataSplits, renderer: Renderer, start: int = 0
    ) -> None:
        """`start`: the step that the run goes on from."""
        self.config = config
        self.plan = plan
        self.splits = splits
        self.renderer = renderer
        self.start_step = start
        self.policy_version = 0
        self.replacements = 0
        self.sync_failures = 0
        """Broadcasts that some worker missed or broke; each was repeated with that worker replaced."""
        self.resident: dict[str, float] = {}
        """Resident MiB of the largest rollout worker (with its engine's processes) at the last sync, and of
        the largest scoring replica that answered last; they come with answers that travel anyway."""
        self._groups: list[TrainerGroup] = []
        self._mending = asyncio.Lock()

    # Life

    def _start_policy(self, say: Callable[[str], None]) -> list[Awaitable[Any]]:
        """Create fleet and learner; what to wait for until they are up. `_connect` comes next."""
        self.fleet = RolloutFleet(self.config, self.plan, self.start_step)
        self.learner = TrainerGroup(
            "learner", LearnerRank, self._learner_config(), self._group_plan("learner")
        )
        self._groups.append(self.learner)
        return [up(say, "rollout", self.fleet.start()), up(say, "learner", self.learner.start())]

    def _learner_config(self) -> dict[str, Any]:
        config = self.config
        updates = config.run.steps * config.learner.epochs * config.learner.minibatches
        gumbel = config.learner.gumbel
        settled = {
            "threads": self.plan.role("learner").threads,
            "device": self.plan.devices["learner"],
            "schedule_steps": config.learner.schedule_steps or updates,
            "gamma": config.gamma,
            "gumbel": gumbel.model_copy(
                update={
                    "max_tokens": gumbel.max_tokens or config.sampling.max_tokens,
                    "tau_steps": gumbel.tau_steps or config.run.steps,
                }
            ),
        }
        if config.learner.normalise == "constant":
            settled["constant_length"] = config.learner.constant_length or config.sampling.max_tokens
        return {
            "learner": config.learner.model_copy(update=settled),
            "policy": config.policy,
            "rollout": config.rollout,
            "temperature": config.sampling.temperature,
            "seed": config.run.seed,
        }

    def _group_plan(self, name: str) -> GroupPlan:
        role = self.plan.role(name)
        section = self.config.learner if name == "learner" else self.config.discriminator
        return GroupPlan(
            ranks=role.count,
            cpus_per_rank=role.cpus,
            use_gpu=role.gpus > 0,
            threads=role.threads,
            storage=str(self.config.folder / "ray"),
            start_timeout_s=section.start_timeout_s,
            step_timeout_s=section.step_timeout_s,
        )

    async def stop(self) -> None:
        """End what has an orderly end; the rest goes with the Ray job."""
        await asyncio.gather(*(group.stop() for group in self._groups))

    async def abort(self) -> None:
        """End everything after a failure, whatever state it is in."""
        await asyncio.gather(*(group.abort() for group in self._groups))

    async def reload(self, folder: Path) -> None:
        """The learner's weights and optimizer from a checkpoint, under the present version."""
        timeout = self.config.learner.step_timeout_s
        await self.learner.call("load", timeout_s=timeout, folder=str(folder / "learner"))
        await self.sync(self.policy_version)

    # What the loops and the evaluation ask for

    async def generate(self, requests: pa.Table, min_version: int) -> pa.Table:
        """Trajectories for the requests; a worker that dies is replaced and the batch asked for again.

        A batch, for which `rollout.generate_timeout_s` holds, is a step's responses, or as many as the
        workers decode together if that is more: there can be far more base samples than a step has.

        Seeds are kept in exact mode only: with them vLLM draws every sequence's token by itself, which is
        slower.
        """
        if not self.config.run.exact:
            unseeded = pa.nulls(requests.num_rows, pa.int64())
            requests = requests.set_column(
                requests.column_names.index("seed"), requests.schema.field("seed"), unseeded
            )
        config = self.config
        most = max(
            config.run.prompts_per_step * config.sampling.group_size,
            config.rollout.workers * config.rollout.max_num_seqs,
        )
        rows = max(1, most // (pc.max(requests["n"]).as_py() or 1))
        batches = [requests.slice(row, rows) for row in range(0, requests.num_rows, rows)]
        tables = [await self._asked(partial(self.fleet.generate, batch, min_version)) for batch in batches]
        return pa.concat_tables(tables).combine_chunks()

    async def sync(self, version: int) -> dict[str, float]:
        """Broadcast the policy as `version` to every rollout worker; returns timings of sender and slowest
        worker.
        """
        async with self._mending:
            self.policy_version = version
            return await self._sync(version)

    async def sample(self, split: pa.Table, prompts: int, step: int) -> pa.Table:
        """Evaluation responses for up to `prompts` prompts of a split, as trajectories."""
        settings = self.config.evaluation
        requests = evaluation_requests(
            first_prompts(split, prompts),
            self.renderer.encode,
            settings.samples_per_prompt,
            step,
            settings.seed,
        )
        sampling = self.config.evaluation_sampling
        return await self._asked(lambda: self.fleet.sample(requests, sampling, self.policy_version))

    async def human_nll(self, split: pa.Table, prompts: int) -> HumanNLL:
        """How unlikely the human answers to the same prompts are to the learner's policy."""
        limit, canonical = self.config.sampling.max_tokens, self.config.discriminator.canonical
        table = human_answers(first_prompts(split, prompts), self.renderer, limit, canonical)
        timeout = self.config.learner.step_timeout_s
        nll = (await self.learner.call("response_nll", timeout_s=timeout, table=ray.put(table)))[0]
        return HumanNLL.of(nll, table)

    async def export(self, folder: Path) -> None:
        """Write the policy as a plain Hugging Face folder."""
        await self.learner.call("export", timeout_s=self.config.learner.step_timeout_s, folder=str(folder))

    async def memory(self) -> dict[str, float]:
        """Resident memory by process in MiB."""
        found = dict(self.resident)
        for group in self._groups:
            for rank, memory in enumerate(await group.call("memory", timeout_s=30.0)):
                found |= {f"{group.role}_{rank}_{name}": value for name, value in memory.items()}
        return found

    # Weight sync and repair

    async def _connect(self) -> None:
        """Join learner and fleet in a transfer group; a worker that does not come is replaced first."""
        while True:
            answers = await self.learner.call(
                "connect",
                timeout_s=self.config.rollout.sync_timeout_s + 30,
                workers=self.fleet.actors,
                worlds=[info["world_size"] for info in self.fleet.info],
            )
            if "error" not in answers[0]:
                return
            await self._renew(answers[0]["replace"], answers[0]["error"])

    async def _sync(self, version: int | None) -> dict[str, float]:
        timeout = 2 * self.config.rollout.sync_timeout_s
        while True:
            answer = (await self.learner.call("sync", timeout_s=timeout, version=version))[0]
            if "error" not in answer:
                del answer["replace"]
                self.resident["rollout"] = answer.pop("worker_memory_mib")
                return answer
            self.sync_failures += 1
            await self._replace(answer["replace"], answer["error"])

    async def _asked(self, ask: Callable[[], Awaitable[pa.Table]]) -> pa.Table:
        """The fleet's answer; while workers die over it they are replaced and all are asked again."""
        while True:
            async with self._mending:
                pass  # a worker in replacement has no engine yet, then the base's weights: it would fail
            try:
                return await ask()
            except FleetError as error:
                await self._mend(error)

    async def _mend(self, error: FleetError) -> None:
        """Replace the failed workers that still hold their places, and bring the new ones up to date."""
        async with self._mending:
            failed = [i for i, actor in error.actors.items() if self.fleet.actors[i] is actor]
            if failed:
                await self._replace(failed, str(error))
                await self._sync(None)

    async def _replace(self, workers: list[int], failure: str) -> None:
        """New workers in these places, joined with the learner; they hold the base's weights until a sync."""
        await self._renew(workers, failure)
        await self._connect()

    async def _renew(self, workers: list[int], failure: str) -> None:
        self.replacements += 1
        if self.replacements > self.config.rollout.max_replacements:
            raise RuntimeError(
                f"rollout workers were replaced {self.config.rollout.max_replacements} times "
                f"(rollout.max_replacements); the last failure: {failure}"
            )
        await self.fleet.replace(workers)


async def up(say: Callable[[str], None], what: str, starting: Awaitable[Any]) -> Any:
    """The answer of what is starting; says when it is there."""
    answer = await starting
    say(f"{what} ready")
    return answer
