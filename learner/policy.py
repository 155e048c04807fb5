"""The policy's training step: scored trajectories in, new weights out.

Rewards arrive as the column `token_rewards` of the trajectories and in no other way. Every rank is given the
whole step's table and takes its share of it by a rule that all ranks compute alike, so shares, advantages and
normalisation need no talk between ranks:

    pack -> (old log-probabilities) -> (reference log-probabilities) -> advantages -> loss -> engine.step

A step with one update needs no pass for old log-probabilities: they are the current ones, detached.
"""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from learner import lora
from learner.advantages import advantages, discounted_returns, importance_weights
from learner.attention import attention_implementation
from learner.config import LearnerConfig
from learner.engine import TrainableModel, resolve_device, resolve_dtype
from learner.kl import kl_estimate
from learner.logprobs import ScoredModel
from learner.losses import LossOutput, PolicyLossInputs, policy_loss
from learner.packing import Group, PackedBatch, make_groups, pack, pad_batches, split_for_ranks, unpacked
from rollout.config import PolicyConfig


def load_causal_lm(
    name: str, *, dtype: torch.dtype, device: torch.device, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Load a causal LM by hub name or folder, ready for packed rows."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        name,
        dtype=dtype,
        attn_implementation=attention_implementation(device),
        trust_remote_code=trust_remote_code,
    )
    return model.to(device)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Samples:
    """A step's trajectories as flat arrays; tokens of trajectory i are `offsets[i]:offsets[i+1]`."""

    groups: list[Group]
    offsets: torch.Tensor
    group_index: torch.Tensor
    """Group number of each trajectory."""

    @property
    def tokens(self) -> int:
        return int(self.offsets[-1])

    @classmethod
    def from_table(cls, table: pa.Table) -> "Samples":
        """From `prompt_ids`, `response_ids` and (where present) `group_id`; rows without one are groups of
        their own."""
        prompts, responses = ragged(table, "prompt_ids"), ragged(table, "response_ids")
        named = "group_id" in table.column_names
        keys: list[Any] = table["group_id"].to_pylist() if named else list(range(len(table)))
        lengths = torch.tensor([len(r) for r in responses], dtype=torch.int64)
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        numbers = {key: i for i, key in enumerate(dict.fromkeys(keys))}
        index = torch.tensor([numbers[key] for key in keys], dtype=torch.int64)
        return cls(make_groups(prompts, responses, keys), offsets, index)


def ragged(table: pa.Table, column: str) -> list[np.ndarray]:
    """Rows of a list column as numpy arrays."""
    chunks = table[column].combine_chunks()
    values = chunks.values.to_numpy(zero_copy_only=False)
    offsets = chunks.offsets.to_numpy()
    return [values[lo:hi] for lo, hi in pairwise(offsets)]


def flat_column(table: pa.Table, column: str, samples: Samples) -> torch.Tensor:
    """A per-token list column in flat order, fp32. Raises ValueError when a row's length is not that of its
    response."""
    rows = ragged(table, column)
    for i, (row, want) in enumerate(zip(rows, samples.offsets.diff().tolist(), strict=True)):
        if len(row) != want:
            raise ValueError(f"row {i}: {column} has {len(row)} entries for a response of {want} tokens")
    flat = np.concatenate(rows).astype(np.float32) if rows else np.zeros(0, dtype=np.float32)
    if not np.isfinite(flat).all():
        raise ValueError(f"{column} holds values that are not finite")
    return torch.from_numpy(flat)


@torch.no_grad()
def mean_nll(policy: PolicyConfig, cfg: LearnerConfig, table: pa.Table, *, temperature: float = 1.0) -> float:
    """Mean negative log-likelihood, nats per token, of a table's responses under a model, without an engine.

    Reads `prompt_ids`, `response_ids` and, if there, `group_id`. Raises ValueError without response tokens.
    """
    samples = Samples.from_table(table)
    if samples.tokens == 0:
        raise ValueError("the table has no response token to judge")
    device = resolve_device(cfg.device)
    network = load_causal_lm(
        policy.model,
        dtype=resolve_dtype(cfg.compute_dtype, policy.dtype, device),
        device=device,
        trust_remote_code=policy.trust_remote_code,
    )
    model = ScoredModel(network, temperature=temperature, chunk=cfg.logits_chunk, packing=cfg.packing).eval()
    total = sum(
        float(model(batch.to(device))[0].double().sum()) for batch in make_batches(samples.groups, cfg)
    )
    return -total / samples.tokens


def make_batches(groups: list[Group], cfg: LearnerConfig) -> list[PackedBatch]:
    """Micro-batches as configured, without the responses' last tokens, which predict nothing."""
    if not cfg.packing:
        return unpacked(groups, micro_batch_tokens=cfg.micro_batch_tokens, keep_last=False)
    return pack(
        groups, pack_length=cfg.pack_length, micro_batch_tokens=cfg.micro_batch_tokens, keep_last=False
    )


