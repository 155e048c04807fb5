"""Learner ranks and rollout workers for tests of the weight sync: real DeepSpeed, Ray actors, vLLM on CPU."""

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
from rollout.worker import RolloutWorker
from services.config import load
from services.sampler_check import RESPONSE_TOKENS, bound, check_answers, check_requests

PROBES = [[40, 41, 42, 43], [7, 300, 12], [100, 200, 17, 5, 64, 33]]
PROBE_TOKENS = 8
DEADLINE_S = 25.0
START_S = 240.0

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

    def build(self, stage: int, folder: str = "") -> None:
        import torch
        from transformers import AutoModelForCausalLM

        from learner.engine import load_deepspeed

        torch.set_num_threads(1)
        self.folder = folder or self.folder
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

    def logprobs(self, rows: list[dict[str, Any]]) -> list[Any]:
        """Log-probabilities of response tokens by the plain model, one response after the other."""
        import torch

        answers = []
        for row in rows:
            prompt, response = row["prompt_ids"], row["response_ids"]
            with torch.no_grad():
                logits = self.engine(input_ids=torch.tensor([prompt + response])).logits[0].float()
            predicted = logits[len(prompt) - 1 : -1].log_softmax(-1)
            answers.append(predicted.gather(1, torch.tensor(response)[:, None])[:, 0].numpy())
        return answers

    def interfere(self, what: str, target: Any = None) -> None:
        """Make passes over the weights go wrong: `corrupt` a named tensor on its way, send another one in its
        place (`swap`), or `kill` a process midway; or let them be (`end`).
        """
        from learner.weight_source import ModuleWeights as original

        def swapped(source: Any, name: str, whole: Any) -> Any:
            return original._as_stored(source, name, whole * 0.9 if name == target else whole)

        def interfering(source: Any) -> Iterator[tuple[str, Any]]:
            for index, (name, tensor) in enumerate(original.__iter__(source)):
                if what == "corrupt" and name == target:
                    tensor = tensor.clone()
                    tensor.view(-1)[-1] += 1e-3
                if what == "kill" and index == 10:
                    os.kill(target, signal.SIGKILL)
                    time.sleep(1.0)
                yield name, tensor

        changes = {"end": {}, "swap": {"_as_stored": swapped}}.get(what, {"__iter__": interfering})
        self.source.__class__ = type("Interfering", (original,), changes)

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

    def check(self, dtype: str, *indices: int) -> None:
        """Compare these workers with the learner as a run does; raises SamplerError."""
        config = load(None, ["--policy.model=m", "--data.demonstrations=d", f"--policy.dtype={dtype}"])
        split = pa.table({"prompt_id": ["0", "1", "2"], "prompt_text": ["0", "1", "2"]})
        asked = check_requests(split, lambda text: PROBES[int(text)], len(indices))
        shares = [asked.take(list(range(i, asked.num_rows, len(indices)))) for i in range(len(indices))]
        calls = [
            self.handles[index].sample.remote(share, {"max_tokens": RESPONSE_TOKENS})
            for index, share in zip(indices, shares, strict=True)
        ]
        answers = pa.concat_tables(ray.get(calls, timeout=DEADLINE_S))
        logprobs = self.all_ranks("logprobs", answers.to_pylist())[0]
        most = bound(config, {"rollout": "cpu", "learner": "cpu"})
        check_answers(answers, logprobs, "after a weight sync", config, most)

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
