"""What no section of a configuration can refuse alone: settings of several that make no sense together. Those
of a method are in `methods.py`.
"""

from typing import TYPE_CHECKING

from discriminator.config import BOUNDED_LOSSES, SHIFT_FREE_LOSSES
from discriminator.reward_config import ANCHORED_FORMS, RAW_FORMS

if TYPE_CHECKING:
    from services.config import Config


def length_problems(config: "Config") -> list[str]:
    """Why per-token rewards would pay for length, and why length control would do nothing."""
    judge, absorbing = config.discriminator, config.learner.absorbing_end
    problems = []
    target = judge.reward.length_target
    if judge.reward.length_control == "deviation" and target and target > config.sampling.max_tokens:
        problems.append(
            f"discriminator.reward.length_target = {target} exceeds sampling.max_tokens = "
            f"{config.sampling.max_tokens}: no response gets there, and the control pays for running into "
            "the limit; lower it"
        )
    free = judge.reward.free_tokens
    if free is not None and free >= config.sampling.max_tokens:
        problems.append(
            f"discriminator.reward.length_control begins above {free} tokens, and sampling.max_tokens = "
            f"{config.sampling.max_tokens} never gets there; lower discriminator.reward.length_target"
        )
    if absorbing and (judge.level == "sequence" or config.gamma == 1):
        problems.append(
            "learner.absorbing_end continues per-token rewards under a discount: set discriminator.level "
            '= "token" and learner.gamma below 1, or drop it'
        )
    read = judge.canonical.max_response_tokens
    if absorbing and not judge.model and read is not None and read < config.sampling.max_tokens:
        problems.append(
            f"learner.absorbing_end: discriminator.canonical.max_response_tokens = {read} leaves tokens of "
            f"responses of up to sampling.max_tokens = {config.sampling.max_tokens} without a reward, so "
            "that the end is worth more than what comes before it; leave it out"
        )
    if judge.level == "sequence" and config.gamma == 0:
        problems.append(
            'learner.gamma = 0 with discriminator.level = "sequence" lets nothing but the last token learn; '
            "leave it out"
        )
    open_zero = judge.loss in SHIFT_FREE_LOSSES and judge.reward.form in RAW_FORMS
    if judge.level == "token" and open_zero and not judge.score_centring and not absorbing:
        problems.append(
            f'discriminator.loss = "{judge.loss}" leaves the zero of the scores open, and per token a '
            "constant in them pays for long responses, or for short ones: set discriminator.score_centring, "
            "or learner.absorbing_end"
        )
    return problems


def update_problems(config: "Config") -> list[str]:
    """Why a step's or the run's updates do not come out even."""
    learner, judge, run = config.learner, config.discriminator, config.run
    problems = []
    if learner.minibatches > run.prompts_per_step:
        problems.append(
            f"learner.minibatches = {learner.minibatches} cannot be filled with the groups of "
            f"run.prompts_per_step = {run.prompts_per_step}; lower the first"
        )
    updates = {
        "learner": (learner, run.steps * learner.epochs * learner.minibatches),
        "discriminator": (judge, config.discriminator_updates),
    }
    for name, (section, most) in updates.items():
        falls = section.lr_schedule != "constant" and section.schedule_steps is None
        if falls and 0 < most <= section.warmup_steps:
            problems.append(
                f"{name}.warmup_steps = {section.warmup_steps} is not over when the run is, after {most} "
                f'updates, and {name}.lr_schedule = "{section.lr_schedule}" never begins; shorten it'
            )
    return problems


def gumbel_problems(config: "Config") -> list[str]:
    """Why Gumbel-Softmax cannot be had with the other sections."""
    gumbel, judge = config.learner.gumbel, config.discriminator
    if gumbel.weight == 0:
        return []
    problems = []
    if judge.model and judge.model != config.policy.model:
        problems.append(
            f'learner.gumbel: straight-through tokens of policy.model = "{config.policy.model}" mean nothing '
            f'in the vocabulary of discriminator.model = "{judge.model}"; leave discriminator.model empty'
        )
    if judge.body == "encoder":
        problems.append(
            'learner.gumbel: discriminator.body = "encoder" reads another vocabulary than the policy writes; '
            'use "auto" or "causal"'
        )
    if judge.loss in BOUNDED_LOSSES and gumbel.objective in ANCHORED_FORMS:
        problems.append(
            f'learner.gumbel.objective = "{gumbel.objective}" reads sigmoid(score) as a probability, which '
            f'discriminator.loss = "{judge.loss}" does not make of it; set the objective to "logit"'
        )
    if judge.loss in SHIFT_FREE_LOSSES and gumbel.objective in ANCHORED_FORMS and not judge.score_centring:
        problems.append(
            f'learner.gumbel.objective = "{gumbel.objective}" bends at a score of zero, and '
            f'discriminator.loss = "{judge.loss}" leaves the zero of the scores open; set the objective to '
            '"logit", or discriminator.score_centring'
        )
    if gumbel.max_tokens is not None and gumbel.max_tokens > config.sampling.max_tokens:
        problems.append(
            f"learner.gumbel.max_tokens = {gumbel.max_tokens} exceeds sampling.max_tokens = "
            f"{config.sampling.max_tokens}: the discriminator never sees responses of that length"
        )
    shaped = judge.reward.user_reward or judge.reward.length_control != "off"
    if gumbel.policy_gradient_weight == 0 and shaped:
        problems.append(
            "learner.gumbel.policy_gradient_weight = 0 drops the rewards, with them "
            "discriminator.reward.user_reward and length_control; give the policy gradient a weight"
        )
    return problems
