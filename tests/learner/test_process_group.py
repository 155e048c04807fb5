"""The store of a process group listens at its node's address and at no other."""

import json
import os
import subprocess
import sys

import psutil
from free_ports import free_ports

RANK = """
import json, sys
import psutil, torch, torch.distributed as dist
from learner.process_group import _use_own_stores
_use_own_stores()
dist.init_process_group("gloo", init_method="env://", rank=int(sys.argv[1]), world_size=2)
total = torch.ones(1)
dist.all_reduce(total)
me = psutil.Process().net_connections("inet")
addresses = sorted({one.laddr.ip for one in me if one.status == psutil.CONN_LISTEN})
dist.barrier()
print(json.dumps([total.item(), addresses]))
"""


def test_two_ranks_meet_on_loopback():
    (port,) = free_ports(1)
    own = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": loopback()}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank)], env=os.environ | own, stdout=subprocess.PIPE
        )
        for rank in range(2)
    ]
    for rank in ranks:
        said = rank.communicate(timeout=120)[0].decode().splitlines()
        assert json.loads(said[-1]) == [2.0, ["127.0.0.1"]]


def loopback() -> str:
    """The interface's name: where gloo's own connections go, which is not what is tested."""
    return next(
        name
        for name, addresses in psutil.net_if_addrs().items()
        if any(address.address == "127.0.0.1" for address in addresses)
    )
