"""All processes of an adversarial run, or of one with a reward model, behind the words the controller uses:
generate, score, learn, sync, discriminate. Failures: see `services.policy_side`.
"""

import asyncio
import uuid
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray

from discriminator.buffer import ReplayBuffer
from discriminator.config import ScoringConfig
from discriminator.preferences import PreferenceSides, for_preferences, preference_sides
from discriminator.rank import DiscriminatorRank
from discriminator.soft import SoftJudge, soft_judge
from discriminator.versions import VersionStore
from learner.trainer import ABORT_S, TrainerGroup
from rollout.data import DataSplits
from rollout.prompts import PromptSource
from rollout.stacks import show_stacks_on_signal
from rollout.templates import Renderer
from services.budget import response_tokens
from services.config import Config
from services.demonstrations import Demonstrations
from services.endpoint import open_door
from services.plan import ResourcePlan
from services.policy_side import PolicySide, up
from services.reward_inputs import RewardInputs
from services.saving import all_written
from services.scoring import deploy
from services.waiting import within

STOP_S = 60.0

REQUESTS_PER_REPLICA = 2
"""Scoring requests sent at once, for each replica: while one is in the forward pass another is encoded."""


class System(PolicySide):
    """Rollout fleet, learner, discriminator, replay buffer, version store and scoring service of one run."""

    discriminator: TrainerGroup
    buffer: Any
    versions: Any
    scorer: Any
    disc_version: int
    """Newest published discriminator version."""

    def __init__(
        self, config: Config, plan: ResourcePlan, splits: DataSplits, renderer: Renderer, start: int = 0
    ) -> None:
        super().__init__(config, plan, splits, renderer, start)
        self.disc_version = 0
        # The only name that a run leaves on a cluster, where another may have the same `run.name`.
        self.app = f"rlgaf-{config.run.name}-{uuid.uuid4().hex[:12]}"
        self.scorer: Any = None
        self.door: tuple[Any, str] | None = None
        """The process that listens for requests from outside, which ends with this one, and its URL."""
        # A request's deadline counts from its sending, so no more are sent than a replica soon begins.
        self._in_flight = asyncio.Semaphore(REQUESTS_PER_REPLICA * self._scoring.replicas)
        self._deployed = False
        """Whether Serve may have the app already, or still."""
        self.prompts = PromptSource(
            splits.rollout_prompts(), renderer.encode, config.sampling.group_size, config.run.seed
        )
        self.demonstrations = Demonstrations(
            splits, renderer.tokenizer, config.discriminator.canonical, config.sampling.max_tokens
        )
        self.reward_inputs = RewardInputs(config.discriminator, self.demonstrations.train, self.score)

    # Life

    async def start(self, say: Callable[[str], None]) -> None:
        """Bring everything up; `say` is told what is being waited for."""
        config = self.config
        say(f"starting {config.rollout.workers} rollout worker(s), learner, discriminator and scoring")
        for note in self.demonstrations.notes():
            say(note)
        self.train_demonstrations = ray.put(self.demonstrations.train)
        # While a batch is scored, as many turns may publish as the lag allows.
        self.versions = ray.remote(VersionStore).options(num_cpus=0).remote(config.run.max_disc_lag + 2)
        policy = self._start_policy(say)
        self.buffer = ray.remote(ReplayBuffer).options(num_cpus=0).remote(config.discriminator.buffer)
        for actor in (self.versions, self.buffer):
            actor.__ray_call__.remote(_show_stacks)
        self.discriminator = TrainerGroup(
            "discriminator",
            DiscriminatorRank,
            self._discriminator_config(),
            self._group_plan("discriminator"),
        )
        self._groups.append(self.discriminator)
        self._deployed = True
        deployed = within(config.discriminator.start_timeout_s, "scoring", asyncio.to_thread(self._deploy))
        *_, self.scorer = await asyncio.gather(
            *policy, up(say, "discriminator", self.discriminator.start()), up(say, "scoring", deployed)
        )
        await self._meet()
        if self.door is not None:
            say(f"scoring endpoint: {self.door[1]}")

    def _learner_config(self) -> dict[str, Any]:
        gumbel = self.config.learner.gumbel
        return super()._learner_config() | {"judge": self._judge() if gumbel.weight else None}

    def _judge(self) -> Callable[[], SoftJudge]:
        """What makes the judge of Gumbel-Softmax on a learner's rank, where it fetches what it needs."""
        settings = self._discriminator_config()
        config = settings["config"].model_copy(update={"device": self.plan.devices["learner"]})
        timeout = config.scoring.timeout_s
        return partial(soft_judge, config, settings["model"], self.config.policy, self.versions, timeout)

    def _discriminator_config(self) -> dict[str, Any]:
        config = self.config
        settled = {
            "threads": self.plan.role("discriminator").threads,
            "device": self.plan.devices["discriminator"],
            "schedule_steps": config.discriminator.schedule_steps or config.discriminator_updates,
        }
        judge = config.discriminator.model_copy(update=settled)
        return {
            "config": for_preferences(judge) if config.data.preferences else judge,
            "model": config.discriminator.model or config.policy.model,
            "model_dtype": config.policy.dtype,
            "versions": self.versions,
            "publish_timeout_s": config.discriminator.scoring.timeout_s,
            "seed": config.run.seed,
        }

    @property
    def _scoring(self) -> ScoringConfig:
        """Settings of the service. In exact mode each group is scored alone: which ones meet in a batch is a
        matter of timing, and rounding depends on a product's shape."""
        settings = self.config.discriminator.scoring
        return settings.model_copy(update={"max_batch_groups": 1}) if self.config.run.exact else settings

    def _deploy(self) -> Any:
        role, settings = self.plan.role("scoring"), self._discriminator_config()
        config = settings["config"].model_copy(update={"scoring": self._scoring})
        handle = deploy(
            self.app,
            config,
            settings["model"],
            self.config.policy.dtype,
            self.versions,
            threads=role.threads,
            use_gpu=role.gpus > 0,
        )
        if config.scoring.http:
            self.door = open_door(handle, config.scoring)
        return handle

    def actors(self) -> dict[str, Any]:
        """Handles of the run's actors by name, as they are now."""
        shared = {"replay buffer": self.buffer, "version store": self.versions} if self._groups else {}
        return super().actors() | shared

    async def stop(self) -> None:
        """End what has an orderly end; the rest goes with the Ray job."""
        await asyncio.gather(super().stop(), self._delete_app(STOP_S, wait=True))

    def _aborting(self) -> list[Awaitable[None]]:
        return [*super()._aborting(), self._delete_app(ABORT_S, wait=False)]

    async def _delete_app(self, timeout_s: float, *, wait: bool) -> None:
        from ray import serve

        if self._deployed:
            deleting = asyncio.to_thread(serve.delete, self.app, _blocking=wait)
            await within(timeout_s, f"ending the scoring service {self.app}", deleting)

    # The controller's words

    async def score(self, batch: pa.Table, version: int) -> list[dict[str, Any]]:
        """Per-token scores and spans for every row of `batch`, each group judged by `version`."""
        groups: dict[str, list[int]] = {}
        for row, group in enumerate(batch["group_id"].to_pylist()):
            groups.setdefault(group, []).append(row)
        prompts, texts = batch["prompt_text"].to_pylist(), batch["response_text"].to_pylist()
        complete = [reason == "stop" for reason in batch["finish_reason"].to_pylist()]
        settings = self._scoring
        requests = max(settings.replicas, -(-len(groups) // settings.max_batch_groups))
        shares = [list(groups.values())[i::requests] for i in range(min(requests, len(groups)))]

        async def one(share: list[list[int]]) -> tuple[list[list[dict[str, Any]]], float]:
            asked = [(prompts[rows[0]], [(texts[i], complete[i]) for i in rows]) for rows in share]
            async with self._in_flight:
                call = self.scorer.measured_score.remote(version, asked)
                return await within(settings.timeout_s, f"scoring {len(share)} groups", call)

        answers = await asyncio.gather(*(one(share) for share in shares))
        if answers:
            self.resident["scoring"] = max(memory for _, memory in answers)
        scores: list[dict[str, Any]] = [{}] * batch.num_rows
        for share, (scored, _) in zip(shares, answers, strict=True):
            for rows, group in zip(share, scored, strict=True):
                for row, item in zip(rows, group, strict=True):
                    scores[row] = item
        return scores

    async def learn(self, scored: pa.Table, step: int, lr_factor: float) -> list[dict[str, float]]:
        """One policy update, its learning rate scaled by `lr_factor`; metrics by rank."""
        timeout = self.config.learner.step_timeout_s
        return await self.learner.call(
            "train_step", timeout_s=timeout, table=ray.put(scored), step=step, lr_factor=lr_factor
        )

    async def discriminate(self, batch: pa.Table, step: int) -> dict[str, Any]:
        """The discriminator's turn of `step` on a replay and on those of these rollouts whose prompt has a
        demonstration; publishes version step + 1. A frozen one judges them all, keeps no replay, and its
        version step + 1 is version 0 again."""
        settings = self.config.discriminator
        batch = batch if settings.frozen else self._demonstrated(batch)
        fresh = ray.put(batch)
        rollouts = fresh if settings.frozen else ray.put(await self._replayed(batch, step))
        metrics = await self.discriminator.call(
            "turn",
            timeout_s=settings.step_timeout_s,
            rollouts=rollouts,
            demonstrations=self.train_demonstrations,
            fresh=fresh,
            heldout=ray.put(self.demonstrations.heldout),
            step=step,
        )
        self.disc_version = step + 1
        if settings.frozen:
            return metrics[0]
        return {
            **metrics[0],
            "buffer": await self._buffered("asking", self.buffer.stats.remote()),
        }

    def _demonstrated(self, rollouts: pa.Table) -> pa.Table:
        """The rollouts whose prompt has a training demonstration. From the others a discriminator would learn
        that answers to such prompts are never human, whatever they say.
        """
        return rollouts.filter(pc.is_in(rollouts["prompt_id"], pc.unique(self.splits.train["prompt_id"])))

    async def _replayed(self, batch: pa.Table, step: int) -> pa.Table:
        """Put a step's rollouts into the replay buffer, and draw from it what the turn trains on."""
        settings, seed = self.config.discriminator, self.config.run.seed
        await self._buffered("adding to", self.buffer.add.remote(batch, step))
        wanted = settings.batch_size * settings.steps_per_policy_step
        draw = self.buffer.sample.remote(wanted, step=step, seed=seed)
        return await self._buffered("sampling", draw)

    async def _buffered(self, what: str, call: Any) -> Any:
        return await within(self._scoring.timeout_s, f"{what} the replay buffer", call)

    # Before, between and after

    async def warm_up(self, say: Callable[[str], None]) -> dict[str, Any]:
        """Train the discriminator on base rollouts until it is good enough (on preference pairs, where there
        are), and publish version 0. Returns its evaluation, and the `rollout_tokens` that were sampled for
        it.
        """
        if self.splits.preferences.num_rows:
            return await self._warm_up_on_preferences(say)
        settings, run = self.config.discriminator, self.config.run
        size = self.config.sampling.group_size
        source = PromptSource(self.splits.demonstrated_prompts(), self.renderer.encode, size, run.seed + 1)
        wanted = settings.batch_size * min(settings.warmup_max_steps, 16) + settings.heldout_size
        prompts = max(1, min(len(source), -(-wanted // size)))
        what = "training the reward model" if settings.frozen else "warming the discriminator up"
        say(f"{what} on {prompts * size} base rollouts")
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
        return metrics[0] | {"rollout_tokens": response_tokens(rollouts)}

    async def _warm_up_on_preferences(self, say: Callable[[str], None]) -> dict[str, Any]:
        settings = self.config.discriminator

        def sides(pairs: pa.Table) -> PreferenceSides:
            limit = self.config.sampling.max_tokens
            return preference_sides(pairs, self.renderer.tokenizer, settings.canonical, max_tokens=limit)

        train, held = sides(self.splits.preferences), sides(self.splits.heldout_preferences)
        say(
            f"training the reward model on {train.chosen.num_rows} preference pairs, "
            f"{held.chosen.num_rows} held out"
        )
        metrics = await self.discriminator.call(
            "warm_up",
            timeout_s=settings.step_timeout_s,
            rollouts=ray.put(train.rejected),
            demonstrations=ray.put(train.chosen),
            heldout=ray.put(held.chosen),
            heldout_rollouts=ray.put(held.rejected),
        )
        self.disc_version = 0
        return metrics[0] | {"rollout_tokens": 0}

    async def base_samples(self, count: int) -> pa.Table:
        """About `count` base responses over the demonstrations' training prompts, for the audit."""
        prompts = self.splits.demonstrated_prompts()
        each = -(-count // prompts.num_rows)
        source = PromptSource(prompts, self.renderer.encode, each, self.config.run.seed + 2)
        return await self.generate(source.next(-(-count // each), 0), 0)

    async def export_discriminator(self, folder: Path) -> None:
        """Write the discriminator as a folder that `services.serving` can serve."""
        timeout = self.config.discriminator.step_timeout_s
        await self.discriminator.call("export", timeout_s=timeout, folder=str(folder))

    async def save(self, folder: Path) -> dict[str, Any]:
        """Write every process's state into `folder`; returns what belongs into the checkpoint's own state."""
        timeout = self.config.learner.step_timeout_s
        await all_written(
            self.learner.call("save", timeout_s=timeout, folder=str(folder / "learner")),
            self.discriminator.call("save", timeout_s=timeout, folder=str(folder / "discriminator")),
            within(
                timeout, "saving the replay buffer", self.buffer.dump.remote(str(folder / "buffer.parquet"))
            ),
        )
        return {"policy_version": self.policy_version, "disc_version": self.disc_version}

    async def reload(self, folder: Path) -> None:
        """Learner and discriminator from a checkpoint, under the present versions; what the discriminator
        then is goes out with its next turn."""
        timeout = self.config.discriminator.step_timeout_s
        where = str(folder / "discriminator")
        await self.discriminator.call("load", timeout_s=timeout, folder=where, version=None)
        await super().reload(folder)

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
                timeout, "loading the replay buffer", self.buffer.load.remote(str(folder / "buffer.parquet"))
            ),
        )
        await self.sync(self.policy_version)


def _show_stacks(_: object) -> None:
    show_stacks_on_signal()
