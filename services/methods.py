"""Named methods: the settings that turn this system into a published one.

A preset fills in what neither the file nor the command line says; what they say stands. Learning rates belong
to the model and its size and are in no preset.
"""

import copy
from typing import Any, Literal

Method = Literal["rlgaf", "gad"]

PRESETS: dict[Method, dict[str, Any]] = {
    # The defaults of every field.
    "rlgaf": {},
    # Generative adversarial distillation (arXiv 2511.10643): a sequence-level Bradley-Terry critic whose raw
    # score is the reward, GRPO over eight answers, a small KL.
    "gad": {
        "sampling": {"group_size": 8},
        "learner": {"advantage": "grpo", "loss": "ppo_clip", "kl_coef": 1e-3, "kl_estimator": "k3"},
        "discriminator": {
            "level": "sequence",
            "loss": "bradley_terry",
            "steps_per_policy_step": 1,
            "reward": {"form": "bradley_terry"},
        },
    },
}


def with_preset(raw: dict[str, Any]) -> dict[str, Any]:
    """A raw configuration over the preset of its `run.method`; one of an unknown method comes back as it is,
    for the validation to refuse."""
    run = raw.get("run", {})
    method = run.get("method", "rlgaf") if isinstance(run, dict) else "rlgaf"
    return _over(copy.deepcopy(PRESETS[method]) if method in PRESETS else {}, raw)


def _over(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    for name, value in top.items():
        if isinstance(value, dict) and isinstance(base.get(name), dict):
            base[name] = _over(base[name], value)
        else:
            base[name] = value
    return base
