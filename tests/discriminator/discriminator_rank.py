"""One rank of the multi-process trainer test: `python discriminator_rank.py JOB RANK WORLD RENDEZVOUS`.

JOB is a torch file with `model`, `rollouts`, `demonstrations`, `trainers` (configurations by name) and `out`.
With each configuration the rank trains, evaluates and publishes, and rank 0 saves what came of it by name; it
checks that a reload publishes the same.
"""

import sys

import torch

from discriminator.config import DiscriminatorConfig
from discriminator.trainer import DiscriminatorTrainer


def main(job_file: str, rank: int, world: int, rendezvous: str) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world
    )
    job = torch.load(job_file, weights_only=False)
    results = {}
    for name, fields in job["trainers"].items():
        config = DiscriminatorConfig(**(fields | {"ranks": world}))
        trainer = DiscriminatorTrainer(config, job["model"], seed=0)
        metrics = trainer.update(job["rollouts"], job["demonstrations"], step=0)
        evaluation = trainer.evaluate(job["demonstrations"], job["rollouts"], step=0)
        published = trainer.publish()
        trainer.save(f"{job['out']}-{name}")
        trainer.load(f"{job['out']}-{name}")
        again = trainer.publish()
        assert (published is None) == (rank != 0)
        if published is not None:
            assert again is not None
            assert again.checksum == published.checksum
            results[name] = (metrics, evaluation, published.state)
    if rank == 0:
        torch.save(results, job["out"])
    torch.distributed.barrier()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
