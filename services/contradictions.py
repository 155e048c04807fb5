"""What no section of a configuration can refuse alone: settings of several that make no sense together. Those
of a method are in `methods.py`.
"""

from typing import TYPE_CHECKING

from discriminator.config import ANCHORED_FORMS, RAW_FORMS, SHIFT_FREE_LOSSES

if TYPE_CHECKING:
    from services.config import Config


def length_problems(config: "Config") -> list[str]:
    """Why per-token rewards would pay for length, and why length control would do nothing."""
    judge, absorbing = config.discriminator, config.learner.absorbing_end
    problems = []
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
    open_zero = judge.loss in SHIFT_FREE_LOSSES and judge.reward.form in RAW_FORMS
    if judge.level == "token" and open_zero and not judge.score_centring and not absorbing:
        problems.append(
            f'discriminator.loss = "{judge.loss}" leaves the zero of the scores open, and per token a '
            "constant in them pays for long responses, or for short ones: set discriminator.score_centring, "
            "or learner.absorbing_end"
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
