"""One rank of a multi-process learner test: run as `python zero_worker.py JOB RANK WORLD RENDEZVOUS`.

JOB is a torch file with `model`, `table`, `stages`, `settings` and `out`. For each ZeRO stage the rank makes
two policy updates and rank 0 saves weights and metrics; it checks that a reload continues exactly, exports,
and with LoRA checks that the wire carries the same merged weights.
"""

import sys
from pathlib import Path

import torch

from learner.config import LearnerConfig
from learner.policy import PolicyLearner


def whole_weights(learner: PolicyLearner) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = {}
    learner.weights(lambda name, tensor: weights.__setitem__(name, tensor.clone()))
    return weights


def two_updates(model, table, **settings):
    learner = PolicyLearner(str(model), LearnerConfig(**settings), model_dtype="float32")
    metrics = [learner.train_step(table, step) for step in range(2)]
    return learner, metrics


def wired_weights(learner: PolicyLearner) -> dict[str, torch.Tensor]:
    """What the rollout workers would be sent, without the checksums."""
    from learner.weight_source import ModuleWeights
    from rollout.wire import CHECKSUM_PREFIX

    source = ModuleWeights(learner.module, gather_bytes=1 << 14)
    return {name: tensor.clone() for name, tensor in source if not name.startswith(CHECKSUM_PREFIX)}


def main(job_file: str, rank: int, world: int, rendezvous: str) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world
    )
    job = torch.load(job_file, weights_only=False)
    results = {}
    for stage in job["stages"]:
        learner, metrics = two_updates(
            job["model"], job["table"], zero_stage=stage, ranks=world, **job["settings"]
        )
        logprobs = learner.response_logprobs(job["table"])
        results[stage] = (whole_weights(learner), metrics, logprobs)
        if "lora" in job["settings"]:
            wired, whole = wired_weights(learner), results[stage][0]
            assert wired.keys() == whole.keys()
            assert all(torch.equal(wired[name], whole[name]) for name in whole)
        folder = Path(job["out"]).parent / f"state-{stage}"
        learner.save(folder)
        learner.train_step(job["table"], 2)
        after = whole_weights(learner)
        again = PolicyLearner(
            str(job["model"]),
            LearnerConfig(zero_stage=stage, ranks=world, **job["settings"]),
            model_dtype="float32",
        )
        again.load(folder)
        again.train_step(job["table"], 2)
        resumed = whole_weights(again)
        assert all(torch.equal(after[name], resumed[name]) for name in after), (
            f"stage {stage} resumes inexactly"
        )
        again.export(Path(job["out"]).parent / f"export-{stage}")
    if rank == 0:
        torch.save(results, job["out"])
    torch.distributed.barrier()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
