"""The words of `services.system` and `services.supervised.system` in one process, on one rank and one thread.

What is settled from the configuration (discounts, schedules, the reward model's settings) is inherited, so it
is what a run with Ray would have. What talks to processes there is a call here; the sampler shares the
learner's weights, so a sync has nothing to send and lags are refused.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from benchmarks.known_modes.sampler import TorchSampler
from discriminator.buffer import ReplayBuffer
from discriminator.scorer import Scorer
from discriminator.soft import SoftJudge
from discriminator.trainer import DiscriminatorTrainer
from discriminator.versions import VersionStore
from learner.policy import PolicyLearner
from learner.snapshot import Snapshot
from learner.supervised import supervised_step
from rollout.data import DataSplits
from rollout.engine import decoder
from rollout.prompts import PromptSource, evaluation_requests
from rollout.templates import Renderer
from services.answers import HumanNLL, first_prompts, human_answers
from services.budget import response_tokens
from services.config import Config, ConfigError
from services.plan import resource_plan
from services.policy_side import PolicySide
from services.supervised.system import SupervisedSystem
from services.system import System

Weights = Mapping[str, torch.Tensor]


def check(config: Config) -> None:
    """Refuse what one process on one rank cannot do.

    Raises:
        ConfigError: lags, several ranks, or truncated sampling.
    """
    problems = []
    if config.run.max_policy_lag or config.run.max_disc_lag:
        problems.append(
            "run.max_policy_lag and run.max_disc_lag must be 0: sampler and learner share weights"
        )
    if config.learner.ranks > 1 or config.discriminator.ranks > 1:
        problems.append("learner.ranks and discriminator.ranks must be 1")
    if config.evaluation.top_p < 1:
        problems.append("evaluation.top_p must be 1: the sampler draws from the whole distribution")
    if config.data.preferences:
        problems.append("data.preferences is not read: reward models train on demonstrations here")
    if problems:
        raise ConfigError("one process: " + "; ".join(problems))


class OneProcessPolicy(PolicySide):
    """Learner and sampler; a mixin before `System` or `SupervisedSystem`."""

    policy: PolicyLearner
    sampler: TorchSampler
    last_batch: pa.Table | None = None
    """Trajectories generated last."""

    def _build_policy(self) -> None:
        settings = self._learner_config()
        judge = settings.get("judge")
        self.policy = PolicyLearner(
            self.config.policy.model,
            settings["learner"],
            temperature=settings["temperature"],
            model_dtype=self.config.policy.dtype,
            seed=settings["seed"],
            judge=None if judge is None else judge(),
        )
        self.sampler = TorchSampler(
            self.policy.module,
            decoder(self.renderer.tokenizer),
            end_id=self.renderer.end_id,
            max_tokens=self.config.sampling.max_tokens,
        )

    async def generate(self, requests: pa.Table, min_version: int) -> pa.Table:
        self.last_batch = self.sampler(
            requests, version=self.policy_version, temperature=self.config.sampling.temperature
        )
        return self.last_batch

    async def sync(self, version: int) -> dict[str, float]:
        self.policy_version = version
        return {}

    async def sample(self, split: pa.Table, prompts: int, step: int) -> pa.Table:
        settings = self.config.evaluation
        temperature = self.config.evaluation_sampling["temperature"]
        requests = evaluation_requests(
            first_prompts(split, prompts),
            self.renderer.encode,
            settings.samples_per_prompt,
            step,
            settings.seed,
        )
        return self.sampler(requests, version=self.policy_version, temperature=temperature)

    async def human_nll(self, split: pa.Table, prompts: int) -> HumanNLL:
        limit, canonical = self.config.sampling.max_tokens, self.config.discriminator.canonical
        table = human_answers(first_prompts(split, prompts), self.renderer, limit, canonical)
        return HumanNLL.of(self.policy.response_nll(table), table)

    async def export(self, folder: Path) -> None:
        self.policy.export(folder)

    def weights(self) -> dict[str, torch.Tensor]:
        """A copy of the policy's weights."""
        return {name: tensor.detach().clone() for name, tensor in self.policy.module.named_parameters()}

    @torch.no_grad()
    def put_weights(self, weights: Weights) -> None:
        """Make these the policy's weights, to be measured: the optimizer's masters stay what they are."""
        for name, tensor in self.policy.module.named_parameters():
            tensor.copy_(weights[name])


