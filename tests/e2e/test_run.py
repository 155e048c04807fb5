"""Whole runs from the command line, every process real, on the tiny model.

One unbroken exact run is the measure: an interrupted one whose folder is lost, resumed from its copy, must
repeat it number for number. One run at lags of two, whose rollout worker is killed, shows the bounds and the
accounts.
"""

import json
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import (
    PROMPTS,
    ROOT,
    SAMPLES,
    STEPS,
    Finished,
    Launch,
    environment,
    interrupt_after_a_step,
    kill_a_rollout_worker,
)
from safetensors.torch import load_file

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1800)]

PROMISED = ("c2st", "nll", "rouge_l", "chrf", "distinct_2", "self_bleu", "length_mean", "copy_rate")
EXACT = {"run.exact": "true", "run.checkpoint_every": "3", "run.keep_checkpoints": "9"}
LAGS = {
    "run.max_policy_lag": "2",
    "run.max_disc_lag": "2",
    "run.steps": "6",
    "discriminator.level": '"token"',
}


@pytest.fixture(scope="module")
def unbroken(launch: Launch) -> Finished:
    return launch("unbroken", EXACT)


@pytest.fixture(scope="module")
def copied(configuration: Path) -> dict[str, str]:
    """Settings of a run that keeps a copy of its folder elsewhere."""
    return EXACT | {"run.mirror": f"file://{configuration.parent}/copies"}


@pytest.fixture(scope="module")
def interrupted(launch: Launch, copied: dict[str, str]) -> tuple[Finished, list[dict[str, Any]]]:
    """A run stopped with Ctrl-C, and the rows it had written by then."""
    finished = launch("broken", copied, meanwhile=interrupt_after_a_step)
    return finished, finished.rows


@pytest.fixture(scope="module")
def resumed(
    launch: Launch, copied: dict[str, str], interrupted: tuple[Finished, list[dict[str, Any]]]
) -> Finished:
    """The same run, resumed where its own folder is lost and the copy's newest checkpoint is torn."""
    folder, step = interrupted[0].folder, len(interrupted[1])
    folder.rename(folder.with_name("lost"))
    kept = folder.parent / "copies" / folder.name / "checkpoints"
    torn = kept / f"step-{step + 1:06d}"
    shutil.copytree(kept / f"step-{step:06d}", torn)
    manifest = json.loads((torn / "manifest.json").read_text())
    (torn / "manifest.json").write_text(json.dumps(manifest | {"step": step + 1}))
    (torn / "buffer.parquet").write_bytes(b"torn")
    return launch("broken", copied, resume=True)


@pytest.fixture(scope="module")
def lagging(launch: Launch) -> Finished:
    """A run at lags of two that loses its rollout worker."""
    return launch("lagging", LAGS, meanwhile=kill_a_rollout_worker)


@pytest.fixture(scope="module")
def broken_off(launch: Launch) -> Finished:
    """A run that is told to stop after its last checkpoint, in the closing evaluation."""

    def stop(process: "subprocess.Popen[str]", folder: Path) -> None:
        last = folder / "checkpoints" / f"step-{int(LAGS['run.steps']):06d}" / "manifest.json"
        while process.poll() is None and not last.exists():
            time.sleep(0.05)
        process.terminate()

    return launch("broken-off", LAGS, meanwhile=stop)


def test_a_run_ends_well_and_leaves_no_process_behind(unbroken):
    assert unbroken.code == 0, unbroken.output[-3000:]
    assert unbroken.left == []


def test_summary_keeps_its_promises(unbroken):
    summary = unbroken.summary
    for name in ("base", "best", "last", "human"):
        row = summary["evaluation"][name]
        assert all(math.isfinite(row[key]) for key in PROMISED), (name, row)
    assert {"generate", "score", "learn", "sync", "discriminate", "evaluate"} <= summary["phases"].keys()
    tokens = sum(round(row["response/length_mean"] * PROMPTS * SAMPLES) for row in unbroken.rows)
    assert summary["phases"]["generate"]["tokens"] == summary["phases"]["learn"]["tokens"] == tokens
    assert summary["steps"] == STEPS
    assert summary["responses"]["trained"] == STEPS * PROMPTS * SAMPLES
    assert isinstance(summary["alarms"], list)
    assert [point["step"] for point in summary["learning_curve"]] == [0, 4, 8]


