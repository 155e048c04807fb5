"""Named methods: the settings that turn this system into a published one.

A preset fills in what neither the file nor the command line says; what they say stands. Learning rates belong
to the model and its size and are in no preset. One file serves all methods: `[method.NAME.…]` holds what one
of them needs otherwise than the rest; what a method has no use for is not read, and `not_read` names it; what
contradicts a method is refused (`method_problems`).
"""

import copy
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel

from discriminator.config import DiscriminatorConfig
from discriminator.health_config import HealthConfig
from learner.config import GumbelConfig

if TYPE_CHECKING:
    from services.config import Config

Method = Literal["rlgaf", "gad", "sft", "rlhf"]

PRESETS: dict[Method, dict[str, Any]] = {
    # The defaults of every field.
    "rlgaf": {},
    # Generative adversarial distillation (arXiv 2511.10643): a sequence-level Bradley-Terry discriminator
    # whose raw score is the reward, GRPO over eight answers, a small KL. Its critic compares answers to one
    # prompt, never to two, and no gate holds it.
    "gad": {
        "sampling": {"group_size": 8},
        "learner": {"advantage": "grpo", "loss": "ppo_clip", "kl_coef": 1e-3, "kl_estimator": "k3"},
        "discriminator": {
            "level": "sequence",
            "loss": "bradley_terry",
            "min_demonstrations": 1,
            "steps_per_policy_step": 1,
            "health": {"enabled": False},
            "reward": {"form": "bradley_terry"},
        },
    },
    # Supervised fine-tuning with early stopping; its settings are `learner.sft`.
    "sft": {},
    # A reward model, then PPO (Stiennon et al. 2020; Ouyang et al. 2022): one scalar a response minus the KL
    # of every token, critic and GAE, whitened advantages. The model compares answers to one prompt; centring
    # holds its scores, whose zero is open, near it.
    "rlhf": {
        "learner": {
            "advantage": "gae",
            "loss": "ppo_clip",
            "whiten": True,
            "epochs": 2,
            "kl_coef": 0.05,
            "kl_in": "reward",
            "kl_estimator": "k1",
        },
        "discriminator": {
            "frozen": True,
            "level": "sequence",
            "loss": "bradley_terry",
            "min_demonstrations": 1,
            "score_centring": 0.01,
            "warmup_max_steps": 500,
            "warmup_accuracy": 1.0,
            "warmup_patience": 5,
            "reward": {"form": "bradley_terry"},
        },
    },
}

READ_BY_SFT = ("canonical", "audit")
"""Sections of the discriminator that evaluations read too."""
UNREAD_BY_SFT = (
    *(f"discriminator.{name}" for name in DiscriminatorConfig.model_fields if name not in READ_BY_SFT),
    "sampling.group_size", "data.prompts", "run.prompts_per_step",
    *(
        f"learner.{name}"
        for name in (
            "epochs", "minibatches", "loss", "clip_low", "clip_high", "dual_clip", "advantage", "gamma",
            "absorbing_end", "gae_lambda", "baseline", "whiten", "kl_coef", "kl_target", "kl_gain",
            "kl_estimator", "kl_in", "entropy_coef", "importance", "importance_cap", "importance_floor",
            "normalise", "constant_length", "critic", "gumbel",
        )
    ),
)  # fmt: skip
"""Fields and sections that `sft` has no use for."""


def with_preset(raw: dict[str, Any]) -> dict[str, Any]:
    """A raw configuration over the preset of its `run.method`; one of an unknown method comes back as it is,
    for the validation to refuse."""
    return _over(_of_method(PRESETS, raw), raw)


def with_own(raw: dict[str, Any], tables: dict[str, Any]) -> dict[str, Any]:
    """A raw configuration under what its file says for its `run.method` alone; `tables` by method."""
    return _over(raw, _of_method(tables, raw))


def _of_method(by_method: Mapping[Any, dict[str, Any]], raw: dict[str, Any]) -> dict[str, Any]:
    run = raw.get("run", {})
    method = run.get("method", "rlgaf") if isinstance(run, dict) else "rlgaf"
    return copy.deepcopy(next((fields for name, fields in by_method.items() if name == method), {}))


def method_title(config: "Config") -> str:
    """What a run is called in all that it prints: `rlhf` without preference data is no RLHF, and an adversary
    that is frozen no adversary."""
    if config.run.method == "rlhf":
        return "rlhf" if config.data.preferences else "frozen reward model"
    frozen = config.discriminator.frozen and config.run.method != "sft"
    return config.run.method + (", discriminator frozen" if frozen else "")


