"""Weight sync with everything real: DeepSpeed ranks, Ray actors, vLLM engines on CPU, gloo wire.

The tests run in order and share two learner ranks and first workers 0 and 1, in fp32, which they take apart;
then 2 and 3, in bf16. No more than two engines live at once, for their memory.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pytest
import ray
from sync_fleet import DEADLINE_S, PROBE_TOKENS, PROBES, Fleet

from rollout.trajectory import REQUEST_SCHEMA, TRAJECTORY_SCHEMA, group_id
from rollout.worker import BrokenWorkerError, StaleWorkerError
from services.sampler_check import SamplerError

pytestmark = pytest.mark.e2e

FP32, BF16 = "float32", "bfloat16"


def requests(count: int, n: int) -> pa.Table:
    rows = [
        {
            "group_id": group_id(1, index),
            "prompt_id": f"prompt-{index}",
            "step": 1,
            "prompt_text": "",
            "prompt_ids": PROBES[index % len(PROBES)],
            "n": n,
            "seed": None,
        }
        for index in range(count)
    ]
    return pa.Table.from_pylist(rows, schema=REQUEST_SCHEMA)


def greedy_by_transformers(folder: Path) -> list[tuple[list[int], list[float]]]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    answers = []
    for probe in PROBES:
        ids, logprobs = list(probe), []
        for _ in range(PROBE_TOKENS):
            with torch.no_grad():
                row = model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            ids.append(int(row.argmax()))
            logprobs.append(float(row.max()))
            if ids[-1] == model.config.eos_token_id:
                break
        answers.append((ids[len(probe) :], logprobs))
    return answers


def assert_same(got: list[Any], expected: list[Any], tolerance: float) -> None:
    """Greedy answers: the same tokens, and log-probabilities within the tolerance."""
    assert [ids for ids, _ in got] == [ids for ids, _ in expected]
    for (_, left), (_, right) in zip(got, expected, strict=True):
        assert left == pytest.approx(right, rel=0, abs=tolerance)


@pytest.fixture(scope="module")
def fleet(ray_cluster: None, tiny_model: Path) -> Iterator[Fleet]:
    fleet = Fleet(tiny_model)
    fleet.start(FP32, {0: tiny_model, 1: tiny_model})
    yield fleet
    fleet.stop(*fleet.info)
    for rank in fleet.ranks:
        ray.kill(rank)


@pytest.fixture(scope="module")
def tiny_experts(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A random Qwen3-MoE of two layers with four experts, two for a token, and the tiny model's tokenizer."""
    from transformers import AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

    folder = tmp_path_factory.mktemp("models") / "experts"
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        moe_intermediate_size=48,  # which the CPU kernel pads
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=256,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.1,
    )
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("exports")


@pytest.mark.parametrize(("stage", "version"), [(2, 1), (3, 2)])
def test_sync_is_exact(fleet: Fleet, exports: Path, stage: int, version: int) -> None:
    workers = (0, 1)
    before = fleet.probe(*workers)
    fleet.all_ranks("build", stage)
    fleet.all_ranks("step", 0.02)
    fleet.all_ranks("export", str(exports / FP32), FP32)
    fleet.all_ranks("wire", FP32, fleet.refs(*workers))
    timings = fleet.all_ranks("send", version)
    assert timings[0] == timings[1]
    assert {"gather_s", "checksum_s", "wire_s", "worker_load_s", "worker_checksum_s"} <= timings[0].keys()

    expected = greedy_by_transformers(exports / FP32)
    for index, old, new in zip(workers, before, fleet.probe(*workers), strict=True):
        assert_same(new, expected, 1e-4)
        assert [logprobs for _, logprobs in new] != [logprobs for _, logprobs in old]
        table = ray.get(fleet.handles[index].generate.remote(requests(2, 2), version), timeout=DEADLINE_S)
        assert table.schema == TRAJECTORY_SCHEMA
        assert set(table["policy_version"].to_pylist()) == {version}
        assert set(table["policy_version_end"].to_pylist()) == {version}
    assert fleet.versions(*workers) == [version] * len(workers)


def test_one_wrong_weight_in_a_worker_is_seen(fleet: Fleet) -> None:
    """Its checksum is that of the wrong weight: nothing but the worker's own numbers can tell."""
    fleet.check(FP32, 0, 1)
    fleet.all_ranks("interfere", "swap", "model.layers.1.mlp.down_proj.weight")
    fleet.all_ranks("send", 2)
    with pytest.raises(
        SamplerError, match="rollout worker 0 is not the learner's policy after a weight sync"
    ):
        fleet.check(FP32, 0, 1)
    fleet.all_ranks("interfere", "end")
    fleet.all_ranks("send", 2)
    fleet.check(FP32, 0, 1)


