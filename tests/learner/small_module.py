"""A module of four small parameters, and its engine on one rank."""

import torch
from torch import nn

from learner.config import OptimizerConfig
from learner.engine import TrainableModel
from learner.losses import LossOutput

BATCHES = [torch.full((2, 5), 1.0 + i) for i in range(3)]


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(5, 3)
        self.second = nn.Linear(3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(self.first.weight.dtype)
        return self.second(torch.tanh(self.first(x))).mean()


def trainable(dtype, stage) -> TrainableModel:
    cfg = OptimizerConfig(lr=1e-2, zero_stage=stage, device="cpu", lr_schedule="linear", schedule_steps=9)
    return TrainableModel(Small(), cfg, dtype=dtype)


def weights(model: TrainableModel) -> list[torch.Tensor]:
    with model.gathered():
        return [weight.detach().clone() for weight in model.module.parameters()]


def plain(module, x):
    out = module(x)
    return LossOutput(out, {"loss": out.detach()}, {})