def method_problems(config: "Config") -> list[str]:
    """Why the settings contradict `run.method`; empty when they do not."""
    method, judge, problems = config.run.method, config.discriminator, []
    if method == "sft":
        if config.sampling.temperature != 1.0:
            problems.append(
                f"sampling.temperature = {config.sampling.temperature:g} would bend the likelihood that "
                'run.method = "sft" trains; leave it at 1 (evaluations have evaluation.temperature)'
            )
        if judge.scoring.http:
            problems.append(
                'discriminator.scoring.http asks for a scoring service, and run.method = "sft" has no '
                "discriminator; drop one"
            )
        if config.run.max_policy_lag or config.run.max_disc_lag:
            problems.append(
                "run.max_policy_lag and run.max_disc_lag allow old samples and scores, and "
                'run.method = "sft" has neither; leave both at 0'
            )
    if method == "rlhf":
        if not judge.frozen:
            problems.append(
                'discriminator.frozen = false: run.method = "rlhf" has a reward model that stays as it is; '
                'for one that is trained along choose "rlgaf" or "gad"'
            )
        if not config.data.preferences and not config.data.demonstrations:
            problems.append(
                'run.method = "rlhf" trains a reward model on data.preferences, or on data.demonstrations '
                "against base samples, and has neither"
            )
    if config.data.preferences and method != "rlhf":
        problems.append(
            f'data.preferences is read by run.method = "rlhf" alone, not by "{method}"; leave it out, or '
            "put it under [method.rlhf.data]"
        )
    if config.data.preferences and method == "rlhf":
        problems += _pair_problems(judge)
    return problems


def _pair_problems(judge: DiscriminatorConfig) -> list[str]:
    """Why a discriminator with these settings cannot be trained on preference pairs."""
    problems = []
    if judge.loss != "bradley_terry":
        problems.append(
            f'data.preferences are comparisons, and discriminator.loss = "{judge.loss}" looks at single '
            'answers; set it to "bradley_terry"'
        )
    if judge.perturbed_fraction:
        problems.append(
            "discriminator.perturbed_fraction adds answers that belong to no pair of data.preferences; set "
            "it to 0"
        )
    return problems


def not_read(config: "Config") -> list[str]:
    """Dotted names of what was given and the method, or its settings, do not read; sections as a whole."""
    unread = UNREAD_BY_SFT if config.run.method == "sft" else tuple(_unread(config))
    return [name for name in unread if _given(config, name)]


def _unread(config: "Config") -> Iterator[str]:
    """What methods with a discriminator have no use for."""
    learner, judge = config.learner, config.discriminator
    yield "learner.sft"
    if learner.loss == "reinforce" or learner.epochs * learner.minibatches == 1:  # the ratio is always 1
        yield from ("learner.clip_low", "learner.clip_high")
    if learner.advantage != "gae":
        yield from ("learner.gae_lambda", "learner.critic")
    if learner.advantage != "return":
        yield "learner.baseline"
    if learner.kl_target is None:
        yield "learner.kl_gain"
    if learner.kl_coef == 0:
        yield from ("learner.kl_in", "learner.kl_estimator")
    if learner.gumbel.weight == 0:
        yield from (f"learner.gumbel.{name}" for name in GumbelConfig.model_fields if name != "weight")
    elif learner.gumbel.schedule == "constant":
        yield from ("learner.gumbel.tau_end", "learner.gumbel.tau_steps")
    if learner.lora.rank == 0:
        yield from ("learner.lora.alpha", "learner.lora.target_modules")
    if judge.lora.rank == 0:
        yield from ("discriminator.lora.alpha", "discriminator.lora.target_modules")
    if judge.frozen:
        yield from (
            "discriminator.health", "discriminator.steps_per_policy_step", "discriminator.buffer"
        )  # fmt: skip
    elif not judge.health.enabled:
        yield from (f"discriminator.health.{name}" for name in HealthConfig.model_fields if name != "enabled")
    elif not judge.health.pause_policy:
        yield from (f"discriminator.health.{name}" for name in HealthConfig.model_fields if "policy_" in name)
    if not judge.buffer.replay_fraction:
        yield "discriminator.buffer.recency"
    if judge.warmup_max_steps == 0:
        yield from (f"discriminator.warmup_{name}" for name in ("accuracy", "eval_every", "patience"))
    if not judge.length_matched:
        yield "discriminator.length_bins"
    if not judge.pair_demonstrations:
        yield "discriminator.min_demonstrations"
    if judge.reward.length_control == "off":
        yield "discriminator.reward.length_coefficient"
    if not judge.reward.user_reward:
        yield from (f"discriminator.reward.user_{name}" for name in ("weight", "timeout_s", "token"))


def _given(config: BaseModel, dotted: str) -> bool:
    *parents, leaf = dotted.split(".")
    section = config
    for parent in parents:
        if parent not in section.model_fields_set:
            return False
        section = getattr(section, parent)
    return leaf in section.model_fields_set


def _over(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    for name, value in top.items():
        if isinstance(value, dict) and isinstance(base.get(name), dict):
            base[name] = _over(base[name], value)
        else:
            base[name] = value
    return base
