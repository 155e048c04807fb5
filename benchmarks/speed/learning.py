"""Learning: `PolicyLearner.train_step` against bare PyTorch loops on the same samples.

`Padded` is what one writes without packing, and not the slowest form of it: prompts padded on the left,
logits of response tokens only, micro-batches of the learner's token budget. `Packed` runs the learner's own
packed arrays with masks made beforehand. Both use REINFORCE, clipping and PyTorch's fused AdamW, as the
learner does with kl_coef = 0.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from benchmarks.speed.contender import Result, Timer
from benchmarks.speed.tables import scored_table
from benchmarks.speed.workload import Workload
from learner.attention import dense_mask
from learner.batching import make_batches
from learner.config import LearnerConfig
from learner.policy import PolicyLearner
from learner.samples import Samples

LR = 1e-6


def learner_config(workload: Workload) -> LearnerConfig:
    """One rank, no reference, no baseline: a constant reward still gives gradients."""
    return LearnerConfig(
        device="cpu",
        compute_dtype=workload.dtype,
        threads=workload.threads,
        micro_batch_tokens=workload.micro_batch_tokens,
        lr=LR,
        kl_coef=0.0,
        baseline="none",
        importance_cap=None,
    )


def _result(workload: Workload, seconds: float, computed: int) -> Result:
    return {"seconds": seconds, "samples_per_s": workload.samples / seconds, "tokens_computed": computed}


class Ours:
    """The learner on one rank, without Ray."""

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        self.table = scored_table(workload)
        self.learner = PolicyLearner(workload.model, learner_config(workload), model_dtype=workload.dtype)

    def turn(self, number: int) -> Result:
        with Timer() as timer:
            metrics = self.learner.train_step(self.table, number)
        return _result(self.workload, timer.seconds, int(metrics["tokens_computed"])) | {
            key: value for key, value in metrics.items() if key.startswith("seconds_")
        }

    def close(self) -> None:
        torch.distributed.destroy_process_group()


class _Bare(ABC):
    """Model and optimizer; subclasses give the forward passes."""

    def __init__(self, workload: Workload) -> None:
        torch.set_num_threads(workload.threads)
        self.workload = workload
        self.model = AutoModelForCausalLM.from_pretrained(
            workload.model, dtype=getattr(torch, workload.dtype), attn_implementation="sdpa"
        ).train()
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=LR, betas=(0.9, 0.99), weight_decay=0.0, fused=True
        )
        self.samples = Samples.from_table(scored_table(workload))
        self.batches, self.computed = self.make_batches()

    @abstractmethod
    def make_batches(self) -> tuple[list[Any], int]:
        """Micro-batches of the step, and the tokens in them, padding included."""

    @abstractmethod
    def logits(self, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [..., V] of response tokens, and these tokens [...]."""

    def turn(self, number: int) -> Result:
        with Timer() as timer:
            for batch in self.batches:
                logits, target = self.logits(batch)
                logprob = -nn.functional.cross_entropy(
                    logits.flatten(0, -2).float(), target.flatten(), reduction="none"
                )
                (-logprob.sum() / self.workload.new_tokens).backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return _result(self.workload, timer.seconds, self.computed)

    def close(self) -> None:
        self.batches.clear()


class Padded(_Bare):
    """Every sample with its own copy of the prompt, padded to the longest."""

    def make_batches(self) -> tuple[list[Any], int]:
        longest = max(map(len, self.workload.prompt_ids))
        width = longest + self.workload.response_tokens
        ids, masks = [], []
        for prompt, group in zip(self.workload.prompt_ids, self.workload.responses, strict=True):
            pad = longest - len(prompt)
            for response in group:
                ids.append([0] * pad + prompt + response)
                masks.append([0] * pad + [1] * (width - pad))
        rows = max(1, self.workload.micro_batch_tokens // width)
        batches = list(zip(torch.tensor(ids).split(rows), torch.tensor(masks).split(rows), strict=True))
        return batches, len(ids) * width

    def logits(self, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        ids, mask = batch
        n = self.workload.response_tokens
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        out = self.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=n + 1
        )
        return out.logits[:, :-1], ids[:, -n:]


class Packed(_Bare):
    """The learner's packed rows through the same model."""

    def make_batches(self) -> tuple[list[Any], int]:
        packed = make_batches(self.samples.groups, learner_config(self.workload))
        dtype = getattr(torch, self.workload.dtype)
        return [(b, dense_mask(b, dtype)) for b in packed], sum(b.input_ids.numel() for b in packed)

    def logits(self, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        packed, mask = batch
        out = self.model.model(
            input_ids=packed.input_ids,
            attention_mask=mask,
            position_ids=packed.position_ids,
            use_cache=False,
        )
        hidden = out.last_hidden_state.flatten(0, 1)[packed.source]
        return self.model.lm_head(hidden), packed.target
