"""Run folders as `rlgaf train` leaves them, for what reads them."""

import json
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from services.checkpoint import CONFIG
from services.config import Config
from services.config_text import to_toml
from services.resume_rules import settled
from services.run_folder import checkpoints_of


def checkpointed(config: Config, step: int, **controller: Any) -> Path:
    """A run folder with a checkpoint of `step` and the rows up to it; returns the checkpoint's folder."""
    checkpoints = checkpoints_of(config)
    folder = checkpoints.begin(step)
    (folder / "weights").write_bytes(bytes(range(256)))
    (folder / CONFIG).write_text(to_toml(settled(config)))
    rows = [
        {"step": row, "time": 1.0, "wall_seconds": float(row), "reward/mean": 0.5} for row in range(step + 1)
    ]
    (config.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return checkpoints.commit(step, {"controller": {"step": step, **controller}})


def finished_run(folder: Path, seed: int, method: str = "rlgaf", best: float = 0.6) -> None:
    """A run of 60 steps, 640 answers and two minutes, whose best C2ST is `best`; the base's is .9."""
    folder.mkdir(parents=True)
    c2st = {"base": 0.9, "best": best, "last": 0.7, "human": 0.5}
    mode_tv = {"base": 0.7, "best": 0.1, "last": 0.2, "human": 0.0}
    summary: dict[str, Any] = {
        "method": method,
        "demonstrations": 2048,
        "best_step": 40,
        "steps": 60,
        "prompts_seen": 640 if method == "sft" else 160,
        "responses": {"trained": 0 if method == "sft" else 640},
        "wall_seconds": 99.0,
        "budget": {"rollout_tokens": 7, "seconds": {"learn": 3.0}},
        "evaluation": {
            name: {"mode_tv": mode_tv[name], "c2st": c2st[name], "nll": 2 * c2st[name], "chrf": -c2st[name]}
            for name in c2st
        },
        "alarms": [],
        "learning_curve": [{"step": 0, "c2st": 0.9}, {"step": 60, "c2st": 0.7}],
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "config.toml").write_text(
        f'[run]\nseed = {seed}\nmethod = "{method}"\noutput = "/home/me/runs"\n'
        '[policy]\nmodel = "/home/me/assets/known-modes/base"\n[discriminator]\nmodel = ""\n'
        '[evaluation]\nembedding_model = "/home/me/assets/minilm"\n'
    )
    rows = (
        {"step": 0, "time": 30.0, "wall_seconds": 30.0},
        {
            "step": 1,
            "time": 60.0,
            "wall_seconds": 60.0,
            "reward/mean": 0.5,
            "policy/kl": 0.01,
            "sync/wire_s": 0.1,
        },
        {"step": 60, "time": 950.0, "wall_seconds": 150.0},
    )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@contextmanager
def full_disk(room: int = 50_000) -> Iterator[None]:
    """The kernel refuses to let a file grow beyond `room` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