class PolicyLearner:
    """The policy, its frozen reference (only with kl_coef > 0) and its optimizer, on one rank of the learner.

    `model_dtype` is the dtype in which the policy is sampled and exported; the arithmetic here may be wider
    (`LearnerConfig.compute_dtype`). With LoRA the reference is the policy with its adapters switched off.
    """

    def __init__(
        self,
        model: str,
        cfg: LearnerConfig,
        *,
        temperature: float = 1.0,
        model_dtype: str = "bfloat16",
        trust_remote_code: bool = False,
        seed: int = 0,
    ) -> None:
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

        def scored(net: PreTrainedModel) -> ScoredModel:
            return ScoredModel(net, temperature=temperature, chunk=cfg.logits_chunk, packing=cfg.packing)

        torch.manual_seed(seed)  # adapters start from random weights, which must be the same on every rank
        network = lora.attach(load(), cfg.lora)
        if cfg.gradient_checkpointing:
            network.gradient_checkpointing_enable({"use_reentrant": False})
        self.trainable = TrainableModel(scored(network), cfg, dtype=self.dtype)
        self.reference: ScoredModel | None = None
        if cfg.kl_coef > 0 and cfg.lora.rank == 0:
            self.reference = scored(load()).eval().requires_grad_(False)

    @property
    def module(self) -> PreTrainedModel:
        """The transformers model that is trained (with adapters, under LoRA). See `weights` for what to
        broadcast."""
        return self.trainable.module.model  # type: ignore[return-value]

    def train_step(self, table: pa.Table, step: int) -> dict[str, float]:
        """Update the policy from a step's scored trajectories (whole groups; the same table on every rank).

        Reads `prompt_ids`, `response_ids`, `response_logprobs`, `token_rewards` and `group_id`. Returns
        metrics that are equal on all ranks but for the seconds. Raises ValueError for a table without a
        response token.
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
        old = reference = None
        if cfg.epochs * cfg.minibatches > 1 or (cfg.kl_coef > 0 and cfg.kl_in == "reward"):
            old = self._evaluate(self.trainable.engine, batches, samples.tokens)[0]
            clock.lap("old_logprobs")
        if cfg.kl_coef > 0:
            reference = self._reference_logprobs(batches, samples.tokens)
            clock.lap("reference_logprobs")
        if cfg.kl_in == "reward" and old is not None and reference is not None:
            rewards = rewards - cfg.kl_coef * kl_estimate(old, reference, cfg.kl_estimator)
        returns = discounted_returns(rewards, samples.offsets, 1.0 if cfg.gamma is None else cfg.gamma)
        advantage = advantages(
            returns, samples.offsets, samples.group_index, baseline=cfg.baseline, whiten=cfg.whiten
        )
        columns = {"sampler": sampler, "advantage": advantage}
        if old is not None:
            columns["old"] = old
        if reference is not None:
            columns["reference"] = reference
        clock.lap("advantages")

        history = []
        for minibatch in self._minibatches(samples.groups, batches, step):
            shares = _token_shares(minibatch, samples, cfg.normalise)
            chosen = [b.with_columns(**columns, share=shares).to(self.device) for b in minibatch.batches]
            history.append(self.trainable.step(chosen, self._loss))
        clock.lap("update")
        metrics = {name: float(np.mean([m[name] for m in history])) for name in history[0]}
        lengths = samples.offsets.diff().double()
        per_trajectory = torch.zeros(len(lengths)).index_add_(
            0, torch.repeat_interleave(torch.arange(len(lengths)), samples.offsets.diff()), rewards
        )
        padded = sum(b.input_ids.numel() for b in batches if b.weight.any())
        totals = self.trainable.reduce({"tokens_computed": torch.tensor(float(padded))}, "sum")
        return {
            **metrics,
            **totals,
            "reward_mean": float(per_trajectory.mean()),
            "return_mean": float(returns.mean()),
            "advantage_std": float(advantage.std(unbiased=False)),
            "response_length": float(lengths.mean()),
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
        flat, _ = self._evaluate(self.trainable.engine, self._batches(samples.groups), samples.tokens)
        return np.split(flat.numpy(), samples.offsets[1:-1].numpy())

    def save(self, folder: Path | str) -> None:
        """Everything needed to continue exactly; all ranks together."""
        self.trainable.save(folder)

    def load(self, folder: Path | str) -> None:
        """Continue from `save`; all ranks together."""
        self.trainable.load(folder)

    def weights(self, each: Callable[[str, torch.Tensor], None]) -> None:
        """Call `each(name, tensor)` with every weight of the plain model, whole, adapters merged, in the
        export dtype.

        Collective: all ranks call it and all see every weight, one at a time. Tied weights come once, under
        their first name.
        """
        layers = {f"{name}.base_layer.weight": layer for name, layer in lora.adapters(self.module)}
        for name, param in self.module.named_parameters():
            plain = lora.merged_name(name)
            if plain is None:
                continue
            layer = layers.get(name)
            with self.trainable.gathered([param] if layer is None else layer.parameters()):
                whole = param.detach() if layer is None else lora.merged_weight(layer)
                each(plain, whole.to(self.export_dtype))

    def export(self, folder: Path | str) -> None:
        """Write a plain transformers folder (adapters merged); collective, rank 0 writes. The tokenizer is
        the caller's."""
        state: dict[str, torch.Tensor] = {}

        def keep(name: str, tensor: torch.Tensor) -> None:
            if self.trainable.rank == 0:
                state[name] = tensor.to("cpu", copy=True).contiguous()

        self.weights(keep)
        if self.trainable.rank == 0:
            plain = _skeleton(self.module, self.export_dtype)
            plain.load_state_dict(state, strict=False, assign=True)
            plain.tie_weights()
            if left := [name for name, tensor in plain.named_parameters() if tensor.is_meta]:
                raise RuntimeError(f"export lacks {len(left)} weights, among them {left[0]}")
            plain.save_pretrained(folder)
        torch.distributed.barrier()

    def _batches(self, groups: list[Group]) -> list[PackedBatch]:
        """This rank's micro-batches, as many as on every other rank."""
        shares = split_for_ranks(groups, self.trainable.ranks)
        packed = [make_batches(share, self.cfg) for share in shares]
        return pad_batches(packed[self.trainable.rank], max(len(p) for p in packed))

    def _minibatches(self, groups: list[Group], batches: list[PackedBatch], step: int) -> "list[_Minibatch]":
        """The step's updates: every group once an epoch, in an order that depends only on seed, step and
        epoch."""
        if self.cfg.minibatches == 1:
            return [_Minibatch(groups, batches)] * self.cfg.epochs
        if len(groups) < self.cfg.minibatches:
            raise ValueError(
                f"{len(groups)} groups cannot fill {self.cfg.minibatches} minibatches; lower minibatches"
            )
        result = []
        for epoch in range(self.cfg.epochs):
            order = np.random.default_rng([self.seed, step, epoch]).permutation(len(groups))
            for part in np.array_split(order, self.cfg.minibatches):
                chosen = [groups[i] for i in sorted(part)]
                result.append(_Minibatch(chosen, self._batches(chosen)))
        return result

    def _loss(self, model: nn.Module, batch: PackedBatch) -> LossOutput:
        cfg = self.cfg
        logprob, entropy = model(batch)
        old = batch.columns.get("old", logprob.detach())
        inputs = PolicyLossInputs(
            logprob=logprob,
            entropy=entropy,
            old_logprob=old,
            sampler_logprob=batch.columns["sampler"],
            advantage=batch.columns["advantage"],
            importance=importance_weights(old, batch.columns["sampler"], cfg.importance_cap),
            weight=batch.columns["share"] * batch.weight,
            reference_logprob=batch.columns.get("reference"),
        )
        return policy_loss(
            inputs,
            loss=cfg.loss,
            clip_low=cfg.clip_low,
            clip_high=cfg.clip_high,
            kl_coef=cfg.kl_coef if cfg.kl_in == "loss" else 0.0,
            kl_estimator=cfg.kl_estimator,
            entropy_coef=cfg.entropy_coef,
        )

    def _reference_logprobs(self, batches: list[PackedBatch], tokens: int) -> torch.Tensor:
        if self.reference is not None:
            return self._evaluate(self.reference, batches, tokens)[0]
        with lora.adapters_off(self.module):
            return self._evaluate(self.trainable.engine, batches, tokens)[0]

    @torch.no_grad()
    def _evaluate(
        self, model: nn.Module, batches: list[PackedBatch], tokens: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities and entropies in flat order on CPU, [tokens] each, gathered from all ranks."""
        model.eval()
        flat = torch.zeros(2, tokens, device=self.device)
        for batch in batches:
            logprob, entropy = model(batch.to(self.device))
            batch.scatter(logprob, flat[0])
            batch.scatter(entropy, flat[1])
        torch.distributed.all_reduce(flat)
        return flat[0].cpu(), flat[1].cpu()


@dataclass(frozen=True)
class _Minibatch:
    groups: list[Group]
    batches: list[PackedBatch]


def _token_shares(minibatch: _Minibatch, samples: Samples, normalise: str) -> torch.Tensor:
    """Each token's share of the update's loss, in flat order: they add up to one over the minibatch's
    tokens."""
    rows = torch.from_numpy(np.concatenate([group.rows for group in minibatch.groups]))
    lengths = samples.offsets.diff()
    if normalise == "token":
        share = torch.full(lengths.shape, 1.0 / int(lengths[rows].sum()))
    else:
        share = 1.0 / (lengths.clamp_min(1) * int((lengths[rows] > 0).sum()))
    return torch.repeat_interleave(share.float(), lengths)


def _skeleton(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """A model of the same class without weights, to save under."""
    # save_pretrained writes into the configuration, and the policy goes on computing with its own.
    config = copy.deepcopy(model.config)
    config.dtype = dtype
    with torch.device("meta"):
        return type(model)(config)


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
