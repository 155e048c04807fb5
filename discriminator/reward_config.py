"""Configuration of the reward: how a score becomes one, and what is added to it."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from discriminator.user_function import SPELLING, names_a_function
from rollout.config import Section
from rollout.credentials import VariableName

RewardForm = Literal["neg_log_one_minus_d", "prob", "logit", "log_d", "bradley_terry", "relativistic"]

ANCHORED_FORMS = ("neg_log_one_minus_d", "prob", "log_d")
"""Reward forms, and objectives of Gumbel-Softmax, that bend at a score of zero."""

RAW_FORMS = ("logit", "bradley_terry")
"""Reward forms that are the score itself, and have a zero only where the loss gives it one."""


class RewardConfig(Section):
    """How a score becomes a reward."""

    form: RewardForm = "neg_log_one_minus_d"
    """Reward form. At the sequence level only `neg_log_one_minus_d` kept all modes of a language that has
    known ones; per token with gamma .25 `logit` and `prob` did too, and `log_d` in two runs of three.
    `bradley_terry` is the raw score of a discriminator trained with that loss; `relativistic` subtracts the
    score of the prompt's demonstration, so every prompt needs one."""

    clip: PositiveFloat | None = 5.0
    """Rewards are clipped to [-clip, clip], before whitening, length control and the user's reward (none: no
    clip). Left out, it is none for the forms `logit` and `bradley_terry` of a discriminator whose loss leaves
    the zero of the scores open: the interval could lie anywhere."""

    whiten: Literal["off", "scale", "full"] = "off"
    """`scale` divides the discriminator's rewards by their standard deviation over the step, `full` subtracts
    their mean first."""

    length_control: Literal["off", "deviation", "overlong"] = "off"
    """`deviation` takes length_coefficient * |L - length_target| / length_target off a response of L sampled
    tokens; `overlong` takes nothing up to length_target - length_slack, then linearly up to
    length_coefficient at length_target, and that much beyond."""

    length_coefficient: NonNegativeFloat = 1.0
    """Weight of the length control."""

    length_target: PositiveInt | None = None
    """Sampled tokens: the length wanted (`deviation`, e.g. the demonstrations' mean) or the longest one
    (`overlong`)."""

    length_slack: PositiveInt | None = None
    """Tokens below `length_target` over which the `overlong` penalty rises (none: a quarter of the
    target)."""

    user_reward: str = ""
    """A reward of your own, added to the discriminator's: "path/to/file.py:function" or
    "package.module:function", called with the lists prompts, responses and complete, or an http(s) URL that
    is sent the same as JSON. All answer with one number per response."""

    user_weight: Annotated[float, Field(allow_inf_nan=False)] = 1.0
    """Weight of the user's reward; the discriminator's weighs 1. It counts in full for every token of the
    response, as length control does, whatever learner.gamma."""

    user_timeout_s: PositiveFloat = 60.0
    """Deadline of one call of the user's reward, for all responses of a step."""

    user_token: VariableName = "RLGAF_REWARD_TOKEN"
    """Name of the environment variable with a bearer token for the URL; not set: none is sent."""

    @model_validator(mode="after")
    def _consistent(self) -> "RewardConfig":
        if self.length_control != "off" and self.length_target is None:
            raise ValueError(f'reward: length_control = "{self.length_control}" needs length_target')
        if self.length_control != "off" and self.length_coefficient == 0:
            raise ValueError(
                f'reward: length_coefficient = 0 leaves length_control = "{self.length_control}" without '
                "effect; set one of them"
            )
        if self.length_control == "off" and (self.length_target or self.length_slack):
            raise ValueError(
                "reward: length_target and length_slack do nothing without length_control; set it to "
                '"deviation" or "overlong"'
            )
        if self.length_slack is not None and self.length_control != "overlong":
            raise ValueError('reward: length_slack belongs to length_control = "overlong"')
        if self.length_slack and self.length_target and self.length_slack > self.length_target:
            raise ValueError(
                f"reward: length_slack = {self.length_slack} exceeds length_target = {self.length_target}"
            )
        url = self.user_reward.startswith(("http://", "https://"))
        if self.user_reward and not url and not names_a_function(self.user_reward):
            raise ValueError(
                f'reward: user_reward = "{self.user_reward}" is neither {SPELLING} nor an http(s) URL'
            )
        return self

    @property
    def free_tokens(self) -> int | None:
        """Length up to which `overlong` takes nothing; None without it."""
        if self.length_control != "overlong" or self.length_target is None:
            return None
        return self.length_target - (self.length_slack or max(1, self.length_target // 4))
