"""The torch sampler gives what a rollout worker gives, with the learner's own log-probabilities."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from benchmarks.known_modes.sampler import TorchSampler
from examples.known_modes.language import BEGIN, END
from examples.known_modes.tokenizer import build_tokenizer
from learner.config import LearnerConfig
from learner.policy import PolicyLearner
from rollout.engine import decoder
from rollout.trajectory import REQUEST_SCHEMA, TRAJECTORY_SCHEMA, group_id

TEMPERATURE = 0.7


@pytest.fixture(scope="module")
def learner(assets: Path) -> PolicyLearner:
    config = LearnerConfig(device="cpu", threads=1, kl_coef=0.0)
    return PolicyLearner(
        str(assets / "known-modes" / "base"), config, temperature=TEMPERATURE, model_dtype="float32"
    )


@pytest.fixture
def sampler(learner: PolicyLearner) -> TorchSampler:
    return TorchSampler(learner.module, decoder(build_tokenizer("plain")), end_id=END, max_tokens=9)


def requests(sizes: list[int], seed: int = 5, prompts: list[list[int]] | None = None) -> pa.Table:
    rows = [
        {
            "group_id": group_id(3, index),
            "prompt_id": f"p{index}",
            "step": 3,
            "prompt_text": f"#{index}",
            "prompt_ids": [BEGIN] if prompts is None else prompts[index],
            "n": size,
            "seed": seed + index,
        }
        for index, size in enumerate(sizes)
    ]
    return pa.Table.from_pylist(rows, schema=REQUEST_SCHEMA)


def test_log_probabilities_are_the_learners(learner: PolicyLearner, sampler: TorchSampler) -> None:
    table = sampler(requests([40, 24]), version=7, temperature=TEMPERATURE)
    own = np.concatenate(learner.response_logprobs(table))
    said = table["response_logprobs"].combine_chunks().flatten().to_numpy()
    assert np.abs(own - said).max() < 1e-5
    hotter = sampler(requests([40, 24]), version=7, temperature=2.0)
    other = np.concatenate(learner.response_logprobs(hotter))
    assert np.abs(other - hotter["response_logprobs"].combine_chunks().flatten().to_numpy()).max() > 0.1


def test_tables_are_trajectories(sampler: TorchSampler) -> None:
    decode = decoder(build_tokenizer("plain"))
    table = sampler(requests([3, 200, 1]), version=7, temperature=1.0)
    assert table.schema.equals(TRAJECTORY_SCHEMA)
    rows = table.to_pylist()
    assert [row["sample"] for row in rows] == [*range(3), *range(200), 0]
    assert [row["prompt_id"] for row in rows] == ["p0"] * 3 + ["p1"] * 200 + ["p2"]
    assert rows[5]["trajectory_id"] == f"{group_id(3, 1)}/2"
    assert {row["policy_version"] for row in rows} == {row["policy_version_end"] for row in rows} == {7}
    ended = [row for row in rows if row["finish_reason"] == "stop"]
    cut = [row for row in rows if row["finish_reason"] == "length"]
    assert len(ended) + len(cut) == len(rows)
    assert all(row["response_ids"].index(END) == len(row["response_ids"]) - 1 for row in ended)
    assert all(END not in row["response_ids"] and len(row["response_ids"]) == 9 for row in cut)
    assert ended  # an untrained model ends one response in four before its ninth token
    assert cut
    for row in rows:
        assert len(row["response_ids"]) == len(row["response_logprobs"]) == len(row["token_ends"])
        assert row["response_text"] == decode(row["response_ids"])
        assert row["token_ends"][-1] == len(row["response_text"])


def test_the_draw_follows_the_seed(sampler: TorchSampler) -> None:
    one, again = (sampler(requests([64]), version=0) for _ in range(2))
    assert one.equals(again)
    assert not one["response_ids"].equals(sampler(requests([64], seed=6), version=0)["response_ids"])


def test_frequencies_are_those_of_the_model(learner: PolicyLearner, sampler: TorchSampler) -> None:
    """First tokens of 4,000 samples against the softmax of the model's own logits."""
    import torch

    with torch.no_grad():
        logits = learner.module(input_ids=torch.tensor([[BEGIN]])).logits[0, -1]
    exact = (logits / TEMPERATURE).softmax(-1).numpy()
    table = sampler(requests([4000]), version=0, temperature=TEMPERATURE)
    first = np.array([ids[0] for ids in table["response_ids"].to_pylist()])
    found = np.bincount(first, minlength=len(exact)) / len(first)
    assert np.abs(found - exact).max() < 5 * np.sqrt(exact.max() / 4000)


def test_prompts_of_several_lengths_are_refused(sampler: TorchSampler) -> None:
    with pytest.raises(ValueError, match="one length"):
        sampler(requests([2, 2], prompts=[[BEGIN], [BEGIN, 5]]), version=0)
