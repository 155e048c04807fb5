"""All processes of a run behind the words the controller uses: generate, score, learn, sync, discriminate.

Failure rule: rollout workers are replaceable (they hold nothing but weights), so one that dies or breaks in a
sync is replaced, synced and asked again, at most `rollout.max_replacements` times a run. Anything else that
dies ends the run with its own error; the run resumes from its last checkpoint.
"""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray

from discriminator.buffer import ReplayBuffer
from discriminator.rank import DiscriminatorRank
from discriminator.versions import VersionStore
from learner.rank import LearnerRank
from learner.trainer import GroupPlan, TrainerGroup
from rollout.data import DataSplits
from rollout.prompts import PromptSource, evaluation_requests
from rollout.templates import Renderer
from services.answers import first_prompts, human_answers
from services.config import Config
from services.demonstrations import Demonstrations
from services.fleet import FleetError, RolloutFleet
from services.plan import ResourcePlan
from services.reward_inputs import RewardInputs
from services.scoring import deploy
from services.waiting import within

BUFFER_S = 120.0


class System:
    """Rollout fleet, learner, discriminator, replay buffer, version store and scoring service of one run."""

    fleet: RolloutFleet
    learner: TrainerGroup
    discriminator: TrainerGroup
    buffer: Any
    versions: Any
    scorer: Any
    policy_version: int
    """Version of the weights the learner holds."""
    disc_version: int
    """Newest published discriminator version."""

    def __init__(self, config: Config, plan: ResourcePlan, splits: DataSplits, renderer: Renderer) -> None:
        self.config = config
        self.plan = plan
        self.splits = splits
        self.renderer = renderer
        self.policy_version = 0
        self.disc_version = 0
        self.replacements = 0
        self.app = f"rlgaf-{config.run.name}"
        self.scorer: Any = None
        self._groups: list[TrainerGroup] = []
        self.prompts = PromptSource(
            splits.rollout_prompts(), renderer.encode, config.sampling.group_size, config.run.seed
        )
        self.demonstrations = Demonstrations(
            splits, renderer.tokenizer, config.discriminator.canonical, config.sampling.max_tokens
        )
        self.reward_inputs = RewardInputs(config.discriminator, self.demonstrations.train, self.score)
        self._mending = asyncio.Lock()

    # Life

    async def start(self, say: Callable[[str], None]) -> None:
        """Bring everything up; `say` is told what is being waited for."""
        config = self.config
        say(f"starting {config.rollout.workers} rollout worker(s), learner, discriminator and scoring")
        self.train_demonstrations = ray.put(self.demonstrations.train)
        self.fleet = RolloutFleet(config, self.plan)
        self.buffer = ray.remote(ReplayBuffer).options(num_cpus=0).remote(config.discriminator.buffer)
        # While a batch is scored, as many turns may publish as the lag allows.
        self.versions = ray.remote(VersionStore).options(num_cpus=0).remote(config.run.max_disc_lag + 2)
        self.learner = TrainerGroup(
            "learner", LearnerRank, self._learner_config(), self._group_plan("learner")
        )
        self.discriminator = TrainerGroup(
            "discriminator",
            DiscriminatorRank,
            self._discriminator_config(),
            self._group_plan("discriminator"),
        )

        self._groups = [self.learner, self.discriminator]

        async def up(what: str, starting: Any) -> Any:
            answer = await starting
            say(f"{what} ready")
            return answer

        _, _, _, self.scorer = await asyncio.gather(
            up("rollout", self.fleet.start()),
            up("learner", self.learner.start()),
            up("discriminator", self.discriminator.start()),
            up(
                "scoring",
                within(config.discriminator.start_timeout_s, "scoring", asyncio.to_thread(self._deploy)),
            ),
        )
        await self._connect()

    def _learner_config(self) -> dict[str, Any]:
        config = self.config
        updates = config.run.steps * config.learner.epochs * config.learner.minibatches
        settled = {
            "threads": self.plan.role("learner").threads,
            "device": self.plan.devices["learner"],
            "schedule_steps": config.learner.schedule_steps or updates,
            "gamma": config.gamma,
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

    def _discriminator_config(self) -> dict[str, Any]:
        config = self.config
        settled = {
            "threads": self.plan.role("discriminator").threads,
            "device": self.plan.devices["discriminator"],
            "schedule_steps": config.discriminator.schedule_steps or config.run.steps,
        }
        return {
            "config": config.discriminator.model_copy(update=settled),
            "model": config.discriminator.model or config.policy.model,
            "model_dtype": config.policy.dtype,
            "versions": self.versions,
            "publish_timeout_s": config.discriminator.scoring.timeout_s,
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
        )

    def _deploy(self) -> Any:
        role, settings = self.plan.role("scoring"), self._discriminator_config()
        config = settings["config"]
        if self.config.run.exact:
            # Which groups meet in a batch is a matter of timing, and rounding depends on a product's shape.
            alone = config.scoring.model_copy(update={"max_batch_groups": 1})
            config = config.model_copy(update={"scoring": alone})
        return deploy(
            self.app,
            config,
            settings["model"],
            self.config.policy.dtype,
            self.versions,
            threads=role.threads,
            use_gpu=role.gpus > 0,
        )

    async def stop(self) -> None:
        """End what has an orderly end; the rest goes with the Ray job."""
        from ray import serve

        await asyncio.gather(*(group.stop() for group in self._groups))
        await asyncio.to_thread(serve.delete, self.app)

    async def abort(self) -> None:
        """End everything after a failure, whatever state it is in."""
        from ray import serve

        await asyncio.gather(*(group.abort() for group in self._groups))
        if self.scorer is not None:
            await asyncio.to_thread(serve.delete, self.app)

    # The controller's words

    async def generate(self, requests: pa.Table, min_version: int) -> pa.Table:
        """Trajectories for the requests; a worker that dies is replaced and the batch asked for again.

        Seeds are kept in exact mode only: with them vLLM draws every sequence's token by itself, which is
        slower.
        """
        if not self.config.run.exact:
            unseeded = pa.nulls(requests.num_rows, pa.int64())
            requests = requests.set_column(
                requests.column_names.index("seed"), requests.schema.field("seed"), unseeded
            )
        return await self._asked(lambda: self.fleet.generate(requests, min_version))

    async def score(self, batch: pa.Table, version: int) -> list[dict[str, Any]]:
        """Per-token scores and spans for every row of `batch`, each group judged by `version`."""
        groups: dict[str, list[int]] = {}
        for row, group in enumerate(batch["group_id"].to_pylist()):
            groups.setdefault(group, []).append(row)
        prompts, texts = batch["prompt_text"].to_pylist(), batch["response_text"].to_pylist()
        complete = [reason == "stop" for reason in batch["finish_reason"].to_pylist()]
        timeout = self.config.discriminator.scoring.timeout_s

        async def one(rows: list[int]) -> list[dict[str, Any]]:
            call = self.scorer.score.remote(
                version, prompts[rows[0]], [(texts[i], complete[i]) for i in rows]
            )
            return await within(timeout, "scoring a group", call)

        answers = await asyncio.gather(*(one(rows) for rows in groups.values()))
        scores: list[dict[str, Any]] = [{}] * batch.num_rows
        for rows, scored in zip(groups.values(), answers, strict=True):
            for row, item in zip(rows, scored, strict=True):
                scores[row] = item
        return scores

    async def learn(self, scored: pa.Table, step: int, lr_factor: float) -> list[dict[str, float]]:
        """One policy update, its learning rate scaled by `lr_factor`; metrics by rank."""
        timeout = self.config.learner.step_timeout_s
        return await self.learner.call(
            "train_step", timeout_s=timeout, table=ray.put(scored), step=step, lr_factor=lr_factor
        )

    async def sync(self, version: int) -> dict[str, float]:
        """Broadcast the policy as `version` to every rollout worker; returns timings of sender and slowest
        worker.
        """
        async with self._mending:
            self.policy_version = version
            return await self._sync()

    async def discriminate(self, batch: pa.Table, step: int) -> dict[str, Any]:
        """The discriminator's turn of `step` on these rollouts and a replay; publishes version step + 1."""
        settings, seed = self.config.discriminator, self.config.run.seed
        await within(BUFFER_S, "adding to the replay buffer", self.buffer.add.remote(batch, step))
        wanted = settings.batch_size * settings.steps_per_policy_step
        rollouts = await within(
            BUFFER_S, "sampling the replay buffer", self.buffer.sample.remote(wanted, step=step, seed=seed)
        )
        metrics = await self.discriminator.call(
            "turn",
            timeout_s=settings.step_timeout_s,
            rollouts=ray.put(rollouts),
            demonstrations=self.train_demonstrations,
            fresh=ray.put(batch),
            heldout=ray.put(self.demonstrations.heldout),
            step=step,
        )
        self.disc_version = step + 1
        return {
            **metrics[0],
            "buffer": await within(BUFFER_S, "asking the replay buffer", self.buffer.stats.remote()),
        }

    # Before, between and after

    async def warm_up(self, say: Callable[[str], None]) -> dict[str, Any]:
        """Train the discriminator on base rollouts until it is good enough, and publish version 0."""
        settings, run = self.config.discriminator, self.config.run
        source = PromptSource(
            self.splits.rollout_prompts(), self.renderer.encode, self.config.sampling.group_size, run.seed + 1
        )
        wanted = settings.batch_size * min(settings.warmup_max_steps, 16) + settings.heldout_size
        prompts = max(1, min(len(source), -(-wanted // self.config.sampling.group_size)))
        say(f"warming the discriminator up on {prompts * self.config.sampling.group_size} base rollouts")
        rollouts = await self.generate(source.next(prompts, 0), 0)
        apart = min(settings.heldout_size, rollouts.num_rows // 4)
        metrics = await self.discriminator.call(
            "warm_up",
            timeout_s=settings.step_timeout_s,
            rollouts=ray.put(rollouts.slice(apart)),
            demonstrations=self.train_demonstrations,
            heldout=ray.put(self.demonstrations.heldout),
            heldout_rollouts=ray.put(rollouts.slice(0, apart)),
        )
        self.disc_version = 0
        return metrics[0]

    async def base_samples(self, count: int) -> pa.Table:
        """About `count` base responses over the training prompts, for the audit."""
        prompts = self.splits.rollout_prompts()
        each = -(-count // prompts.num_rows)
        source = PromptSource(prompts, self.renderer.encode, each, self.config.run.seed + 2)
        return await self.generate(source.next(-(-count // each), 0), 0)

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
        sampling = {"temperature": settings.temperature, "top_p": settings.top_p}
        return await self._asked(lambda: self.fleet.sample(requests, sampling))

    async def human_nll(self, split: pa.Table, prompts: int) -> float:
        """Mean NLL of the human answers to the same prompts under the learner's policy, nats per token."""
        table = human_answers(first_prompts(split, prompts), self.renderer, self.config.sampling.max_tokens)
        timeout = self.config.learner.step_timeout_s
        return (await self.learner.call("mean_nll", timeout_s=timeout, table=ray.put(table)))[0]

    async def export(self, folder: Path) -> None:
        """Write the policy as a plain Hugging Face folder."""
        await self.learner.call("export", timeout_s=self.config.learner.step_timeout_s, folder=str(folder))

    async def save(self, folder: Path) -> dict[str, Any]:
        """Write every process's state into `folder`; returns what belongs into the checkpoint's own state."""
        timeout = self.config.learner.step_timeout_s
        await asyncio.gather(
            self.learner.call("save", timeout_s=timeout, folder=str(folder / "learner")),
            self.discriminator.call("save", timeout_s=timeout, folder=str(folder / "discriminator")),
            within(
                BUFFER_S, "saving the replay buffer", self.buffer.dump.remote(str(folder / "buffer.parquet"))
            ),
        )
        return {"policy_version": self.policy_version, "disc_version": self.disc_version}

    async def load(self, folder: Path, state: dict[str, Any]) -> None:
        """Continue from `save`: the learner's weights go out to the workers, the discriminator's to the
        store.
        """
        timeout = self.config.learner.step_timeout_s
        self.policy_version, self.disc_version = state["policy_version"], state["disc_version"]
        await asyncio.gather(
            self.learner.call("load", timeout_s=timeout, folder=str(folder / "learner")),
            self.discriminator.call(
                "load", timeout_s=timeout, folder=str(folder / "discriminator"), version=self.disc_version
            ),
            within(
                BUFFER_S, "loading the replay buffer", self.buffer.load.remote(str(folder / "buffer.parquet"))
            ),
        )
        await self.sync(self.policy_version)

    async def memory(self) -> dict[str, float]:
        """Resident memory by process in MiB."""
        found: dict[str, float] = {}
        for group in self._groups:
            for rank, memory in enumerate(await group.call("memory", timeout_s=30.0)):
                found |= {f"{group.role}_{rank}_{name}": value for name, value in memory.items()}
        return found

    # Weight sync and repair

    async def _connect(self) -> None:
        await self.learner.call(
            "connect",
            timeout_s=self.config.rollout.sync_timeout_s + 30,
            workers=self.fleet.actors,
            worlds=[info["world_size"] for info in self.fleet.info],
        )

    async def _sync(self) -> dict[str, float]:
        timeout = 2 * self.config.rollout.sync_timeout_s
        while True:
            answer = (await self.learner.call("sync", timeout_s=timeout, version=self.policy_version))[0]
            if "error" not in answer:
                del answer["replace"]
                return answer
            await self._replace(FleetError(answer["error"], answer["replace"]))

    async def _asked(self, ask: Callable[[], Awaitable[pa.Table]]) -> pa.Table:
        """The fleet's answer; while workers die over it they are replaced and all are asked again."""
        while True:
            try:
                return await ask()
            except FleetError as error:
                await self._mend(error)

    async def _mend(self, error: FleetError) -> None:
        """Replace failed workers and bring them up to the current version."""
        async with self._mending:
            await self._replace(error)
            await self._sync()

    async def _replace(self, error: FleetError) -> None:
        self.replacements += 1
        if self.replacements > self.config.rollout.max_replacements:
            raise RuntimeError(
                f"rollout workers were replaced {self.config.rollout.max_replacements} times "
                f"(rollout.max_replacements); the last failure: {error}"
            ) from error
        await self.fleet.replace(error.workers)
        await self._connect()
