"""One rank of a Gumbel-Softmax update with a linear judge: run as `python gumbel_worker.py JOB RANK WORLD
RENDEZVOUS`; JOB as for `zero_worker.py`."""

import sys

import torch
from linear_judge import LinearJudge
from zero_worker import whole_weights

from learner.config import LearnerConfig
from learner.policy import PolicyLearner

TWO = 2


def gumbel_learner(model, judge=None, **settings):
    """A learner and its judge, which reads the tiny model's vocabulary."""
    cfg = LearnerConfig(**({"device": "cpu"} | settings))
    judge = judge or LinearJudge(vocabulary_of(model), strict=True)
    return PolicyLearner(str(model), cfg, model_dtype="float32", temperature=0.8, judge=judge)


def vocabulary_of(model):
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(model).vocab_size


def gumbel_updates(model, table, **settings):
    learner = gumbel_learner(model, **settings)
    metrics = [learner.train_step(table, step) for step in range(TWO)]
    return whole_weights(learner), metrics


def main(job_file: str, rank: int, world: int, rendezvous: str) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world
    )
    job = torch.load(job_file, weights_only=False)
    results = {
        stage: gumbel_updates(job["model"], job["table"], zero_stage=stage, ranks=world, **job["settings"])
        for stage in job["stages"]
    }
    if rank == 0:
        torch.save(results, job["out"])
    torch.distributed.barrier()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
