"""Configuration of the shortcut audit."""

from typing import Annotated

from pydantic import Field, PositiveInt

from rollout.config import Section


class AuditConfig(Section):
    """Looks for cues that tell demonstrations from rollouts without reading them, before training (there, of
    preference pairs, for cues that tell chosen from rejected answers) and at each evaluation."""

    enabled: bool = True
    """Off: no base samples are drawn, nothing is looked for, nothing is refused."""

    base_samples: Annotated[int, Field(ge=32)] = 2000
    """Responses of the base model drawn before training. The training demonstrations are cut to as many, and
    so are preference pairs, for which none are drawn."""

    absent_from: PositiveInt = 2000
    """The policy cannot produce what none of at least this many base samples shows. With fewer samples such a
    cue is reported and nothing is refused for it."""

    dominant_share: Annotated[float, Field(ge=0.1, le=1)] = 0.5
    """A run is refused for a value that the policy cannot produce from this share of the demonstrations on;
    below it the value is reported."""

    least_accuracy: Annotated[float, Field(gt=0.5, le=1)] = 0.55
    """A cue is named from this balanced accuracy on, if its interval lies above one half."""

    refuse: bool = True
    """Off: what would keep the run from starting is reported only."""
