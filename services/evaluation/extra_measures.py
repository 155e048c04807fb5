"""Measures of the user's own in every evaluation row: `evaluation.extra_measures` names a function of theirs.

The function takes one `Answers` and returns numbers by name, which join the row beside the built-in ones, on
selection prompts during a run and on test prompts at its end (policies and human row alike), and so reach
summary.json:

    def measures(answers: Answers) -> dict[str, float]:
        return {"questions": sum(text.endswith("?") for text in answers.model) / len(answers.model)}

It runs in the driver's process and must not depend on the order of evaluations. A resumed run calls it anew.
"""

import inspect
import math
import pkgutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import Any

from services.config import ConfigError

FIELD = "evaluation.extra_measures"


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

    A file is imported as Python imports it when it is run from the folder above its outermost package (a
    folder with `__init__.py`), or from its own folder without one: that folder comes first on `sys.path`.

    Raises:
        ConfigError: no such file, module or function, an import that fails, or no function of one argument.
    """
    if not reference:
        return None
    source, _, function = reference.rpartition(":")
    module, file = (source, None) if not source.endswith(".py") else _importable(reference, Path(source))
    try:
        imported = pkgutil.resolve_name(f"{module}:")
    except Exception as error:  # the user's file may fail in any way; the reason belongs to the message
        raise ConfigError(
            f"{FIELD} = {reference!r}: importing {source} failed with {type(error).__name__}: {error}"
        ) from error
    loaded = getattr(imported, "__file__", None)
    if file is not None and (loaded is None or Path(loaded).resolve() != file):
        raise ConfigError(
            f"{FIELD} = {reference!r}: another module named {module} is loaded already ({loaded}); "
            "rename the file"
        )
    if not hasattr(imported, function):
        known = ", ".join(_functions(imported))
        raise ConfigError(
            f"{FIELD} = {reference!r}: {source} has no {function!r}" + (f"; it has {known}" if known else "")
        )
    found = getattr(imported, function)
    if not callable(found) or not _takes_one(found):
        raise ConfigError(
            f"{FIELD} = {reference!r}: must be a function of one argument "
            "(services.evaluation.extra_measures.Answers) that returns a dictionary of numbers"
        )
    return found


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


def _importable(reference: str, path: Path) -> tuple[str, Path]:
    """Dotted name and resolved path of a Python file, with the folder it is imported from on `sys.path`."""
    file = path.expanduser().resolve()
    if not file.is_file():
        raise ConfigError(f"{FIELD} = {reference!r}: no such file (looked for {file})")
    names, folder = [file.stem], file.parent
    while (folder / "__init__.py").is_file():
        names.insert(0, folder.name)
        folder = folder.parent
    if not all(name.isidentifier() for name in names):
        raise ConfigError(f"{FIELD} = {reference!r}: {'.'.join(names)} cannot be imported; rename it")
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    return ".".join(names), file


def _functions(module: ModuleType) -> list[str]:
    """Public functions that a module defines itself."""
    return [
        name
        for name, value in inspect.getmembers(module, inspect.isfunction)
        if value.__module__ == module.__name__ and not name.startswith("_")
    ]


def _takes_one(function: Callable[..., Any]) -> bool:
    try:
        inspect.signature(function).bind(None)
    except (TypeError, ValueError):
        return False
    return True
