"""Discriminator updates on two ranks (`two_ranks`).

The job has `model`, `rollouts`, `demonstrations` and `trainers` (configurations by name). With each
configuration a rank trains, evaluates and publishes; what came of it by name is the result. It checks that a
reload publishes the same.
"""

import torch
from two_ranks import RANKS

from discriminator.config import DiscriminatorConfig
from discriminator.trainer import DiscriminatorTrainer


def all_trainers(job):
    results = {}
    for name, fields in job["trainers"].items():
        config = DiscriminatorConfig(**(fields | {"ranks": RANKS}))
        trainer = DiscriminatorTrainer(config, job["model"], seed=0)
        metrics = trainer.update(job["rollouts"], job["demonstrations"], step=0)
        evaluation = trainer.evaluate(job["demonstrations"], job["rollouts"], step=0)
        published = trainer.publish()
        trainer.save(job["folder"] / name)
        trainer.load(job["folder"] / name)
        again = trainer.publish()
        assert (published is None) == (torch.distributed.get_rank() != 0)
        if published is not None:
            assert again is not None
            assert again.checksum == published.checksum
            results[name] = (metrics, evaluation, published.state)
    return results
