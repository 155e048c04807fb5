"""Loss and gradient that are not finite leave no trace, and weights that are not finite go nowhere."""

import math

import pytest
import torch
from torch import nn

from learner.config import OptimizerConfig
from learner.engine import TrainableModel
from learner.losses import LossOutput

KINDS = [(dtype, stage) for dtype in (torch.float32, torch.bfloat16) for stage in (1, 2, 3)]


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(5, 3)
        self.second = nn.Linear(3, 1)

    def forward(self, x):
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


def with_(value, where):
    """A loss that is `value` itself, or whose gradient alone is, in one of the micro-batches."""

    def loss(module, x):
        out = module(x)
        if x[0, 0] == 2:
            out = out + value if where == "loss" else out + (out - out.detach()) * value
        return LossOutput(out, {"loss": out.detach()}, {})

    return loss


@pytest.mark.parametrize(("dtype", "stage"), KINDS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_skipped_update_leaves_no_trace(dtype, stage, value, where):
    batches = [torch.full((2, 5), float(i)).to(dtype) for i in range(3)]
    one, other = trainable(dtype, stage), trainable(dtype, stage)
    for model in (one, other):
        model.step(batches, plain)
    before = weights(other)
    skipped = other.step(batches, with_(value, where))
    assert skipped["skipped"] == 1.0
    assert all(torch.equal(a, b) for a, b in zip(weights(other), before, strict=True))
    assert other.updates == 1
    for _ in range(2):
        made = [model.step(batches, plain) for model in (one, other)]
        assert made[0] == made[1]
        assert made[0]["skipped"] == 0.0
    assert all(torch.equal(a, b) for a, b in zip(weights(one), weights(other), strict=True))


@pytest.mark.parametrize(("dtype", "stage"), KINDS)
def test_weights_that_are_not_finite_are_not_saved(dtype, stage, tmp_path):
    model = trainable(dtype, stage)
    model.step([torch.ones(2, 5).to(dtype)], plain)
    model.require_finite()
    import deepspeed

    weight = model.module.first.weight
    with deepspeed.zero.GatheredParameters([weight], modifier_rank=0, enabled=stage == 3):
        weight.data[1, 2] = math.inf
    with pytest.raises(FloatingPointError, match=r"first\.weight"):
        model.save(tmp_path / "state")
    assert not (tmp_path / "state").exists()