def test_every_step_is_in_the_metrics(unbroken):
    rows = unbroken.rows
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    expected = {
        *(f"reward/{name}" for name in ("mean", "std", "min", "max")),
        *(f"policy/{name}" for name in ("entropy", "kl", "grad_norm", "importance_mean")),
        *(f"policy/{name}" for name in ("mismatch_mean", "mismatch_max")),
        *(f"seconds/{name}" for name in ("generate", "score", "learn", "sync")),
        *("response/length_mean", "response/truncated_rate"),
        *(f"memory_mib/{name}" for name in ("controller", "rollout", "scoring")),
        *("sync/bytes", "sync/wire_s", "rollout/tokens_per_s", "policy/tokens_per_s"),
    }
    for row in rows:
        assert expected <= row.keys()
        assert all(value is not None for value in row.values()), "a number was not finite"
    for row in rows[1:]:
        assert {
            "discriminator/accuracy",
            "discriminator/accuracy_heldout",
            "discriminator/margin",
        } <= row.keys()
        assert row["discriminator/steps"] == 2
        assert all(row[f"{name}/tokens_per_s"] > 0 for name in ("rollout", "policy", "discriminator"))
        assert row["memory_mib/rollout"] > 1.5 * row["memory_mib/scoring"], "an actor and its engine"


def test_evaluations_are_in_the_metrics_of_their_steps(unbroken):
    """C2ST too, so that TensorBoard shows it and not only the reward."""
    measured = {row["step"]: row for row in unbroken.metrics if "evaluation/c2st" in row}
    assert list(measured) == [0, 4, 8]
    for point in unbroken.summary["learning_curve"]:
        row = measured[point["step"]]
        assert all(
            row[f"evaluation/{key}"] == point[key] for key in ("c2st", "nll", "coverage", "distinct_2")
        )
        assert row["monitor/mode_share"] == point["monitor/mode_share"]
        audit = (unbroken.folder / "samples" / f"step-{point['step']:06d}-audit.md").read_text()
        (length,) = (line for line in audit.splitlines() if line.startswith("| length |"))
        assert f"{row['audit/length']:.3f} [" in length


def test_looks_come_between_the_evaluations(unbroken):
    """At the likelihood of human answers, which needs no samples."""
    tail = {row["step"]: row["monitor/nll_tail"] for row in unbroken.metrics if "monitor/nll_tail" in row}
    assert list(tail) == [0, 2, 4, 6, 8]
    assert len(set(tail.values())) == 5, "the policy changes from look to look"
    assert [row["step"] for row in unbroken.rows if "seconds/look" in row] == [3, 7]


def test_synchronous_run_has_no_lag_and_balanced_accounts(unbroken):
    for row in unbroken.rows:
        assert row["lag/policy"] == row["lag/disc"] == {"0": PROMPTS * SAMPLES}
        assert row["responses/submitted"] == row["responses/trained"] == row["step"] * PROMPTS * SAMPLES
        assert row["responses/dropped"] == row["responses/failed"] == row["responses/in_flight"] == 0


def test_sampler_and_learner_agree_at_every_step(unbroken):
    """After the first sync too, so the weights that were sent are the weights that sample."""
    assert all(0 <= row["policy/mismatch_max"] < 1e-4 for row in unbroken.rows)
    assert all(row["policy/grad_norm"] > 0 for row in unbroken.rows)
    assert all(row["policy/kl"] > 0 for row in unbroken.rows[1:]), "the policy never moved"


