"""Supervised updates on two ranks (`two_ranks`).

The job has `model`, `table`, `stages` and `settings`. For each ZeRO stage a rank makes two supervised
updates, whose weights and metrics are the result; it checks that a snapshot taken after the first comes back.
"""

import torch
from two_ranks import RANKS
from zero_worker import whole_weights

from learner.config import LearnerConfig
from learner.policy import PolicyLearner
from learner.snapshot import Snapshot
from learner.supervised import supervised_step


def two_supervised_updates(model, table, **settings):
    """Learner, metrics of both updates, and the weights after each."""
    learner = PolicyLearner(str(model), LearnerConfig(kl_coef=0.0, **settings), model_dtype="float32")
    metrics, weights, kept = [], [], Snapshot()
    for _ in range(2):
        metrics.append(supervised_step(learner.trainable, learner.cfg, table))
        weights.append(whole_weights(learner))
        if not kept.taken:
            kept.take(learner.trainable)
    return learner, metrics, weights, kept


def check_snapshot(learner, table, metrics, weights, kept):
    """The snapshot taken after the first update brings its weights back, masters included: an update of rate
    zero writes the weights from the masters again."""
    kept.restore(learner.trainable)
    restored = whole_weights(learner)
    assert all(torch.equal(restored[name], tensor) for name, tensor in weights[0].items())
    still = supervised_step(learner.trainable, learner.cfg, table, lr_factor=0.0)
    assert still["nll"] == metrics[1]["nll"] != metrics[0]["nll"]
    again = whole_weights(learner)
    assert all(torch.equal(again[name], tensor) for name, tensor in weights[0].items())


def supervised_stages(job):
    results = {}
    for stage in job["stages"]:
        settings = job["settings"] | {"zero_stage": stage, "ranks": RANKS}
        learner, metrics, weights, kept = two_supervised_updates(job["model"], job["table"], **settings)
        results[stage] = (weights[1], metrics)
        check_snapshot(learner, job["table"], metrics, weights, kept)
    return results
