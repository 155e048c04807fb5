"""A job on two ranks, each a process of its own."""

import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

RANKS = 2
DEADLINE_S = 400.0
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["deepspeed.ops", "peft", "pyarrow"])  # which take ten seconds, once

Work = Callable[[dict[str, Any]], dict[Any, Any]]


def run_two_ranks(job: dict[str, Any], folder: Path, work: Work) -> dict[Any, Any]:
    """`work(job)` on both ranks of a gloo group; returns rank 0's results. `job` gets the field `folder`."""
    torch.save(job | {"folder": folder}, folder / "job.pt")
    for rank in range(RANKS):
        _log(folder, rank).touch()
    ranks = [
        _processes.Process(target=_rank, args=(work, folder, rank), daemon=True) for rank in range(RANKS)
    ]
    with patch.dict(os.environ, DS_ACCELERATOR="cpu"):  # read when DeepSpeed is first imported
        for process in ranks:
            process.start()
    deadline = time.monotonic() + DEADLINE_S
    try:
        for process in ranks:
            process.join(max(0.0, deadline - time.monotonic()))
        codes = [process.exitcode for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    said = "\n".join(_log(folder, rank).read_text()[-3000:] for rank in range(RANKS))
    assert codes == [0] * RANKS, f"exit codes {codes} (None: not done in {DEADLINE_S:g} s)\n{said}"
    results: dict[Any, Any] = torch.load(folder / "out.pt", weights_only=False)
    return results


def _log(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}.log"


def _rank(work: Work, folder: Path, rank: int) -> None:
    with _log(folder, rank).open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS
    )
    results = work(torch.load(folder / "job.pt", weights_only=False))
    if rank == 0:
        torch.save(results, folder / "out.pt")
    torch.distributed.barrier()
