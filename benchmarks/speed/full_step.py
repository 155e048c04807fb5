"""The whole system: `rlgaf train` for a few steps, scoring, discriminator and reference included,
read off its metrics.

Responses end where the model ends them, so a step has at most as many tokens as the other contenders' steps.
Policy and discriminator train adapters: all weights of two 135M models would need more than 24 GiB.
"""

import json
import os
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

from benchmarks.speed.processes import Peaks, by_title, peaks
from benchmarks.speed.workload import Workload

PHASES = ("generate", "score", "learn", "sync", "discriminate")
POLL_S = 1.0
LORA_RANK = 32


def run_full_steps(workload: Workload, repeats: int, data: dict[str, Any], log: Path) -> dict[str, Any]:
    """Seconds from step to step (the first one left out), seconds by phase, peak memory by process.

    data: the `data` section's fields. Raises RuntimeError with the log's end when the run fails.
    """
    folder = Path(workload.scratch) / "full"
    fields = _fields(workload, repeats, data, folder)
    words = [f"--{name}={json.dumps(value)}" for name, value in fields.items()]
    environment = os.environ | {"OMP_NUM_THREADS": str(workload.threads)}
    config = folder.with_suffix(".toml")
    config.write_text("")
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", "from services.cli import main; main()", "train", str(config), *words],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
        )
        found: Peaks = {}
        while process.poll() is None:
            time.sleep(POLL_S)
            try:
                found |= peaks("controller", process.pid)
            except (psutil.Error, FileNotFoundError):
                continue
    if process.returncode:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-25:])
        raise RuntimeError(f"rlgaf train ended with code {process.returncode}; the end of {log}:\n{tail}")
    _, *rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    details = [
        {"seconds": later["time"] - earlier["time"]}
        | {f"{phase}_s": later[f"seconds/{phase}"] for phase in PHASES}
        | {"new_tokens": later["policy/tokens_response"]}
        for earlier, later in pairwise(rows)
    ]
    return {"details": details, "peak_mib": by_title(found)}


def _fields(workload: Workload, repeats: int, data: dict[str, Any], folder: Path) -> dict[str, Any]:
    fields = {
        "run.name": folder.name,
        "run.output": str(folder.parent),
        "run.steps": repeats + 1,
        "run.prompts_per_step": len(workload.prompts),
        "run.checkpoint_every": 0,
        "policy.model": workload.model,
        "policy.dtype": workload.dtype,
        "sampling.group_size": workload.group_size,
        "sampling.max_tokens": workload.response_tokens,
        "rollout.threads": workload.threads,
        "learner.threads": workload.threads,
        "learner.micro_batch_tokens": workload.micro_batch_tokens,
        "discriminator.micro_batch_tokens": workload.micro_batch_tokens,
        "learner.lora.rank": LORA_RANK,
        "discriminator.lora.rank": LORA_RANK,
        "discriminator.audit.enabled": False,  # its 2,000 base samples would take longer than the steps
        "discriminator.warmup_max_steps": 1,
        "evaluation.every": repeats + 1,
        "evaluation.prompts": 8,
        "evaluation.test_prompts": 8,
        "evaluation.embedding_model": "none",
    }
    return fields | {f"data.{name}": value for name, value in data.items()}
