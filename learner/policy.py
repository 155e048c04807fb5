"""The policy's training step: scored trajectories in, new weights out.

Rewards arrive as columns of the trajectories and in no other way: `token_rewards`, and `response_reward` for
what a response earns as a whole. Every rank is given the
whole step's table and takes its share of it by a rule that all ranks compute alike, so shares, advantages and
normalisation need no talk between ranks:

    pack -> (old log-probabilities) -> (reference log-probabilities) -> (values) -> advantages -> loss -> step

A step with one update needs no pass for old log-probabilities: they are the current ones, detached.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import nn
from transformers import PreTrainedModel

from learner import lora
from learner.advantages import estimate_advantages, importance_weights, paid
from learner.batching import evaluate, minibatches, rank_batches, token_shares
from learner.config import LearnerConfig
from learner.critic import Critic
from learner.engine import TrainableModel, resolve_device, resolve_dtype
from learner.export import export_plain, plain_weights
from learner.gumbel import GumbelModel, SoftBatch
from learner.gumbel_update import GumbelUpdate, Judge
from learner.kl import adapted_coefficient, kl_estimate
from learner.logprobs import ScoredModel
from learner.losses import LossOutput, PolicyLossInputs, policy_loss
from learner.packing import Group, PackedBatch
from learner.pretrained import load_causal_lm
from learner.samples import Samples, flat_column, row_column
from learner.whole_state import read_json

KL_STATE = "kl.json"


class PolicyLearner:
    """The policy, its frozen reference (only with kl_coef > 0), its critic (only with advantage = "gae") and
    their optimizers, on one rank of the learner.

    `model_dtype` is the dtype in which the policy is sampled and exported; the arithmetic here may be wider
    (`LearnerConfig.compute_dtype`). With LoRA the reference is the policy with its adapters switched off.
    """

    kl_coef: float
    """Weight of the KL; with `kl_target` it changes after each step."""

    def __init__(
        self,
        model: str,
        cfg: LearnerConfig,
        *,
        temperature: float = 1.0,
        model_dtype: str = "bfloat16",
        trust_remote_code: bool = False,
        seed: int = 0,
        judge: Judge | None = None,
    ) -> None:
        if (judge is None) == (cfg.gumbel.weight > 0):
            raise ValueError(
                f"gumbel.weight = {cfg.gumbel.weight:g}: a judge is needed above 0, and only there"
            )
        self.cfg = cfg
        self.seed = seed
        if cfg.threads:
            torch.set_num_threads(cfg.threads)
        self.device = resolve_device(cfg.device)
        self.dtype = resolve_dtype(cfg.compute_dtype, model_dtype, self.device)
        self.export_dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[model_dtype]

        def load() -> PreTrainedModel:
            return load_causal_lm(
                model, dtype=self.dtype, device=self.device, trust_remote_code=trust_remote_code
            )

        def scored(net: PreTrainedModel, kind: type[ScoredModel] = ScoredModel) -> ScoredModel:
            return kind(net, temperature=temperature, chunk=cfg.logits_chunk, packing=cfg.packing)

        torch.manual_seed(seed)  # adapters start from random weights, which must be the same on every rank
        network = lora.attach(load(), cfg.lora, sent=self.export_dtype)
        if cfg.gradient_checkpointing:
            network.gradient_checkpointing_enable({"use_reentrant": False})
        trained = scored(network, ScoredModel if judge is None else GumbelModel)
        self.trainable = TrainableModel(trained, cfg, dtype=self.dtype)
        self.gumbel = None if judge is None else GumbelUpdate(cfg, judge, self.trainable, seed)
        self.reference: ScoredModel | None = None
        if cfg.kl_coef > 0 and cfg.lora.rank == 0:
            self.reference = scored(load()).eval().requires_grad_(False)
        self.critic: Critic | None = None
        if cfg.advantage == "gae":
            self.critic = Critic(model, cfg, dtype=self.dtype, trust_remote_code=trust_remote_code)
        self.kl_coef = cfg.kl_coef

    @property
    def module(self) -> PreTrainedModel:
        """The transformers model that is trained (with adapters, under LoRA). See `weights` for what to
        broadcast."""
        return self.trainable.module.model  # type: ignore[return-value]

    def train_step(self, table: pa.Table, step: int, lr_factor: float = 1.0) -> dict[str, float]:
        """Update the policy from a step's scored trajectories (whole groups; the same table on every rank).

        Reads `prompt_ids`, `response_ids`, `response_logprobs`, `token_rewards` and `group_id`, with a judge
        also `prompt_text` and `disc_version`, with `absorbing_end` also `last_reward`, and `response_reward`
        where there is one. `lr_factor` scales
        this step's learning rate; at 0 policy and critic stay as they are. Returns metrics that are equal on
        all ranks but for the seconds; the share `skipped` of its updates was not finite. Raises ValueError
        for a table without a response token.
        """
        clock = _Clock()
        samples = Samples.from_table(table)
        if samples.tokens == 0:
            raise ValueError(f"step {step}: the table has no response token to learn from")
        sampler = flat_column(table, "response_logprobs", samples)
        rewards = flat_column(table, "token_rewards", samples)
        batches = self._batches(samples.groups)
        clock.lap("pack")

        cfg = self.cfg
        gamma = 1.0 if cfg.gamma is None else cfg.gamma
        lengths = samples.offsets.diff()
        row = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        earned = torch.zeros(len(lengths)).index_add_(0, row, rewards)
        last = row_column(table, "last_reward") if cfg.absorbing_end else None
        whole = row_column(table, "response_reward") if "response_reward" in table.column_names else None
        rewards = paid(rewards, samples.offsets, gamma, last=last, whole=whole)
        if whole is not None:
            earned = earned + whole
        old = reference = values = None
        if cfg.epochs * cfg.minibatches > 1 or (cfg.kl_coef > 0 and cfg.kl_in == "reward"):
            old = self._logprobs(self.trainable.engine, batches, samples.tokens)
            clock.lap("old_logprobs")
        if cfg.kl_coef > 0:
            reference = self._reference_logprobs(batches, samples.tokens)
            clock.lap("reference_logprobs")
        if cfg.kl_in == "reward" and old is not None and reference is not None:
            rewards = rewards - self.kl_coef * kl_estimate(old, reference, cfg.kl_estimator)
        if self.critic is not None:
            values = self.critic.values(batches, samples.tokens)
            clock.lap("values")
        advantage, returns = estimate_advantages(
            cfg.advantage,
            rewards,
            samples.offsets,
            samples.group_index,
            gamma=gamma,
            baseline=cfg.baseline,
            whiten=cfg.whiten,
            values=values,
            gae_lambda=cfg.gae_lambda,
        )
        columns = {"sampler": sampler, "advantage": advantage}
        if old is not None:
            columns["old"] = old
        if reference is not None:
            columns["reference"] = reference
        if values is not None:
            columns |= {"value": values, "target": returns}
        clock.lap("advantages")
        soft: list[SoftBatch] = []
        told: dict[str, float] = {}
        if self.gumbel is not None:
            soft, told = self.gumbel.draw(table, samples.groups, step)
            columns["advantage"] = advantage * cfg.gumbel.policy_gradient_weight
            clock.lap("gumbel_draw")

        history = []
        place = {"rank": self.trainable.rank, "ranks": self.trainable.ranks}
        for minibatch in minibatches(samples.groups, batches, cfg, seed=[self.seed, step], **place):
            columns |= self._shares(minibatch.groups, samples.offsets)
            chosen = [b.with_columns(**columns).to(self.device) for b in minibatch.batches]
            both: list[PackedBatch | SoftBatch] = [*chosen, *(batch.to(self.device) for batch in soft)]
            update = self.trainable.step(both, self._loss, lr_factor=lr_factor)
            if self.critic is not None and lr_factor > 0:
                update |= self.critic.update(chosen)
            history.append(update)
        clock.lap("update")
        metrics = {
            name: float((np.max if name.endswith("_max") else np.mean)([update[name] for update in history]))
            for name in history[0]
        } | told
        if self.gumbel is not None:
            metrics |= self.gumbel.metrics()
        if values is not None:
            metrics["critic_explained"] = explained_variance(values, returns)
        if reference is not None:
            metrics["kl_coef"] = self.kl_coef
        told_kl = metrics["skipped"] == 0 and metrics["importance_mean"] > 0
        if cfg.kl_target is not None and lr_factor > 0 and told_kl:
            kl = metrics["kl"] / metrics["importance_mean"]  # masked tokens say nothing, and not that it is 0
            self.kl_coef = adapted_coefficient(self.kl_coef, kl, cfg.kl_target, cfg.kl_gain)
        padded = sum(b.input_ids.numel() for b in batches if b.weight.any())
        totals = self.trainable.reduce({"tokens_computed": torch.tensor(float(padded))}, "sum")
        return {
            **metrics,
            **totals,
            "reward_mean": float(earned.mean()),
            "return_mean": float(returns.mean()),
            "advantage_std": float(advantage.std(unbiased=False)),
            "response_length": float(lengths.double().mean()),
            "tokens_response": float(samples.tokens),
            "trajectories": float(len(lengths)),
            "micro_batches": float(len(batches)),
            **clock.seconds(),
        }

    def response_logprobs(self, table: pa.Table) -> list[np.ndarray]:
        """Log-probability of every response token under the current weights, per row (fp32); the same on
        every rank.

        Reads `prompt_ids` and `response_ids` (and `group_id`, to share prompts).
        """
        samples = Samples.from_table(table)
        flat = self._logprobs(self.trainable.engine, self._batches(samples.groups), samples.tokens)
        return np.split(flat.numpy(), samples.offsets[1:-1].numpy())

    def response_nll(self, table: pa.Table) -> np.ndarray:
        """Negative log-likelihood of every response under the current weights, nats: float64 [rows]; the same
        on every rank, and read from the same columns."""
        return np.array([-row.sum(dtype=np.float64) for row in self.response_logprobs(table)])

    def save(self, folder: Path | str) -> None:
        """Everything needed to continue exactly; all ranks together."""
        folder = Path(folder)
        if self.cfg.kl_target is not None and self.trainable.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / KL_STATE).write_text(json.dumps({"kl_coef": self.kl_coef}))
        if self.critic is not None:
            self.critic.save(folder / "critic")
        self.trainable.save(folder)

    def load(self, folder: Path | str) -> None:
        """Continue from `save`; all ranks together. Raises FileNotFoundError for an incomplete folder."""
        folder = Path(folder)
        self.trainable.load(folder)
        if self.critic is not None:
            self.critic.load(folder / "critic")
        if self.cfg.kl_target is not None:
            self.kl_coef = read_json(folder / KL_STATE)["kl_coef"]

    def weights(self, each: Callable[[str, torch.Tensor], None]) -> None:
        """Call `each(name, tensor)` with every weight of the plain model, adapters merged, in the export
        dtype; see `learner.export.plain_weights`. Collective."""
        plain_weights(self.module, self.trainable, self.export_dtype, each)

    def export(self, folder: Path | str) -> None:
        """Write a plain transformers folder (adapters merged); collective, rank 0 writes. The tokenizer is
        the caller's."""
        export_plain(self.module, self.trainable, self.export_dtype, folder)

    def _batches(self, groups: list[Group]) -> list[PackedBatch]:
        return rank_batches(groups, self.cfg, self.trainable.rank, self.trainable.ranks)

    def _shares(self, groups: list[Group], offsets: torch.Tensor) -> dict[str, torch.Tensor]:
        """Columns `share`, of the update's loss, and where it is not that, `mean`, of its diagnostics and of
        the critic's loss."""
        cfg = self.cfg
        shares = {"share": token_shares(groups, offsets, cfg.normalise, cfg.constant_length)}
        if cfg.normalise == "constant" or self.critic is not None:
            shares["mean"] = token_shares(groups, offsets, "token")
        return shares

    def _loss(self, model: nn.Module, batch: PackedBatch | SoftBatch) -> LossOutput:
        if isinstance(batch, SoftBatch):
            assert self.gumbel is not None, "it makes these batches"
            return self.gumbel.loss(model, batch)
        cfg = self.cfg
        logprob, entropy = model(batch)
        old = batch.columns.get("old", logprob.detach())
        inputs = PolicyLossInputs(
            logprob=logprob,
            entropy=entropy,
            old_logprob=old,
            sampler_logprob=batch.columns["sampler"],
            advantage=batch.columns["advantage"],
            importance=importance_weights(
                old,
                batch.columns["sampler"],
                cfg.importance_cap,
                masked=cfg.importance == "masked",
                floor=cfg.importance_floor,
            ),
            weight=batch.columns["share"] * batch.weight,
            reference_logprob=batch.columns.get("reference"),
            trajectory=batch.trajectory,
            # Shares of a constant length add up to no mean.
            metric_weight=batch.columns["mean"] * batch.weight if cfg.normalise == "constant" else None,
        )
        return policy_loss(
            inputs,
            loss=cfg.loss,
            clip_low=cfg.clip_low,
            clip_high=cfg.clip_high,
            dual_clip=cfg.dual_clip,
            kl_coef=self.kl_coef if cfg.kl_in == "loss" else 0.0,
            kl_estimator=cfg.kl_estimator,
            entropy_coef=cfg.entropy_coef,
        )

    def _reference_logprobs(self, batches: list[PackedBatch], tokens: int) -> torch.Tensor:
        if self.reference is not None:
            return self._logprobs(self.reference, batches, tokens)
        with lora.adapters_off(self.module):
            return self._logprobs(self.trainable.engine, batches, tokens)

    def _logprobs(self, model: nn.Module, batches: list[PackedBatch], tokens: int) -> torch.Tensor:
        """Log-probabilities in flat order on CPU, [tokens], gathered from all ranks."""
        return evaluate(model, batches, tokens, self.device, 2)[0]


def explained_variance(values: torch.Tensor, targets: torch.Tensor) -> float:
    """1 - Var(R - V) / Var(R): 1 for a critic that knows the targets, 0 for a constant one."""
    spread = targets.var(unbiased=False)
    return float(1.0 - (targets - values).var(unbiased=False) / spread) if spread > 0 else 0.0


class _Clock:
    """Seconds between laps, by name."""

    def __init__(self) -> None:
        self._last = time.perf_counter()
        self._laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self._laps[f"seconds_{name}"] = now - self._last
        self._last = now

    def seconds(self) -> dict[str, float]:
        return self._laps | {"seconds_step": sum(self._laps.values())}
