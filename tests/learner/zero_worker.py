"""Policy updates on two ranks (`two_ranks`).

The job has `model`, `table`, `stages` and `settings`. For each ZeRO stage a rank makes two policy updates,
whose weights and metrics are the result; it checks that a reload continues exactly, exports, and with LoRA
checks that the wire carries the same merged weights. With `saved`, the state of a single rank, it returns the
weights that a learner of two ranks loads from there, and those after its next update.
"""

import torch
from two_ranks import RANKS

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


def zero_stages(job):
    results = {}
    for stage in job["stages"]:
        learner, metrics = two_updates(
            job["model"], job["table"], zero_stage=stage, ranks=RANKS, **job["settings"]
        )
        logprobs = learner.response_logprobs(job["table"])
        results[stage] = (whole_weights(learner), metrics, logprobs)
        if "lora" in job["settings"]:
            wired, whole = wired_weights(learner), results[stage][0]
            assert wired.keys() == whole.keys()
            assert all(torch.equal(wired[name], whole[name]) for name in whole)
        folder = job["folder"] / f"state-{stage}"
        learner.save(folder)
        learner.train_step(job["table"], 2)
        after = whole_weights(learner)
        again = PolicyLearner(
            str(job["model"]),
            LearnerConfig(zero_stage=stage, ranks=RANKS, **job["settings"]),
            model_dtype="float32",
        )
        again.load(folder)
        again.train_step(job["table"], 2)
        resumed = whole_weights(again)
        assert all(torch.equal(after[name], resumed[name]) for name in after), (
            f"stage {stage} resumes inexactly"
        )
        again.export(job["folder"] / f"export-{stage}")
        if "saved" in job:
            again.load(job["saved"])
            loaded = whole_weights(again)
            again.train_step(job["table"], 2)
            results[f"from one, {stage}"] = loaded, whole_weights(again)
    return results