@pytest.mark.parametrize("name", ["best", "last"])
def test_models_load_in_transformers_and_score_as_the_summary_says(unbroken, configuration, name):
    """The summary's NLL, from the learner's packed rows, against one plain forward pass per answer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rollout.data import load_data
    from rollout.templates import Renderer
    from services.answers import first_prompts
    from services.config import load

    settings = load(configuration)
    model = AutoModelForCausalLM.from_pretrained(unbroken.folder / name).eval()
    tokenizer = AutoTokenizer.from_pretrained(unbroken.folder / name)
    splits = load_data(settings.data, Renderer(tokenizer, settings.data, settings.policy))
    total, count = 0.0, 0
    for row in first_prompts(splits.test, settings.evaluation.test_prompts).to_pylist():
        prompt = tokenizer(row["prompt_text"], add_special_tokens=False)["input_ids"]
        answer = tokenizer(row["response"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        answer = answer[: settings.sampling.max_tokens]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        chosen = logits.log_softmax(-1)[range(len(answer)), answer]
        total, count = total - float(chosen.sum()), count + len(answer)
    assert unbroken.summary["evaluation"][name]["nll"] == pytest.approx(total / count, abs=1e-4)


def test_the_best_model_answers_in_vllm(unbroken):
    command = [sys.executable, "-m", "services.cli", "generate", str(unbroken.folder / "best")]
    words = ["--prompt", "say cat 1: ", "--prompt", "say dog 2: ", "--policy.dtype", "float32"]
    limits = ["--sampling.max_tokens", "8", "--data.max_prompt_tokens", "32"]
    done = subprocess.run(
        command + words + limits, cwd=ROOT, capture_output=True, text=True, timeout=600, env=environment()
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answers = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [answer["prompt"] for answer in answers] == ["say cat 1: ", "say dog 2: "]
    assert all(answer["finish_reason"] in ("stop", "length") and answer["response"] for answer in answers)


def test_ctrl_c_ends_with_a_checkpoint_and_no_process(interrupted):
    finished, rows = interrupted
    assert finished.code == 130, finished.output[-3000:]
    assert finished.left == []
    assert 1 <= len(rows) < STEPS
    assert (finished.folder / "checkpoints" / f"step-{len(rows):06d}" / "manifest.json").exists()
    assert not list((finished.folder / "checkpoints").glob(".partial*"))
    assert "--resume" in finished.output


def test_a_resumed_run_equals_the_unbroken_one(unbroken, interrupted, resumed):
    """Number for number: every metric that is no time or memory, and every weight."""
    assert resumed.code == 0, resumed.output[-3000:]
    assert "fetched from file://" in resumed.output
    assert "buffer.parquet differs from the manifest" in resumed.output
    assert "changed: " not in resumed.output
    assert not list((resumed.folder / "checkpoints").glob(".*")), "the torn one went with the next checkpoint"
    assert resumed.left == []
    assert resumed.rows[: len(interrupted[1])] == interrupted[1]
    assert [row["step"] for row in resumed.rows] == list(range(1, STEPS + 1))
    differing = {
        (row["step"], key): (value, other.get(key))
        for row, other in zip(unbroken.rows, resumed.rows, strict=True)
        for key, value in row.items()
        if not is_clock(key) and value != other.get(key)
    }
    assert not differing
    for name in ("best", "last"):
        expected = load_file(unbroken.folder / name / "model.safetensors")
        found = load_file(resumed.folder / name / "model.safetensors")
        assert expected.keys() == found.keys()
        assert all(torch.equal(tensor, found[key]) for key, tensor in expected.items())
    for name in ("base", "best", "last", "human"):
        assert resumed.summary["evaluation"][name] == unbroken.summary["evaluation"][name]
    assert resumed.summary["responses"] == unbroken.summary["responses"]


def is_clock(key: str) -> bool:
    """Fields that measure the machine and not the run."""
    return key == "time" or "seconds" in key or "memory" in key or key.endswith("_s")


@pytest.mark.slow  # two whole runs; Ctrl-C between steps is tested above
def test_a_signal_ends_the_closing_evaluation_and_a_resume_does_it(broken_off, launch):
    assert broken_off.code == 130, broken_off.output[-3000:]
    assert broken_off.left == []
    assert not (broken_off.folder / "summary.json").exists()
    rows = broken_off.metrics
    resumed = launch("broken-off", LAGS, resume=True)
    assert resumed.code == 0, resumed.output[-3000:]
    assert resumed.metrics == rows, "a step was repeated"
    assert resumed.summary["steps"] == int(LAGS["run.steps"])


def test_lags_stay_in_bounds_and_accounts_balance(lagging):
    assert lagging.code == 0, lagging.output[-3000:]
    assert lagging.left == []
    lags: set[int] = set()
    for row in lagging.rows:
        policy, judge = ({int(k): n for k, n in row[f"lag/{name}"].items()} for name in ("policy", "disc"))
        assert min(policy) >= 0
        assert max(policy) <= 2
        assert max(judge) <= 2
        lags |= policy.keys()
        accounts = {name: row[f"responses/{name}"] for name in ("trained", "dropped", "failed", "in_flight")}
        assert row["responses/submitted"] == sum(accounts.values())
        assert sum(policy.values()) == sum(judge.values()) == PROMPTS * SAMPLES
    assert max(lags) > 0, "nothing was generated ahead"
    assert lagging.rows[0]["responses/in_flight"] > 0
    assert lagging.rows[-1]["responses/in_flight"] == 0
    assert lagging.summary["responses"]["trained"] == 6 * PROMPTS * SAMPLES


def test_a_worker_killed_over_several_batches_is_replaced_once(lagging):
    assert lagging.rows[-1]["rollout/replacements"] == 1


def test_a_finished_run_is_neither_overwritten_nor_resumed(unbroken, launch):
    before = (unbroken.folder / "summary.json").read_bytes()
    again = launch("unbroken", EXACT)
    assert again.code == 2
    assert "exists already" in again.output
    done = launch("unbroken", EXACT, resume=True)
    assert done.code == 2
    assert "8 of 8 steps" in done.output
    assert (unbroken.folder / "summary.json").read_bytes() == before
