"""Weight sync: learner to one rollout worker, against a raw gloo broadcast of as many bytes."""

import os
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks.speed.actors import RayLoop
from benchmarks.speed.contender import Result, Timer
from benchmarks.speed.workload import Workload


class Ours:
    """Learner in this process, rollout worker as a Ray actor; `seconds` is the wire time alone."""

    def __init__(self, workload: Workload) -> None:
        self.loop = RayLoop(workload)

    def turn(self, number: int) -> Result:
        with Timer() as timer:
            timings = self.loop.sync(number + 1)
        return {"seconds": timings.pop("wire_s"), **timings, "call_s": timer.seconds}

    def close(self) -> None:
        self.loop.close()


class Raw:
    """`torch.distributed.broadcast` of one buffer between two processes, memory touched beforehand."""

    def __init__(self, workload: Workload) -> None:
        self.bytes = _weight_bytes(workload)
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        context = mp.get_context("spawn")
        self.peer = context.Process(target=_receive, args=(store.port, self.bytes), daemon=True)
        self.peer.start()
        dist.init_process_group("gloo", store=store, rank=0, world_size=2)
        self.buffer = torch.randint(0, 256, (self.bytes,), dtype=torch.uint8)

    def turn(self, number: int) -> Result:
        dist.barrier()
        with Timer() as timer:
            dist.broadcast(self.buffer, src=0)
        dist.barrier()
        return {"seconds": timer.seconds, "bytes": self.bytes, "gb_per_s": self.bytes / timer.seconds / 1e9}

    def close(self) -> None:
        self.peer.terminate()
        self.peer.join()


def _receive(port: int, size: int) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=1, world_size=2)
    buffer = torch.zeros(size, dtype=torch.uint8)
    while True:
        dist.barrier()
        dist.broadcast(buffer, src=0)
        dist.barrier()


def _weight_bytes(workload: Workload) -> int:
    """Bytes of the model's weights in the workers' dtype, tied ones once."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config: Any = AutoConfig.from_pretrained(workload.model)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    size = getattr(torch, workload.dtype).itemsize
    return sum(parameter.numel() for parameter in model.parameters()) * size
