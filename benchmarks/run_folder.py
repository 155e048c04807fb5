"""A finished run folder of `rlgaf train` as a raw result."""

import json
import tomllib
from pathlib import Path
from typing import Any

from benchmarks.recorded import recorded
from benchmarks.store import Result
from services.metrics import read_metrics

FOLDERS = (("policy", "model"), ("discriminator", "model"), ("evaluation", "embedding_model"))
"""Settings that may be a folder of this machine."""


def read_run(run: Path) -> Result:
    """What a finished run says of itself: rows of its test prompts, its curve with the minutes and samples
    that each evaluation came after, its cost, its settings.

    Minutes count from the evaluation of the base, warm-up and evaluations included; samples are the answers
    that were trained on, the model's own or, for `sft`, demonstrations.

    Raises:
        FileNotFoundError: the run is not finished, or is none.
    """
    summary: dict[str, Any] = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    config = tomllib.loads((run / "config.toml").read_text(encoding="utf-8"))
    # What a result keeps must mean the same on another machine.
    del config["run"]["output"]
    for section, field in FOLDERS:
        config[section][field] = "/".join(Path(config[section][field]).parts[-2:])
    metrics = read_metrics(run / "metrics.jsonl")
    times = {row["step"]: row["wall_seconds"] for row in metrics}
    samples = summary["prompts_seen"] / max(summary["steps"], 1)
    if summary["responses"]["trained"]:
        samples = summary["responses"]["trained"] / summary["steps"]
    curve = [
        row
        | {
            "minutes": (times[row["step"]] - times[min(times)]) / 60,
            "samples": row["step"] * samples,
        }
        for row in summary["learning_curve"]
        if row["step"] in times
    ]
    return {
        "method": summary["method"],
        "seed": config["run"]["seed"],
        "demonstrations": summary["demonstrations"],
        "best_step": summary["best_step"],
        "last_step": summary["steps"],
        "test": {name: summary["evaluation"][name] for name in ("base", "best", "last", "human")},
        "seconds": {"wall": summary["wall_seconds"]},
        "tokens": {name: count for name, count in summary["budget"].items() if name.endswith("_tokens")},
        "alarms": summary["alarms"],
        "curve": curve,
        "steps": [{"step": row["step"], **recorded(row)} for row in metrics if row["step"]],
        "config": config,
    }
