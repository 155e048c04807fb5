"""A learner job on two ranks, each a process of its own."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch


def run_two_ranks(job: dict[str, Any], folder: Path, script: str = "zero_worker.py") -> dict[Any, Any]:
    """What `script` makes of `job`, by ZeRO stage or name (see there for its fields; `out` is filled in)."""
    torch.save(job | {"out": str(folder / "out.pt")}, folder / "job.pt")
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    worker = str(Path(__file__).with_name(script))
    ranks = [
        subprocess.Popen(
            [sys.executable, worker, str(folder / "job.pt"), str(rank), "2", str(folder / "rendezvous")],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=400)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], "\n".join(o[-3000:] for o in outputs)
    results: dict[Any, Any] = torch.load(folder / "out.pt", weights_only=False)
    return results