class OneProcessSystem(OneProcessPolicy, System):
    """An adversarial run, or one with a frozen reward model, behind the controller's words."""

    judge: DiscriminatorTrainer
    local_scorer: Scorer

    def __init__(self, config: Config, splits: DataSplits, renderer: Renderer) -> None:
        super().__init__(config, resource_plan(config, gpus=0, cores=1), splits, renderer)
        self.versions = VersionStore(2)
        self.buffer = ReplayBuffer(config.discriminator.buffer)
        settings = self._discriminator_config()
        model, dtype = settings["model"], settings["model_dtype"]
        self.judge = DiscriminatorTrainer(settings["config"], model, model_dtype=dtype, seed=settings["seed"])
        self.local_scorer = Scorer(settings["config"], model, model_dtype=dtype)
        self.judge.canonical = self.local_scorer.canonical  # one memory
        self._published: tuple[str, Weights] | None = None
        self._build_policy()

    def _judge(self) -> Callable[[], SoftJudge]:
        settings = self._discriminator_config()
        return lambda: SoftJudge(
            settings["config"], settings["model"], self.config.policy, self.versions.fetch
        )

    async def score(self, batch: pa.Table, version: int) -> list[dict[str, Any]]:
        self.local_scorer.ensure(version, self.versions.fetch)
        groups: dict[str, list[int]] = {}
        for row, group in enumerate(batch["group_id"].to_pylist()):
            groups.setdefault(group, []).append(row)
        prompts, texts = batch["prompt_text"].to_pylist(), batch["response_text"].to_pylist()
        complete = [reason == "stop" for reason in batch["finish_reason"].to_pylist()]
        answers = self.local_scorer.score(
            version,
            [prompts[rows[0]] for rows in groups.values()],
            [[(texts[row], complete[row]) for row in rows] for rows in groups.values()],
        )
        scores: list[dict[str, Any]] = [{}] * batch.num_rows
        for rows, scored in zip(groups.values(), answers, strict=True):
            for row, item in zip(rows, scored, strict=True):
                scores[row] = {"scores": item.scores, "spans": item.spans}
        return scores

    async def learn(self, scored: pa.Table, step: int, lr_factor: float) -> list[dict[str, float]]:
        return [self.policy.train_step(scored, step, lr_factor)]

    async def discriminate(self, batch: pa.Table, step: int) -> dict[str, Any]:
        settings, seed = self.config.discriminator, self.config.run.seed
        batch = batch if settings.frozen else self._demonstrated(batch)
        rollouts = batch
        if not settings.frozen:
            self.buffer.add(batch, step)
            wanted = settings.batch_size * settings.steps_per_policy_step
            rollouts = self.buffer.sample(wanted, step=step, seed=seed)
        held = self.judge.evaluate(self.demonstrations.heldout, batch, step)
        trained = self.judge.update(rollouts, self.demonstrations.train, step)
        self._publish(step + 1)
        self.disc_version = step + 1
        changes = [
            f"{t['side']} {t['before']} -> {t['after']}: {t['reason']}" for t in self.judge.take_transitions()
        ]
        told = {"transition": "; ".join(changes)} if changes else {}
        return {**trained, **{f"{name}_heldout": value for name, value in held.items()}, **told}

    async def warm_up(self, say: Callable[[str], None]) -> dict[str, Any]:
        settings, run = self.config.discriminator, self.config.run
        size = self.config.sampling.group_size
        source = PromptSource(self.splits.demonstrated_prompts(), self.renderer.encode, size, run.seed + 1)
        wanted = settings.batch_size * min(settings.warmup_max_steps, 16) + settings.heldout_size
        prompts = max(1, min(len(source), -(-wanted // size)))
        rollouts = await self.generate(source.next(prompts, 0), 0)
        apart = min(settings.heldout_size, rollouts.num_rows // 4)
        metrics = self.judge.warm_up(
            rollouts.slice(apart),
            self.demonstrations.train,
            self.demonstrations.heldout,
            rollouts.slice(0, apart),
        )
        self._publish(0)
        self.disc_version = 0
        return metrics | {"rollout_tokens": response_tokens(rollouts)}

    def _publish(self, version: int) -> None:
        """Give the present weights a number; those that did not change are given again, under the new one."""
        if self._published is None or self.judge.changed:
            published = self.judge.publish()
            assert published is not None, "a single rank is rank 0"
            self._published = published.checksum, published.state
        self.versions.publish(version, *self._published)


class OneProcessSupervised(OneProcessPolicy, SupervisedSystem):
    """A supervised run behind the words of `services.supervised.controller.SupervisedController`."""

    def __init__(self, config: Config, splits: DataSplits, renderer: Renderer) -> None:
        super().__init__(config, resource_plan(config, gpus=0, cores=1), splits, renderer)
        self.kept = Snapshot()
        self._build_policy()

    async def learn(self, examples: pa.Table) -> list[dict[str, Any]]:
        return [supervised_step(self.policy.trainable, self.policy.cfg, examples)]

    async def keep(self) -> None:
        self.kept.take(self.policy.trainable)

    async def restore(self) -> None:
        self.kept.restore(self.policy.trainable)