def test_a_worker_that_missed_a_sync_refuses(fleet: Fleet) -> None:
    fleet.all_ranks("connect", fleet.refs(0))
    fleet.all_ranks("send", 3)
    with pytest.raises(StaleWorkerError, match="rollout worker 1 is stale: it has policy version 2"):
        ray.get(fleet.handles[1].generate.remote(requests(1, 1), 3), timeout=DEADLINE_S)


def test_responses_in_flight_span_the_sync(fleet: Fleet) -> None:
    fleet.all_ranks("connect", fleet.refs(0, 1))
    fleet.all_ranks("step", 0.001)
    long = {"max_tokens": 240, "min_tokens": 240}
    running = fleet.handles[0].sample.remote(requests(16, 4), long)
    # Queued behind the long ones: once it is answered, they have begun.
    ray.get(fleet.handles[0].sample.remote(requests(1, 1), {"max_tokens": 1}), timeout=DEADLINE_S)
    fleet.all_ranks("send", 4)
    rows = ray.get(running, timeout=3 * DEADLINE_S).to_pylist()
    assert {len(row["response_ids"]) for row in rows} == {240}
    spans = {(row["policy_version"], row["policy_version_end"]) for row in rows}
    assert (3, 4) in spans
    assert spans <= {(3, 4), (4, 4)}
    table = ray.get(fleet.handles[1].generate.remote(requests(1, 1), 4), timeout=DEADLINE_S)
    assert table["policy_version"].to_pylist() == [4]  # no longer stale


def test_a_worker_dead_between_syncs_costs_only_itself(fleet: Fleet) -> None:
    engine = fleet.kill(1)
    assert engine
    error, seconds = fleet.failure("send", 5)
    assert seconds < 10
    assert set(error.failures) == {1}
    assert error.broken == (1,)
    assert "rollout worker 1" in str(error)
    _, alive = psutil.wait_procs(engine, timeout=5)
    assert not alive  # the engine does not outlive its actor

    error, seconds = fleet.failure("connect", fleet.refs(0, 1))
    assert seconds < 10
    assert set(error.failures) == {1}
    assert error.broken == (1,)
    fleet.all_ranks("connect", fleet.refs(0))
    fleet.all_ranks("send", 5)
    assert fleet.versions(0) == [5]


def test_a_corrupted_tensor_is_named_and_breaks_the_worker(fleet: Fleet) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    fleet.all_ranks("interfere", "corrupt", name)
    error, seconds = fleet.failure("send", 6)
    assert seconds < 10
    assert f"rollout worker 0: tensor {name} is corrupted: checksum expected" in str(error)
    assert error.broken == (0,)
    with pytest.raises(BrokenWorkerError, match=f"rollout worker 0 must be restarted.*{name}"):
        ray.get(fleet.handles[0].generate.remote(requests(1, 1)), timeout=DEADLINE_S)


def test_a_bf16_worker_equals_a_fresh_engine_from_the_bf16_export(fleet: Fleet, exports: Path) -> None:
    fleet.all_ranks("export", str(exports / BF16), BF16)
    fleet.stop(0)
    fleet.start(BF16, {2: fleet.model, 3: exports / BF16})
    before, fresh = fleet.probe(2, 3)
    fleet.all_ranks("wire", BF16, fleet.refs(2))
    fleet.all_ranks("send", 6)
    (synced,) = fleet.probe(2)
    assert_same(synced, fresh, 1e-3)
    assert [logprobs for _, logprobs in synced] != [logprobs for _, logprobs in before]
    fleet.check(BF16, 2)


def test_a_worker_killed_during_a_sync_is_an_error_not_a_hang(fleet: Fleet) -> None:
    fleet.all_ranks("wire", BF16, fleet.refs(2, 3))
    victim = fleet.info.pop(3)["pid"]
    engine = psutil.Process(victim).children(recursive=True)
    fleet.all_ranks("interfere", "kill", victim)
    error, seconds = fleet.failure("send", 7)
    assert seconds < 10
    assert "rollout worker 3" in error.failures[3] or "Died" in error.failures[3]
    assert error.broken == (2, 3)  # the update of both had begun
    _, alive = psutil.wait_procs(engine, timeout=5)
    assert not alive


def test_a_sync_of_a_mixture_of_experts_is_exact(fleet: Fleet, tiny_experts: Path) -> None:
    """Of the weights that the worker has, and of others."""
    fleet.stop(*fleet.info)
    fleet.start(FP32, {4: tiny_experts})
    fleet.all_ranks("build", 2, str(tiny_experts))
    fleet.check(FP32, 4)
    fleet.all_ranks("wire", FP32, fleet.refs(4))
    (before,) = fleet.probe(4)
    fleet.all_ranks("send", 1)
    fleet.check(FP32, 4)
    fleet.all_ranks("step", 0.02)
    fleet.all_ranks("send", 2)
    (after,) = fleet.probe(4)
    assert [logprobs for _, logprobs in after] != [logprobs for _, logprobs in before]
    fleet.check(FP32, 4)
