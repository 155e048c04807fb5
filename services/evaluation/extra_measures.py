"""Measures of the user's own in every evaluation row: `evaluation.extra_measures` names a function of theirs.

The function takes one `Answers` and returns numbers by name, which join the row beside the built-in ones, on
selection prompts during a run and on test prompts at its end (policies and human row alike), and so reach
summary.json:

    def measures(answers: Answers) -> dict[str, float]:
        return {"questions": sum(text.endswith("?") for text in answers.model) / len(answers.model)}

It runs in the driver's process and must not depend on the order of evaluations. A resumed run calls it anew.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from discriminator.user_function import UserFunctionError, load_user_function
from services.config import ConfigError

FIELD = "evaluation.extra_measures"
DEADLINE_S = 1800.0
"""Of one call of the function: it runs in the driver, where a run would wait for it for ever."""


@dataclass(frozen=True)
class Answers:
    """What an evaluation knows. Texts are as sampled or as given, without any normalisation."""

    prompts: Sequence[str]
    """Prompt of every row, [n]."""
    human: Sequence[str]
    """A human answer to it, [n]."""
    model: Sequence[str]
    """The policy's answer, [n]; in the human row the human answers themselves."""
    demonstrations: Sequence[str]
    """All answers the discriminator is trained on."""
    nll: float
    """Mean negative log-likelihood of the evaluated human answers under the policy, nats per token."""
    human_tokens: float
    """Mean number of policy tokens of those human answers, end token included: `nll * human_tokens` is in
    nats per answer."""


Measures = Callable[[Answers], Mapping[str, float]]


def load_extra_measures(reference: str) -> Measures | None:
    """The function named by `path/to/file.py:function` or `package.module:function`; None for an empty name.

    Raises:
        ConfigError: it cannot be loaded (`discriminator.user_function`).
    """
    if not reference:
        return None
    takes = "one argument (services.evaluation.extra_measures.Answers) that returns a dictionary of numbers"
    try:
        return load_user_function(FIELD, reference, 1, takes)
    except UserFunctionError as error:
        raise ConfigError(str(error)) from error


def with_extra_measures(row: Mapping[str, Any], measures: Measures, answers: Answers) -> dict[str, Any]:
    """An evaluation row with the user's measures added.

    Raises:
        ValueError: what the function returned is no dictionary of finite numbers under new names.
    """
    extra = measures(answers)
    if not isinstance(extra, Mapping):
        raise ValueError(f"{FIELD}: returned {type(extra).__name__}, not a dictionary of numbers")
    for name, value in extra.items():
        if not isinstance(name, str):
            raise ValueError(f"{FIELD}: {name!r} is no name for a measure")
        if name in row or name == "step":
            raise ValueError(f"{FIELD}: {name!r} is the name of a built-in measure; choose another")
        if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
            raise ValueError(f"{FIELD}: {name!r} is {value!r}, not a finite number")
    return {**row, **{name: float(value) for name, value in extra.items()}}
