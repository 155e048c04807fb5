"""Ray Train's process groups, whose store listens at rank 0's own address and nowhere else.

torch's store answers everyone who reaches it and listens on all of the machine's addresses. On a cluster of
one machine this one is on 127.0.0.1.
"""

from dataclasses import dataclass
from datetime import timedelta
from importlib import import_module
from typing import Any

import torch.distributed as dist
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

from rollout.wire import listening_store


@dataclass
class NodeTorchConfig(TorchConfig):
    """TorchConfig with such a store."""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        """Before Ray's own."""
        return _NodeBackend


class _NodeBackend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        worker_group.execute(_use_own_stores)
        super().on_start(worker_group, backend_config)


def _use_own_stores() -> None:
    """In a rank: torch makes the store of `init_process_group` here."""
    # By name: torch.distributed.rendezvous is a function of that module.
    rendezvous: Any = import_module("torch.distributed.rendezvous")
    assert callable(rendezvous._create_c10d_store), "this torch makes its stores elsewhere"
    rendezvous._create_c10d_store = _store


def _store(
    host: str, port: int, rank: int, world_size: int, timeout: timedelta, use_libuv: bool = True
) -> dist.TCPStore:
    if rank == 0:
        return listening_store(host, timeout, port)
    return dist.TCPStore(host, port, world_size, False, timeout)
