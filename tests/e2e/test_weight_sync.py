"""Weight sync with everything real: DeepSpeed ranks, Ray actors, vLLM engines on CPU, gloo wire.

The tests share a fleet and run in order: the later ones take it apart.
"""

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray

from rollout.config import PolicyConfig, RolloutConfig, SamplingConfig
from rollout.trajectory import REQUEST_SCHEMA, TRAJECTORY_SCHEMA, group_id
from rollout.worker import BrokenWorkerError, RolloutWorker, StaleWorkerError

pytestmark = pytest.mark.e2e

PROBES = [[40, 41, 42, 43], [7, 300, 12], [100, 200, 17, 5, 64, 33]]
PROBE_TOKENS = 8
DEADLINE_S = 60.0


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

    def build(self, stage: int, workers: list[Any]) -> None:
        import deepspeed
        import torch
        from transformers import AutoModelForCausalLM

        from learner.weight_sender import ModuleWeights, WeightSender

        torch.set_num_threads(1)
        deepspeed.init_distributed(dist_backend="gloo", verbose=False)
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
        # Small buckets, so that the wire and the gathers have several.
        self.source = ModuleWeights(self.engine.module, dtype=torch.float32, gather_bytes=1 << 16)
        self.sender = WeightSender(
            self.source,
            workers,
            backend="gloo",
            rank=self.rank,
            world_size=self.world,
            deadline_s=DEADLINE_S,
            bucket_bytes=1 << 16,
        )

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
        original = type(self.source).__iter__

        class Interfering(type(self.source)):  # type: ignore[misc]
            def __iter__(self) -> Iterator[tuple[str, Any]]:
                for index, (name, tensor) in enumerate(original(self)):
                    if what == "corrupt" and name == target:
                        tensor = tensor.clone()
                        tensor.view(-1)[-1] += 1e-3
                    if what == "kill" and index == 10:
                        os.kill(target, signal.SIGKILL)
                        time.sleep(1.0)
                    yield name, tensor

        self.source.__class__ = Interfering

    def export(self, folder: str) -> None:
        """Write the whole weights as an HF folder (rank 0), not by the code under test."""
        from deepspeed.runtime.zero import GatheredParameters
        from transformers import AutoTokenizer

        module = self.engine.module
        parameters = list(module.parameters()) if self.stage == 3 else []
        with GatheredParameters(parameters, enabled=self.stage == 3):
            if self.rank == 0:
                state = {name: value.detach().clone() for name, value in module.named_parameters()}
                if module.config.tie_word_embeddings:
                    state["lm_head.weight"] = state["model.embed_tokens.weight"]
                module.save_pretrained(folder, state_dict=state)
                AutoTokenizer.from_pretrained(self.folder).save_pretrained(folder)


class Fleet:
    """Rollout workers by index, and the learner ranks."""

    def __init__(self, model: Path) -> None:
        self.model = model
        self.handles: dict[int, Any] = {}
        self.info: dict[int, dict[str, Any]] = {}
        actor = ray.remote(Rank).options(num_cpus=0.1)
        port = 29000 + os.getpid() % 2000
        self.ranks = [actor.remote(rank, 2, port, str(model)) for rank in range(2)]

    def start(self, *indices: int, model: Path | None = None) -> None:
        actor = ray.remote(RolloutWorker).options(num_cpus=0.1)
        for index in indices:
            self.handles[index] = actor.remote(
                index,
                RolloutConfig(start_timeout_s=400, sync_timeout_s=DEADLINE_S),
                PolicyConfig(dtype="float32"),
                SamplingConfig(max_tokens=PROBE_TOKENS),
                model=str(model or self.model),
                device="cpu",
                max_model_len=256,
            )
        infos = ray.get([self.handles[index].start.remote() for index in indices], timeout=450)
        self.info.update(zip(indices, infos, strict=True))

    def refs(self, *indices: int) -> list[Any]:
        from learner.weight_client import WorkerRef

        return [WorkerRef(index, self.handles[index]) for index in indices]

    def all_ranks(self, method: str, *arguments: Any) -> list[Any]:
        return ray.get([getattr(rank, method).remote(*arguments) for rank in self.ranks], timeout=180)

    def failure(self, method: str, *arguments: Any) -> tuple[Any, float]:
        """The WeightSyncError that every rank must raise, and the seconds until the last one did."""
        from learner.weight_client import WeightSyncError

        started = time.monotonic()
        errors = []
        for reference in [getattr(rank, method).remote(*arguments) for rank in self.ranks]:
            with pytest.raises(WeightSyncError) as caught:
                ray.get(reference, timeout=DEADLINE_S + 30)
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


def assert_same(got: list[Any], expected: list[Any]) -> None:
    assert [ids for ids, _ in got] == [ids for ids, _ in expected]
    for (_, left), (_, right) in zip(got, expected, strict=True):
        assert left == pytest.approx(right, abs=1e-4)


