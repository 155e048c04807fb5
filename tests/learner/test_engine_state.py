"""A saved state belongs to no ZeRO stage and no number of ranks; what does not fit is refused by name."""

import random

import numpy as np
import pytest
import torch
from small_module import BATCHES, plain, trainable, weights

from learner.config import LearnerConfig
from learner.policy import PolicyLearner
from learner.random_state import load_random_state, save_random_state
from learner.whole_state import WholeFiles


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_state_goes_from_any_stage_to_any_other(tmp_path, dtype):
    """Weights, masters and moments are the same bits: so is what is saved again. On one rank the next update
    is too."""
    first = trainable(dtype, 1)
    for _ in range(2):
        first.step(BATCHES, plain)
    first.save(tmp_path / "1")
    first.step(BATCHES, plain)
    states = WholeFiles(tmp_path / "1").tensors()
    assert len(states) == 3 * 4
    for stage in (2, 3, 1):
        other = trainable(dtype, stage)
        other.load(tmp_path / "1")
        other.save(tmp_path / f"again-{stage}")
        again = WholeFiles(tmp_path / f"again-{stage}").tensors()
        assert states.keys() == again.keys()
        assert all(torch.equal(again[name], tensor) for name, tensor in states.items())
        other.step(BATCHES, plain)
        for a, b in zip(weights(other), weights(first), strict=True):
            torch.testing.assert_close(a, b, atol=1e-7, rtol=0)


def test_a_state_comes_back_into_a_model_that_has_gone_on(tmp_path):
    """And one that was saved before the first update takes the moments away again."""
    for stage in (1, 2, 3):
        model = trainable(torch.float32, stage)
        model.save(tmp_path / f"{stage}")
        made = [model.step(BATCHES, plain) for _ in range(2)]
        model.load(tmp_path / f"{stage}")
        assert model.updates == 0
        assert [model.step(BATCHES, plain) for _ in range(2)] == made


def test_a_state_of_another_model_or_not_whole_is_refused(tiny_model, uneven_table, tmp_path):
    def learner(**more):
        return PolicyLearner(
            str(tiny_model), LearnerConfig(device="cpu", kl_coef=0.0, **more), model_dtype="float32"
        )

    first = learner(lora={"rank": 2})
    first.train_step(uneven_table, 0)
    first.save(tmp_path / "state")
    with pytest.raises(ValueError, match=r"has shape \[2, 64\], this model's has \[3, 64\]"):
        learner(lora={"rank": 3}).load(tmp_path / "state")
    with pytest.raises(ValueError, match=r"holds no master/.*of another model, or not whole"):
        learner().load(tmp_path / "state")
    file = next((tmp_path / "state").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"safetensors is no safetensors file .* use an older checkpoint"):
        learner(lora={"rank": 2}).load(tmp_path / "state")


def test_another_number_of_ranks_seeds_the_generators_anew_and_alike(tmp_path, caplog):
    save_random_state(tmp_path, 0)
    drawn = []
    for rank in (0, 1, 1):
        load_random_state(tmp_path, rank, 2, saved_ranks=1)
        drawn.append((torch.rand(1).item(), float(np.random.rand()), random.random()))
    assert drawn[0] != drawn[1] == drawn[2]
    assert "was saved by 1 ranks, now there are 2" in caplog.text
    load_random_state(tmp_path, 0, 1, saved_ranks=1)
    first = torch.rand(1).item(), float(np.random.randn()), random.random()
    load_random_state(tmp_path, 0, 1, saved_ranks=1)
    assert first == (torch.rand(1).item(), float(np.random.randn()), random.random())
