"""The policy's side of a run, which every method has: rollout workers and learner, and the sync between them.

Failure rule: rollout workers are replaceable (they hold nothing but weights), so one that dies, breaks in a
sync or fails while it is replaced is replaced, synced and asked again, at most `rollout.max_replacements`
times a run. Anything else that dies ends the run with its own error; the run resumes from its last
checkpoint. A worker that lives but samples from another distribution ends it too: a new one would as well.
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
from services.sampler_check import RESPONSE_TOKENS, bound, check_answers, check_requests


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
        self.syncs = 0
        self.replacements = 0
        self.sync_failures = 0
        """Broadcasts that some worker missed or broke; each was repeated with that worker replaced."""
        self.resident: dict[str, float] = {}
        """Resident MiB of the largest rollout worker (with its engine's processes) at the last sync, and of
        the largest scoring replica that answered last; they come with answers that travel anyway."""
        self._groups: list[TrainerGroup] = []
        self._mending = asyncio.Lock()
        self._compared = 0
        """How many workers had ever been created when all were last compared with the learner."""

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

    def groups(self) -> list[TrainerGroup]:
        """The training groups there are by now."""
        return self._groups

    def actors(self) -> dict[str, Any]:
        """Handles of the run's actors by name, as they are now."""
        workers = self.fleet.actors if self._groups else []
        named = {f"rollout worker {i}": worker for i, worker in enumerate(workers)}
        for group in self._groups:
            named |= group.actors()
        return named

    async def stop(self) -> None:
        """End what has an orderly end; the rest goes with the Ray job."""
        await asyncio.gather(*(group.stop() for group in self._groups))

    async def abort(self) -> list[str]:
        """End everything after a failure, whatever state it is in; returns what did not end within
        ABORT_S."""
        ended = await asyncio.gather(*self._aborting(), return_exceptions=True)
        return [str(error) for error in ended if isinstance(error, BaseException)]

    def _aborting(self) -> list[Awaitable[None]]:
        return [group.abort() for group in self._groups]

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

    async def _meet(self) -> None:
        """Join learner and fleet, and see that they compute the same, also once weights have gone from one to
        the other: before anything is trained. A resumed run sends those of its checkpoint (`load`).
        """
        await self._connect()
        while not await self._checked("as loaded"):
            pass
        if self.start_step == 0:
            await self.sync(self.policy_version)

    async def _connect(self) -> None:
        """Join learner and fleet in a transfer group; a worker that does not come is replaced first."""
        while True:
            answers = await self.learner.call(
                "connect",
                timeout_s=self.config.rollout.sync_timeout_s + 30,
                workers=self.fleet.actors,
                worlds=[self.config.rollout.tensor_parallel] * len(self.fleet.actors),
            )
            if "error" not in answers[0]:
                return
            await self._renew(answers[0]["replace"], answers[0]["error"])

    async def _sync(self, version: int | None) -> dict[str, float]:
        timeout = 2 * self.config.rollout.sync_timeout_s
        while True:
            answer = (await self.learner.call("sync", timeout_s=timeout, version=version))[0]
            if "error" in answer:
                self.sync_failures += 1
                await self._replace(answer["replace"], answer["error"])
                continue
            self.syncs += 1
            # A weight that stays behind shows with time: look again after 2, 4, 8 … syncs.
            due = self._compared < self.fleet.created or self.syncs.bit_count() == 1
            if due and not await self._checked("after a weight sync"):
                continue
            del answer["replace"]
            self.resident["rollout"] = answer.pop("worker_memory_mib")
            return answer

    async def _checked(self, when: str) -> bool:
        """Compare every worker with the learner; False when some did not answer, which are replaced.

        Raises:
            SamplerError: a worker samples from another distribution.
        """
        config, created = self.config, self.fleet.created
        requests = check_requests(self.splits.selection, self.renderer.encode, len(self.fleet.actors))
        sampling = {"max_tokens": min(RESPONSE_TOKENS, config.sampling.max_tokens)}
        try:
            answers = await self.fleet.sample(requests, sampling, 0)
        except FleetError as error:
            await self._replace(list(error.actors), str(error))
            return False
        timeout = config.learner.step_timeout_s
        told = await self.learner.call("response_logprobs", timeout_s=timeout, table=answers)
        version, logprobs = told[0]
        if pc.all(pc.equal(answers["policy_version"], version)).as_py():  # else an update came between
            check_answers(answers, logprobs, when, config, bound(config, self.plan.devices))
            self._compared = created
        return True

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
        """New workers in these places; those that do not come up are replaced in turn."""
        most = self.config.rollout.max_replacements
        while True:
            self.replacements += 1
            if self.replacements > most:
                raise RuntimeError(
                    f"rollout workers were replaced {most} times "
                    f"(rollout.max_replacements); the last failure: {failure}"
                )
            try:
                return await self.fleet.replace(workers)
            except FleetError as error:
                workers, failure = list(error.actors), str(error)


async def up(say: Callable[[str], None], what: str, starting: Awaitable[Any]) -> Any:
    """The answer of what is starting; says when it is there."""
    answer = await starting
    say(f"{what} ready")
    return answer
