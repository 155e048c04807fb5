"""Whole runs of the baselines from the command line, from the file that an adversarial run uses."""

import json
import math
from typing import Any

import pytest
import torch
from launching import PROMPTS, SAMPLES, Finished, Launch, interrupt_after_a_step
from safetensors.torch import load_file

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1800)]

SFT = {
    "run.method": "sft",
    "run.checkpoint_every": "4",
    "learner.sft.batch_size": "16",
    "learner.sft.check_every": "2",
}
RLHF = {"run.method": "rlhf", "run.steps": "4", "discriminator.warmup_max_steps": "20"}
PROMISED = ("c2st", "nll", "rouge_l", "chrf", "distinct_2", "self_bleu", "length_mean", "copy_rate")


@pytest.fixture(scope="module")
def supervised(launch: Launch) -> Finished:
    return launch("sft", SFT)


@pytest.fixture(scope="module")
def frozen(launch: Launch) -> Finished:
    return launch("frozen", RLHF)


@pytest.fixture(scope="module")
def preferred(launch: Launch, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    path = tmp_path_factory.mktemp("data") / "preferences.jsonl"
    nouns = ["cat", "dog", "door", "mail", "tool", "mat", "news", "day"]
    rows = [
        {"prompt": f"ask {i}: ", "chosen": f"the {nouns[i % 8]} sat on the mat", "rejected": nouns[i % 8]}
        for i in range(80)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return launch("rlhf", RLHF | {"data.preferences": str(path), "run.steps": "2"})


def assert_complete(run: Finished) -> dict[str, Any]:
    """The run ended well, left nothing behind and reports what every method reports."""
    assert run.code == 0, run.output[-3000:]
    assert run.left == []
    for name in ("base", "best", "last", "human"):
        assert all(math.isfinite(run.summary["evaluation"][name][key]) for key in PROMISED)
    budget = run.summary["budget"]
    assert budget["wall_seconds"] > max(budget["seconds"].values()) > 0
    assert budget["learner_tokens"] > 0
    assert all((run.folder / name / "model.safetensors").exists() for name in ("best", "last"))
    return run.summary


def test_supervised_fine_tuning_learns_without_a_judge(supervised):
    summary = assert_complete(supervised)
    assert summary["method"] == "sft"
    assert "not read by this method: discriminator" in supervised.output
    assert summary["evaluation"]["last"]["nll"] < summary["evaluation"]["base"]["nll"] - 0.1
    budget = summary["budget"]
    assert budget["rollout_tokens"] == budget["discriminator_tokens"] == budget["learner_forward_tokens"] == 0
    assert not {"generate", "score", "discriminate", "warm-up"} & summary["phases"].keys()
    assert not [name for name in summary["memory_mib"] if name.startswith("discriminator")]
    assert summary["responses"]["submitted"] == 0


def test_the_last_supervised_model_is_the_one_with_the_best_look(supervised):
    looks = {0: None} | {
        row["step"]: row["selection/nll"] for row in supervised.rows if "selection/nll" in row
    }
    assert list(looks) == [0, 2, 4, 6, 8]
    early = supervised.summary["early_stopping"]
    assert early["selection_nll"] == min(nll for nll in looks.values() if nll is not None)
    assert looks[early["restored_step"]] == early["selection_nll"]
    last = supervised.summary["learning_curve"][-1]
    assert last["step"] == 8
    assert last["nll"] == pytest.approx(early["selection_nll"], abs=1e-6)


@pytest.mark.slow  # two whole runs; exact resume has its own test in every suite
def test_an_interrupted_supervised_run_goes_on_to_the_same_model(supervised, launch):
    broken = launch("sft-broken", SFT, meanwhile=interrupt_after_a_step)
    assert broken.code == 130, broken.output[-3000:]
    assert not (broken.folder / "summary.json").exists()
    resumed = launch("sft-broken", SFT, resume=True)
    assert_complete(resumed)
    for row, other in zip(supervised.rows, resumed.rows, strict=True):
        assert row.get("selection/nll") == other.get("selection/nll")
        assert row["policy/nll"] == other["policy/nll"]
    expected = load_file(supervised.folder / "last" / "model.safetensors")
    found = load_file(resumed.folder / "last" / "model.safetensors")
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    tokens = {name: n for name, n in supervised.summary["budget"].items() if name.endswith("tokens")}
    assert tokens.items() <= resumed.summary["budget"].items()


def test_a_frozen_reward_model_is_called_so_and_stays(frozen):
    summary = assert_complete(frozen)
    assert summary["method"] == "frozen reward model"
    assert "method: frozen reward model" in frozen.output
    assert "Method: frozen reward model." in (frozen.folder / "report.md").read_text()
    assert "rlhf" not in frozen.output
    for row in frozen.rows[1:]:
        assert row["discriminator/steps"] == 0
        assert 0 <= row["discriminator/accuracy_heldout"] <= 1
        assert row["policy/critic_loss"] > 0
        assert row["lag/disc"] == {"0": PROMPTS * SAMPLES}
    budget = summary["budget"]
    assert budget["discriminator_tokens"] == summary["warm_up"]["tokens_trained"] > 0
    sampled = sum(round(row["response/length_mean"] * PROMPTS * SAMPLES) for row in frozen.rows)
    assert budget["rollout_tokens"] == sampled + summary["warm_up"]["rollout_tokens"]


@pytest.mark.slow  # a whole run that differs from the one above in the warm-up only
def test_a_reward_model_of_preference_pairs_is_rlhf(preferred):
    summary = assert_complete(preferred)
    assert summary["method"] == "rlhf"
    assert "training the reward model on " in preferred.output
    assert "preference pairs" in preferred.output
    assert summary["warm_up"]["accuracy"] > 0.8, "a word against a sentence"
    assert summary["warm_up"]["rollout_tokens"] == 0
