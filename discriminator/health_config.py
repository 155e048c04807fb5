"""Configuration of the health gate: when the discriminator (and the policy, if asked for) slows or pauses."""

from typing import Annotated

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from rollout.config import Section

Fraction = Annotated[float, Field(ge=0, le=1)]


class HealthConfig(Section):
    """Bands of the health gate, measured on held-out demonstrations against fresh rollouts. Margin and
    saturation are in logits: the losses hinge and least_squares, which keep scores near -1 and 1, do not get
    there, and accuracy alone acts."""

    enabled: bool = True
    """Off: every policy step gets `steps_per_policy_step` discriminator steps, as in `gad`: a loss of
    `bradley_terry` within prompts leaves the scores an offset per prompt, and the readings compare answers to
    different prompts."""

    low_accuracy: Fraction = 0.55
    """Below this balanced accuracy the discriminator gets `extra_steps` more steps."""

    slow_accuracy: Fraction = 0.95
    """From here on the discriminator makes one step per policy step."""

    pause_accuracy: Fraction = 0.99
    """From here on it makes none, until the accuracy is below `slow_accuracy` again."""

    confident_accuracy: Fraction = 0.9
    """Margin and saturation slow or pause from this accuracy on. Below it large scores are information, not
    saturation: a few responses that no expert would give are enough for a margin of six."""

    slow_margin: PositiveFloat = 6.0
    """Margin (mean score of demonstrations minus that of rollouts, in logits) that slows the
    discriminator."""

    pause_margin: PositiveFloat = 10.0
    """Margin that pauses it, until it is below `slow_margin` again."""

    slow_saturation: Fraction = 0.9
    """Share of sequence probabilities outside [.01, .99] that slows the discriminator: rewards have gone
    flat."""

    extra_steps: NonNegativeInt = 1
    """Steps added per policy step while the accuracy is below `low_accuracy`."""

    pause_policy: bool = False
    """Let the gate slow and pause the policy too: below `low_accuracy` by `policy_slow_factor`, below
    `policy_pause_accuracy` altogether, until the accuracy is back at `low_accuracy`."""

    policy_pause_accuracy: Fraction = 0.52
    """Below this held-out accuracy the rewards are noise and the policy stands still."""

    policy_slow_factor: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Factor of the policy's learning rate while the accuracy is below `low_accuracy`."""

    policy_pause_limit: PositiveInt = 10
    """Readings after which a pause ends whatever the accuracy: a policy that has become what it imitates
    keeps the discriminator at chance for good. It then goes on slowly until the accuracy has been back at
    `low_accuracy` once."""

    @model_validator(mode="after")
    def _bands_in_order(self) -> "HealthConfig":
        if not self.low_accuracy < self.slow_accuracy <= self.pause_accuracy:
            raise ValueError("health: low_accuracy < slow_accuracy <= pause_accuracy must hold")
        if not self.low_accuracy < self.confident_accuracy <= self.slow_accuracy:
            raise ValueError("health: low_accuracy < confident_accuracy <= slow_accuracy must hold")
        if self.slow_margin > self.pause_margin:
            raise ValueError("health: slow_margin must not exceed pause_margin")
        if self.pause_policy and not self.enabled:
            raise ValueError("health: pause_policy needs enabled = true, the readings that it follows")
        if self.pause_policy and self.policy_pause_accuracy > self.low_accuracy:
            raise ValueError("health: policy_pause_accuracy must not exceed low_accuracy")
        return self
