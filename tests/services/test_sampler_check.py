"""What rollout workers are asked when they are compared with the learner, and how far apart they may be."""

import pyarrow as pa
import pytest

from services.config import load
from services.sampler_check import PROMPT_TOKENS, RESPONSE_TOKENS, SEQUENCES, bound, check_requests


@pytest.mark.parametrize(("prompts", "workers"), [(1, 1), (3, 2), (20, 3)])
def test_every_worker_gets_the_same_few_short_sequences(prompts: int, workers: int) -> None:
    texts = [f"{i:02}" for i in range(prompts)]
    split = pa.table({"prompt_id": texts, "prompt_text": texts})
    asked = check_requests(split, lambda text: list(range(int(text), int(text) + 30)), workers)
    shares = [asked.take(list(range(i, asked.num_rows, workers))) for i in range(workers)]
    same = [share.select(["prompt_ids", "n", "seed"]) for share in shares]
    assert all(share.equals(same[0]) for share in same)
    assert SEQUENCES <= sum(same[0]["n"].to_pylist()) < 2 * SEQUENCES
    assert {len(ids) for ids in asked["prompt_ids"].to_pylist()} == {PROMPT_TOKENS}
    assert same[0]["prompt_ids"][0].as_py()[-1] == 29, "where the response begins"
    assert len(set(asked["group_id"].to_pylist())) == asked.num_rows
    assert PROMPT_TOKENS + RESPONSE_TOKENS < 16, "vLLM's smallest block, of which its prefix cache is made"


@pytest.mark.parametrize(
    ("policy", "learner", "device", "most"),
    [
        ("float32", "auto", "cpu", 1e-3),
        ("float32", "float32", "cpu", 1e-3),
        ("float32", "bfloat16", "cpu", 0.1),
        ("bfloat16", "float32", "cpu", 0.1),
        ("float32", "auto", "cuda", 0.1),
    ],
)
def test_the_bound_is_what_the_coarser_side_explains(policy, learner, device, most) -> None:
    words = [f"--policy.dtype={policy}", f"--learner.compute_dtype={learner}"]
    config = load(None, ["--policy.model=m", "--data.demonstrations=d", *words])
    assert bound(config, {"rollout": "cpu", "learner": device}) == most
