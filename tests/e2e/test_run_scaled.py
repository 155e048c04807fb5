"""A run with two of everything: learner ranks under ZeRO-2 with LoRA, discriminator ranks, rollout workers of
which one is killed, scoring replicas. The policy gradient is mixed with a Gumbel-Softmax update.
"""

import subprocess
from pathlib import Path

import psutil
import pytest
from launching import PROMPTS, SAMPLES, Finished, Launch, kill_a_rollout_worker

from learner.environment import jemalloc

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1800)]

TWO_OF_EVERYTHING = {
    "run.steps": "5",
    "rollout.workers": "2",
    "rollout.cpus_per_worker": "0.2",
    "learner.ranks": "2",
    "learner.cpus_per_rank": "0.2",
    "learner.zero_stage": "2",
    "learner.lora.rank": "4",
    "learner.gumbel.weight": "0.1",
    "learner.gumbel.samples": "16",
    "discriminator.ranks": "2",
    "discriminator.cpus_per_rank": "0.2",
    "discriminator.zero_stage": "2",
    "discriminator.lora.rank": "4",
    "discriminator.scoring.replicas": "2",
    "discriminator.scoring.cpus": "0.2",
}


COMPUTING = ("ray::RayTrainWorker", "ray::RolloutWorker", "ray::ServeReplica", "VLLM::EngineCore")


@pytest.fixture(scope="module")
def allocators() -> dict[str, set[bool]]:
    """By kind of process that computes: whether those of the run had jemalloc; filled by the run."""
    return {kind: set() for kind in COMPUTING}


@pytest.fixture(scope="module")
def scaled(launch: Launch, allocators: dict[str, set[bool]]) -> Finished:
    def look_and_kill(process: "subprocess.Popen[str]", folder: Path) -> None:
        kill_a_rollout_worker(process, folder)
        for child in psutil.Process(process.pid).children(recursive=True):
            try:
                line, maps = " ".join(child.cmdline()), Path(f"/proc/{child.pid}/maps").read_text()
            except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
                continue  # among others the one that was killed
            for kind in COMPUTING:
                if line.startswith(kind):
                    allocators[kind].add("libjemalloc" in maps)

    return launch("scaled", TWO_OF_EVERYTHING, meanwhile=look_and_kill)


@pytest.mark.skipif(jemalloc() is None, reason="this build of Ray brings no libjemalloc.so")
def test_every_process_that_computes_allocates_with_jemalloc(scaled, allocators):
    assert allocators == {kind: {True} for kind in COMPUTING}


def test_a_killed_rollout_worker_is_replaced_and_the_run_goes_on(scaled):
    assert scaled.code == 0, scaled.output[-3000:]
    assert scaled.left == []
    assert [row["step"] for row in scaled.rows] == [1, 2, 3, 4, 5]
    assert scaled.summary["responses"]["trained"] == 5 * PROMPTS * SAMPLES
    assert scaled.summary["responses"]["dropped"] == scaled.summary["responses"]["failed"] == 0
    assert scaled.rows[-1]["rollout/replacements"] == 1


def test_merged_adapters_reach_every_worker(scaled):
    """The old workers and the new one sample from the weights that the learner holds."""
    assert all(0 <= row["policy/mismatch_max"] < 1e-4 for row in scaled.rows)
    assert all(row["policy/kl"] > 0 for row in scaled.rows[1:]), "the policy never moved"


def test_both_gradients_reach_the_policy(scaled):
    """The learner's ranks fetched the version that scored the batch and judged samples of their own by it."""
    # Few texts of this model survive decoding and encoding: a sample takes part about once in twenty times.
    judged = [row for row in scaled.rows if row["policy/gumbel_masked"] < 1]
    assert judged, "every sample of every step was masked"
    assert all(0 < row["policy/gumbel_grad_share"] < 1 for row in judged)
    assert all(row["policy/gumbel_tokens"] > 0 for row in scaled.rows)
    assert scaled.rows[-1]["policy/gumbel_tau"] < scaled.rows[0]["policy/gumbel_tau"]
