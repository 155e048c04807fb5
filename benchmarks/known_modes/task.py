"""Carries out one task in this process and gives its result as JSON-ready numbers."""

import math
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from benchmarks.known_modes.artefacts import PLANTS, UNPLANTED, newline_base
from benchmarks.known_modes.auditing import audit_sides
from benchmarks.known_modes.cells import Task
from benchmarks.known_modes.data import TARGETS, fresh_texts, write_data
from benchmarks.known_modes.training import Outcome, Run
from benchmarks.store import Result
from examples.known_modes.language import parse_text
from services.methods import method_title


def carry_out(task: Task, assets: Path) -> Result:
    """Run a task; a run whose gradient is not finite any more is a result too, with `failed`."""
    wall, cpu = time.monotonic(), time.process_time()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "base").mkdir()
        base = assets / task.cell.base / "base"
        if task.cell.data.plant == "trailing newline":
            base = newline_base(base, folder / "base")
        write_data(folder / "demonstrations.jsonl", task.cell.data, task.seed)
        config = task.config(base, folder / "demonstrations.jsonl", folder)
        result: Result = {
            "grid": task.grid,
            "cell": task.cell.name,
            "method": method_title(config),
            "seed": task.seed,
            "candidate": task.candidate,
            "settings": task.settings,
            "chosen": dict(task.chosen),
            "data": asdict(task.cell.data),
            "demonstrations": config.data.max_demonstrations or task.cell.data.train,
        }
        run = Run(
            config,
            TARGETS[task.cell.data.source],
            plant=PLANTS.get(task.cell.data.plant),
            guard=task.cell.guard,
        )
        result |= _KINDS[task.cell.kind](task, run)
    seconds = {"wall": time.monotonic() - wall, "cpu": time.process_time() - cpu}
    return {**result, "seconds": seconds | result.get("seconds", {})}


def _train(task: Task, run: Run) -> Result:
    failed = ""
    try:
        run.train(closing=task.candidate is None)
    except FloatingPointError as error:
        failed = str(error)
    return {"failed": failed, **_result(run.outcome)}


def _result(outcome: Outcome) -> Result:
    return {
        "best_step": outcome.best_step,
        "last_step": outcome.last_step,
        "selection": outcome.selection,
        "test": outcome.test,
        "discriminator_accuracy": outcome.discriminator_accuracy,
        "warm_up": outcome.warm_up,
        "tokens": outcome.tokens,
        "seconds": outcome.phases,
        "alarms": [asdict(alarm) for alarm in outcome.alarms],
        "known_alarms": [asdict(alarm) for alarm in outcome.known_alarms],
        "curve": outcome.curve,
        "steps": outcome.steps,
    }


def _reference(task: Task, run: Run) -> Result:
    """Rows of the base and of fresh answers of the demonstrations' own writer."""
    target = TARGETS[task.cell.data.source]
    split = run.system.splits.test
    human = [parse_text(text) for text in split["response"].to_pylist()]
    nats = -sum(math.log(target.probability(sentence)) for sentence in human if sentence is not None)
    tokens = sum(len(text.split()) + 1 for text in split["response"].to_pylist())
    fresh = fresh_texts(task.cell.data, split.num_rows)
    return {"test": run.reference(fresh, nats / tokens)}


def _audit(task: Task, run: Run) -> Result:
    plant = PLANTS.get(task.cell.data.plant, UNPLANTED)
    report = audit_sides(run.system, run.config, plant, guard=task.cell.guard)
    return {
        "findings": [asdict(finding) for finding in report.findings],
        "raw": {cue: found.accuracy for cue, found in report.raw.items()},
        "canonical": {cue: found.accuracy for cue, found in report.canonical.items()},
    }


_KINDS = {"train": _train, "reference": _reference, "audit": _audit}
