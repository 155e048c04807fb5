"""`rlgaf evaluate` as a command of its own, vLLM real, on the tiny model."""

import json
import subprocess
import sys

import pytest
import torch
from launching import ROOT, START_S, environment
from transformers import AutoModelForCausalLM, AutoTokenizer

from rollout.data import prompt_id

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1800)]

PROMPTS, SAMPLES = 24, 2


def test_a_model_is_compared_with_the_whole_file(tiny_model, tiny_demonstrations, tmp_path):
    out = tmp_path / "out.json"
    command = [sys.executable, "-m", "services.cli", "evaluate", str(tiny_model), str(tiny_demonstrations)]
    settings = {
        "policy.dtype": "float32",
        "data.max_prompt_tokens": 32,
        "sampling.max_tokens": 16,
        "rollout.start_timeout_s": START_S,
        "evaluation.test_prompts": PROMPTS,
        "evaluation.samples_per_prompt": SAMPLES,
        "evaluation.bootstrap": 100,
        "evaluation.embedding_model": "none",
    }
    words = ["--json", str(out), *(f"--{field}={value}" for field, value in settings.items())]
    done = subprocess.run(command + words, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "C2ST" in done.stdout
    found = json.loads(out.read_text())
    assert found["demonstrations"] == f"{PROMPTS} prompts of {tiny_demonstrations}"
    row, human = found["evaluation"], found["human"]
    assert (row["prompts"], row["samples"]) == (PROMPTS, PROMPTS * SAMPLES)
    assert row["c2st"] > human["c2st_low"]
    assert row["copy_rate"] is human["copy_rate"] is None  # what the model was trained on is not known
    assert row["nll"] == human["nll"] == pytest.approx(nll(tiny_model, tiny_demonstrations), abs=1e-4)


def nll(model_folder, demonstrations) -> float:
    """Of the human answers to the prompts with the smallest ids, by transformers alone."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    rows = sorted(map(json.loads, demonstrations.open()), key=lambda row: prompt_id(row["prompt"]))
    total, count = 0.0, 0
    for row in rows[:PROMPTS]:
        prompt = tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
        answer = tokenizer(row["response"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        answer = answer[:16]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        total -= float(logits.log_softmax(-1)[range(len(answer)), answer].sum())
        count += len(answer)
    return total / count
