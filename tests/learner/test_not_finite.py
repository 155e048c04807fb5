"""Loss and gradient that are not finite leave no trace, and weights that are not finite go nowhere."""

import math

import pytest
import torch
from small_module import BATCHES, plain, trainable, weights

from learner.losses import LossOutput

KINDS = [(dtype, stage) for dtype in (torch.float32, torch.bfloat16) for stage in (1, 2, 3)]


def with_(value, where):
    """A loss that is `value` itself, or whose gradient alone is, in one of the micro-batches."""

    def loss(module, x):
        out = module(x)
        if x[0, 0] == 3:
            out = out + value if where == "loss" else out + (out - out.detach()) * value
        return LossOutput(out, {"loss": out.detach()}, {})

    return loss


@pytest.mark.parametrize(("dtype", "stage"), KINDS)
@pytest.mark.parametrize(("value", "where"), [(math.inf, "loss"), (math.nan, "gradient")])
def test_a_skipped_update_leaves_no_trace(dtype, stage, value, where):
    one, other = trainable(dtype, stage), trainable(dtype, stage)
    for model in (one, other):
        model.step(BATCHES, plain)
    before = weights(other)
    skipped = other.step(BATCHES, with_(value, where))
    assert skipped["skipped"] == 1.0
    assert all(torch.equal(a, b) for a, b in zip(weights(other), before, strict=True))
    assert other.updates == 1
    for _ in range(2):
        made = [model.step(BATCHES, plain) for model in (one, other)]
        assert made[0] == made[1]
        assert made[0]["skipped"] == 0.0
    assert all(torch.equal(a, b) for a, b in zip(weights(one), weights(other), strict=True))


@pytest.mark.parametrize(("dtype", "stage"), KINDS)
def test_weights_that_are_not_finite_are_not_saved(dtype, stage, tmp_path):
    model = trainable(dtype, stage)
    model.step(BATCHES, plain)
    model.require_finite()
    import deepspeed

    weight = model.module.first.weight
    with deepspeed.zero.GatheredParameters([weight], modifier_rank=0, enabled=stage == 3):
        weight.data[1, 2] = math.inf
    with pytest.raises(FloatingPointError, match=r"first\.weight"):
        model.save(tmp_path / "state")
    assert not (tmp_path / "state").exists()


def test_a_weight_that_overflows_on_the_wire_is_not_sent():
    from learner.weight_source import ModuleWeights

    module = torch.nn.Linear(2, 2)
    module.weight.data[0, 0] = 3.4e38  # finite in fp32, not in bfloat16
    assert len([*ModuleWeights(module)]) == 4
    with pytest.raises(FloatingPointError, match="weight is not finite in torch"):
        [*ModuleWeights(module, dtype=torch.bfloat16)]
