"""Gumbel-Softmax updates with a linear judge, also on two ranks (`two_ranks`); the job is as for
`zero_worker.py`."""

from linear_judge import LinearJudge
from two_ranks import RANKS
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


def gumbel_stages(job):
    return {
        stage: gumbel_updates(job["model"], job["table"], zero_stage=stage, ranks=RANKS, **job["settings"])
        for stage in job["stages"]
    }