@pytest.fixture(scope="module")
def fleet(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    temporary = Path("/tmp") / f"rlgaf-ray-{os.getpid()}"  # Ray's socket paths must stay short
    search = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    ray.init(
        num_cpus=4,
        object_store_memory=200_000_000,
        include_dashboard=False,
        _temp_dir=str(temporary),
        runtime_env={"env_vars": {"PYTHONPATH": search}},  # the ranks unpickle `Rank` from this file
    )
    fleet = Fleet(tiny_model)
    fleet.start(0, 1)
    yield fleet
    ray.get([h.shutdown.remote() for i, h in fleet.handles.items() if i in fleet.info], timeout=60)
    ray.shutdown()
    shutil.rmtree(temporary, ignore_errors=True)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    root = tmp_path_factory.mktemp("exports")
    return lambda version: root / str(version)


@pytest.mark.parametrize(("stage", "version"), [(2, 1), (3, 2)])
def test_sync_is_exact(fleet: Fleet, exported: Callable[[int], Path], stage: int, version: int) -> None:
    before = ray.get(fleet.handles[0].probe.remote(PROBES, PROBE_TOKENS))
    fleet.all_ranks("build", stage, fleet.refs(0, 1))
    fleet.all_ranks("step", 0.02)
    fleet.all_ranks("export", str(exported(version)))
    fleet.all_ranks("connect")
    timings = fleet.all_ranks("send", version)
    assert timings[0] == timings[1]
    assert {"gather_s", "checksum_s", "wire_s", "worker_load_s", "worker_checksum_s"} <= timings[0].keys()

    expected = greedy_by_transformers(exported(version))
    for handle in fleet.handles.values():
        probes = ray.get(handle.probe.remote(PROBES, PROBE_TOKENS))
        assert_same(probes, expected)
        assert [lp for _, lp in probes] != [lp for _, lp in before]
        assert ray.get(handle.policy_version.remote()) == version
        table = ray.get(handle.generate.remote(requests(2, 2), version))
        assert table.schema == TRAJECTORY_SCHEMA
        assert set(table["policy_version"].to_pylist()) == {version}
        assert set(table["policy_version_end"].to_pylist()) == {version}


def test_a_fresh_engine_from_the_export_agrees(fleet: Fleet, exported: Callable[[int], Path]) -> None:
    fleet.start(2, model=exported(2))
    fresh, synced = ray.get([fleet.handles[i].probe.remote(PROBES, PROBE_TOKENS) for i in (2, 0)])
    assert_same(synced, fresh)


def test_a_worker_that_missed_a_sync_refuses(fleet: Fleet) -> None:
    with pytest.raises(StaleWorkerError, match="rollout worker 2 is stale: it has policy version 0"):
        ray.get(fleet.handles[2].generate.remote(requests(1, 1), 2))


def test_responses_in_flight_span_the_sync(fleet: Fleet) -> None:
    fleet.all_ranks("connect", fleet.refs(0, 1, 2))
    fleet.all_ranks("step", 0.001)
    running = fleet.handles[0].sample.remote(requests(16, 4), {"max_tokens": 240})
    time.sleep(0.5)
    fleet.all_ranks("send", 3)
    rows = ray.get(running).to_pylist()
    spanning = [row for row in rows if row["policy_version"] < row["policy_version_end"]]
    assert spanning
    assert {(row["policy_version"], row["policy_version_end"]) for row in spanning} == {(2, 3)}
    table = ray.get(fleet.handles[2].generate.remote(requests(1, 1), 3))
    assert table["policy_version"].to_pylist() == [3]


def test_a_worker_dead_between_syncs_costs_only_itself(fleet: Fleet) -> None:
    os.kill(fleet.info.pop(1)["pid"], signal.SIGKILL)
    error, seconds = fleet.failure("send", 4)
    assert seconds < DEADLINE_S
    assert set(error.failures) == {1}
    assert error.broken == (1,)
    assert "rollout worker 1" in str(error)
    fleet.all_ranks("connect", fleet.refs(0, 2))
    fleet.all_ranks("send", 4)
    assert ray.get([fleet.handles[i].policy_version.remote() for i in (0, 2)]) == [4, 4]


def test_a_corrupted_tensor_is_named_and_breaks_the_worker(fleet: Fleet) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    fleet.all_ranks("connect", fleet.refs(0))
    fleet.all_ranks("interfere", "corrupt", name)
    error, seconds = fleet.failure("send", 5)
    assert seconds < DEADLINE_S
    assert f"rollout worker 0: tensor {name} is corrupted: checksum expected" in str(error)
    assert error.broken == (0,)
    with pytest.raises(BrokenWorkerError, match=f"rollout worker 0 must be restarted.*{name}"):
        ray.get(fleet.handles[0].generate.remote(requests(1, 1)))


def test_a_worker_killed_during_a_sync_is_an_error_not_a_hang(fleet: Fleet) -> None:
    fleet.all_ranks("build", 3, fleet.refs(2))
    fleet.all_ranks("connect")
    fleet.all_ranks("interfere", "kill", fleet.info.pop(2)["pid"])
    error, seconds = fleet.failure("send", 6)
    assert seconds < DEADLINE_S
    assert "rollout worker 2" in str(error)
    assert error.broken == (2,)
