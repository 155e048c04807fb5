"""The critic of PPO: how much reward is still to come, before each response token.

It is the policy's base model with a scalar head, all weights trained, under ZeRO like the policy and on the
policy's own packed batches:

    critic = Critic(model, cfg, dtype=torch.float32)
    values = critic.values(batches, tokens)     # [tokens], flat order, at the step's start
    critic.update(batches)                      # batches with columns `value`, `target` and `mean`

Value t is read from the hidden state that predicts token t, so it knows the tokens before t and not t itself:
only such a baseline leaves the policy gradient unbiased.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from learner.attention import longest_packable
from learner.batching import evaluate
from learner.config import LearnerConfig
from learner.engine import TrainableModel, resolve_device
from learner.logprobs import run_body
from learner.losses import LossOutput, value_loss
from learner.packing import PackedBatch
from learner.pretrained import load_causal_lm


class ValueHead(nn.Module):
    """A linear map to one number, in fp32 whatever the dtype of the body; zero before training.

    A module of its own, so that ZeRO-3 gathers its weights around its pass.
    """

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, hidden))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return functional.linear(states.float(), self.weight.float(), self.bias.float()).squeeze(-1)


class ValueModel(nn.Module):
    """A causal body that maps a packed batch to the values [N] of the states before its response tokens."""

    def __init__(self, body: nn.Module, *, packing: bool = True) -> None:
        super().__init__()
        config: Any = body.config
        self.body = body
        self.head = ValueHead(config.hidden_size)
        self.packing = packing
        self.limit = longest_packable(config, body) if packing else None

    def forward(self, batch: PackedBatch) -> tuple[torch.Tensor]:
        hidden = run_body(self.body, batch, packing=self.packing, limit=self.limit)
        return (self.head(hidden.flatten(0, 1)[batch.source]),)


class Critic:
    """Value model and its optimizer on one rank. Everything here is collective."""

    def __init__(
        self, model: str, cfg: LearnerConfig, *, dtype: torch.dtype, trust_remote_code: bool = False
    ) -> None:
        self.clip = cfg.critic.clip
        network = load_causal_lm(
            model, dtype=dtype, device=resolve_device(cfg.device), trust_remote_code=trust_remote_code
        )
        if cfg.gradient_checkpointing:
            network.gradient_checkpointing_enable({"use_reentrant": False})
        self.trainable = TrainableModel(
            ValueModel(network.get_decoder(), packing=cfg.packing),
            cfg.model_copy(update={"lr": cfg.critic.lr}),
            dtype=dtype,
        )

    def values(self, batches: list[PackedBatch], tokens: int) -> torch.Tensor:
        """Values of the states before each response token, in flat order on CPU, [tokens]; the same on every
        rank."""
        return evaluate(self.trainable.engine, batches, tokens, self.trainable.device, 1)[0]

    def update(self, batches: list[PackedBatch]) -> dict[str, float]:
        """One optimizer update towards the column `target`; metrics `critic_loss`, `critic_grad_norm` and
        `critic_lr`, equal on all ranks.

        Columns: `value` at the step's start, `target`, and `mean`, the token's share of a mean over the
        update.
        """
        return {f"critic_{name}": value for name, value in self.trainable.step(batches, self._loss).items()}

    def save(self, folder: Path | str) -> None:
        """Everything needed to continue exactly."""
        self.trainable.save(folder)

    def load(self, folder: Path | str) -> None:
        """Continue from `save`."""
        self.trainable.load(folder)

    def _loss(self, model: nn.Module, batch: PackedBatch) -> LossOutput:
        (value,) = model(batch)
        columns = batch.columns
        per_token = value_loss(value, columns["value"], columns["target"], self.clip)
        loss = (columns["mean"] * batch.weight * per_token).sum()
        return LossOutput(loss, {"loss": loss.detach()}, {})
