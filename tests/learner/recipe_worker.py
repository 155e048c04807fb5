"""One rank of a multi-process learner test: run as `python recipe_worker.py JOB RANK WORLD RENDEZVOUS`.

JOB is a torch file with `model`, `table`, `recipes` (settings by name) and `out`. With each recipe the rank
makes two policy updates from the same beginning, and rank 0 saves weights and metrics by name.
"""

import sys

import torch
from zero_worker import two_updates, whole_weights


def main(job_file: str, rank: int, world: int, rendezvous: str) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world
    )
    job = torch.load(job_file, weights_only=False)
    results = {}
    for name, settings in job["recipes"].items():
        learner, metrics = two_updates(job["model"], job["table"], ranks=world, **settings)
        results[name] = whole_weights(learner), metrics
    if rank == 0:
        torch.save(results, job["out"])
    torch.distributed.barrier()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
