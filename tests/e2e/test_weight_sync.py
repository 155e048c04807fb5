"""Weight sync with everything real: DeepSpeed ranks, Ray actors, vLLM engines on CPU, gloo wire.

The tests run in order and share two learner ranks and first workers 0 and 1, in fp32, which they take apart;
then 2 and 3, in bf16. No more than two engines live at once, for their memory.
"""

import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pytest
import ray

from rollout.config import PolicyConfig, RolloutConfig, SamplingConfig
from rollout.trajectory import REQUEST_SCHEMA, TRAJECTORY_SCHEMA, group_id
from rollout.worker import BrokenWorkerError, RolloutWorker, StaleWorkerError

pytestmark = pytest.mark.e2e

PROBES = [[40, 41, 42, 43], [7, 300, 12], [100, 200, 17, 5, 64, 33]]
PROBE_TOKENS = 8
DEADLINE_S = 25.0
START_S = 240.0
FP32, BF16 = "float32", "bfloat16"

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # no Ray process can import this file


class Rank:
    """One rank of a two-rank DeepSpeed group around the tiny model."""

    def __init__(self, rank: int, world: int, port: int, folder: str) -> None:
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK="0",
            WORLD_SIZE=str(world),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
            OMP_NUM_THREADS="1",
        )
        self.rank, self.world, self.folder = rank, world, folder

    def build(self, stage: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        from learner.engine import load_deepspeed

        torch.set_num_threads(1)
        deepspeed = load_deepspeed(torch.device("cpu"))
        model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32)
        self.engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=torch.optim.AdamW(model.parameters(), lr=1e-3),
            config={
                "train_micro_batch_size_per_gpu": 1,
                "zero_optimization": {"stage": stage},
                "zero_allow_untested_optimizer": True,
            },
        )
        self.engine(input_ids=torch.tensor([PROBES[0]]))
        self.stage = stage

    def wire(self, dtype: str, workers: list[Any]) -> None:
        """A new sender for these workers; small buckets, so that the wire and the gathers have several."""
        import torch

        from learner.weight_sender import ModuleWeights, WeightSender

        self.source = ModuleWeights(self.engine.module, dtype=getattr(torch, dtype), gather_bytes=1 << 16)
        self.sender = WeightSender(
            self.source,
            workers,
            backend="gloo",
            rank=self.rank,
            world_size=self.world,
            deadline_s=DEADLINE_S,
            bucket_bytes=1 << 16,
        )
        self.sender.connect()

    def step(self, scale: float) -> None:
        """A real optimizer step on random data, large enough to change greedy tokens."""
        import torch

        for group in self.engine.optimizer.param_groups:
            group["lr"] = scale
        torch.manual_seed(self.rank)
        ids = torch.randint(0, 300, (1, 32))
        self.engine.backward(self.engine(input_ids=ids, labels=ids).loss)
        self.engine.step()

    def connect(self, workers: list[Any] | None = None) -> None:
        self.sender.connect(workers)

    def send(self, version: int) -> dict[str, float]:
        return self.sender.send(version)

    def interfere(self, what: str, target: Any) -> None:
        """Make passes over the weights go wrong: `corrupt` a named tensor, or `kill` a process midway."""
        original = type(self.source)

        def interfering(source: Any) -> Iterator[tuple[str, Any]]:
            for index, (name, tensor) in enumerate(original.__iter__(source)):
                if what == "corrupt" and name == target:
                    tensor = tensor.clone()
                    tensor.view(-1)[-1] += 1e-3
                if what == "kill" and index == 10:
                    os.kill(target, signal.SIGKILL)
                    time.sleep(1.0)
                yield name, tensor

        self.source.__class__ = type("Interfering", (original,), {"__iter__": interfering})

    def export(self, folder: str, dtype: str) -> None:
        """Write the whole weights as an HF folder (rank 0), not by the code under test."""
        import deepspeed
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        module = self.engine.module
        parameters = list(module.parameters()) if self.stage == 3 else []
        with deepspeed.zero.GatheredParameters(parameters, enabled=self.stage == 3):
            state = {name: value.detach().clone() for name, value in module.named_parameters()}
        if self.rank == 0:
            plain = AutoModelForCausalLM.from_config(module.config)
            state["lm_head.weight"] = state["model.embed_tokens.weight"]
            plain.load_state_dict(state)
            plain.to(getattr(torch, dtype)).save_pretrained(folder)
            AutoTokenizer.from_pretrained(self.folder).save_pretrained(folder)


class Fleet:
    """Rollout workers by index, and the learner ranks."""

    def __init__(self, model: Path) -> None:
        self.model = model
        self.handles: dict[int, Any] = {}
        self.info: dict[int, dict[str, Any]] = {}
        actor = ray.remote(Rank).options(num_cpus=0.1)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.ranks = [actor.remote(rank, 2, port, str(model)) for rank in range(2)]

    def start(self, dtype: str, models: dict[int, Path]) -> None:
        actor = ray.remote(RolloutWorker).options(num_cpus=0.1, max_concurrency=16)
        for index, model in models.items():
            self.handles[index] = actor.remote(
                index,
                RolloutConfig(start_timeout_s=START_S, sync_timeout_s=DEADLINE_S),
                PolicyConfig(dtype=dtype),
                SamplingConfig(max_tokens=PROBE_TOKENS),
                model=str(model),
                device="cpu",
                max_model_len=256,
            )
        infos = ray.get([self.handles[index].start.remote() for index in models], timeout=START_S + 20)
        self.info.update(zip(models, infos, strict=True))

    def kill(self, index: int) -> list[psutil.Process]:
        """SIGKILL a worker's actor process; returns its children: the processes of its engine."""
        actor = psutil.Process(self.info.pop(index)["pid"])
        children = actor.children(recursive=True)
        actor.kill()
        return children

    def stop(self, *indices: int) -> None:
        ray.get([self.handles[index].shutdown.remote() for index in indices], timeout=60)
        for index in indices:
            del self.info[index]
            ray.kill(self.handles.pop(index))

    def probe(self, *indices: int) -> list[Any]:
        calls = [self.handles[index].probe.remote(PROBES, PROBE_TOKENS) for index in indices]
        return ray.get(calls, timeout=DEADLINE_S)

    def versions(self, *indices: int) -> list[int]:
        """The versions that the engines themselves report."""
        return ray.get([self.handles[i].policy_version.remote() for i in indices], timeout=DEADLINE_S)

    def refs(self, *indices: int) -> list[Any]:
        from learner.weight_client import WorkerRef

        return [WorkerRef(index, self.handles[index]) for index in indices]

    def all_ranks(self, method: str, *arguments: Any) -> list[Any]:
        calls = [getattr(rank, method).remote(*arguments) for rank in self.ranks]
        return ray.get(calls, timeout=3 * DEADLINE_S)

    def failure(self, method: str, *arguments: Any) -> tuple[Any, float]:
        """The WeightSyncError that every rank must raise, and the seconds until the last one did.

        A worker that is gone must show at once, not at the deadline.
        """
        from learner.weight_client import WeightSyncError

        started = time.monotonic()
        errors = []
        for reference in [getattr(rank, method).remote(*arguments) for rank in self.ranks]:
            with pytest.raises(WeightSyncError) as caught:
                ray.get(reference, timeout=DEADLINE_S + 15)
            errors.append(caught.value.cause)
        assert str(errors[0]) == str(errors[1])
        return errors[0], time.monotonic() - started


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
