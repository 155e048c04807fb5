"""What may differ from a checkpoint's own configuration when a run goes on from it.

Invariant: a difference is free (it changes where, how fast or how long a run computes), named (from here on
something else is learned or measured) or refused (the checkpoint's weights, optimizer states or data do not
fit it). A field without a rule is named. What a run settled for itself stays as it was unless the
configuration says otherwise: `policy.dtype = "auto"`, and the end of a schedule that follows from
`run.steps`.
"""

import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import PurePath
from typing import Any

from pydantic import BaseModel

from rollout.files import parsed
from services.config import Config
from services.config_text import to_toml, toml_value

Flat = dict[str, Any]
"""A configuration as TOML values by dotted name."""

FREE = (
    *(f"run.{name}" for name in ("name", "output", "steps", "checkpoint_every", "keep_checkpoints")),
    *(f"run.{name}" for name in ("mirror", "mirror_timeout_s", "wandb", "rollbacks")),
    *(f"policy.{name}" for name in ("trust_remote_code",)),
    *(f"evaluation.{name}" for name in ("embedding_threads", "look_every", "shown_samples")),
    *(
        f"{side}.{name}"
        for side in ("learner", "discriminator")
        for name in (
            "ranks", "zero_stage", "device", "cpus_per_rank", "threads", "gradient_checkpointing", "packing",
            "pack_length", "micro_batch_tokens", "logits_chunk", "start_timeout_s", "step_timeout_s",
        )
    ),
    "discriminator.scoring",
    "discriminator.trust_remote_code",
    "rollout",
)  # fmt: skip
"""Fields and sections that change nothing but rounding; with `run.exact` that is named too."""
NAMED = tuple(
    f"data.{name}" for name in ("demonstrations", "prompts", "preferences", "on_error", "max_prompt_tokens")
)
"""What is not refused of a section that is: files may have moved, and what is read from them is compared."""
REFUSED = {
    "run.method": "another method trains other things",
    "run.seed": "its prompts and samples were drawn with the other",
    "data": "its prompts and splits were made with the other",
    "learner.lora": "its adapters were trained with the other",
    "discriminator.lora": "its adapters were trained with the other",
}
MODELS = ("policy.model", "discriminator.model")
"""Refused, unless it is a folder of the same name in another place."""
LEFT_OPEN = {"policy.dtype": "auto"}
"""Fields that a run settles when it first starts, and the value that leaves them open."""
PARTS = {"learner.advantage": "gae", "learner.kl_target": "none"}
"""Fields with a value that adds a part to what a checkpoint holds (a critic), or one that takes it away
(`none`): refused where the checkpoint lacks the part."""


@dataclass
class Differences:
    """Sentences about the fields that differ."""

    named: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)


def flat_config(text: str) -> Flat:
    """A configuration's TOML by dotted name. Raises ValueError on text that is no TOML."""
    try:
        return dict(_flattened(tomllib.loads(text), ""))
    except RecursionError:
        raise ValueError("the checkpoint's configuration is nested too deeply") from None


def compare(before: Flat, config: Config) -> Differences:
    """How `config` differs from the configuration of the checkpoint that it is to go on from."""
    after, defaults = flat_config(to_toml(config)), flat_config(to_toml(Config.model_construct()))
    found = Differences()
    for name in {**before, **after}:
        old, new = before.get(name, defaults.get(name)), after.get(name)
        if name not in after:
            found.named.append(f"{name} = {toml_value(old)} is the checkpoint's and no field any more")
        elif old != new:
            said = f"{name} = {toml_value(new)}, the checkpoint has {toml_value(old)}"
            if reason := _refused(name, old, new):
                found.refused.append(f"{said}: {reason}")
            elif not _free(name, config.run.exact):
                found.named.append(said)
    for name, updates in horizons(config).items():
        ends = after[name]
        if name.endswith("schedule_steps") and ends != "none" and ends < updates:
            found.named.append(f"{name} = {ends}: the learning rate is 0 from then on, of {updates} updates")
    return found


def settled_by(before: Flat, config: Config) -> Config:
    """`config` with what the run settled for itself and `config` leaves open.

    Raises:
        ValueError: a schedule that followed from `run.steps` would be over before the run.
    """
    for name, still_open in LEFT_OPEN.items():
        if _value(config, name) == still_open and name in before:
            changed = _with(config, name, before[name])
            config = parsed(
                "the checkpoint's configuration", partial(Config.model_validate, changed.model_dump())
            )
    for name, updates in horizons(config).items():
        ends = before.get(name)
        if _value(config, name) is not None or not isinstance(ends, int):
            continue
        if ends < updates and name.endswith("schedule_steps"):
            raise ValueError(
                f"{name}: the checkpoint's learning rate falls until update {ends}, and with run.steps = "
                f"{config.run.steps} there are {updates}; say {name} = {updates} to stretch it, or another "
                "number"
            )
        config = _with(config, name, ends)
    return config


def settled(config: Config) -> Config:
    """`config` with the schedules' ends that follow from `run.steps` written out: for a checkpoint."""
    for name, updates in horizons(config).items():
        if _value(config, name) is None:
            config = _with(config, name, updates)
    return config


def horizons(config: Config) -> dict[str, int]:
    """Fields that say when a schedule ends, of those schedules that the run has; and when it does unless they
    say so."""
    sft, learner, run = config.run.method == "sft", config.learner, config.run
    found = {}
    if learner.lr_schedule != "constant":
        found["learner.schedule_steps"] = run.steps * (1 if sft else learner.epochs * learner.minibatches)
    if config.discriminator.lr_schedule != "constant" and not sft:
        found["discriminator.schedule_steps"] = config.discriminator_updates
    if learner.gumbel.weight and not sft:
        found["learner.gumbel.tau_steps"] = run.steps
    return found


def _refused(name: str, old: Any, new: Any) -> str:
    """Why a difference cannot be; empty where it can."""
    if name in MODELS:
        moved = PurePath(str(old)).name == PurePath(str(new)).name
        return "" if moved else "its weights are of the other"
    if name in PARTS:
        return "it lacks what that needs" if _has_part(name, new) and not _has_part(name, old) else ""
    if _under(name, NAMED):
        return ""
    return next((reason for place, reason in REFUSED.items() if _under(name, (place,))), "")


def _has_part(name: str, value: Any) -> bool:
    return (value == PARTS[name]) != (PARTS[name] == "none")


def _free(name: str, exact: bool) -> bool:
    unchanged = name.startswith("run.") or name.endswith("_timeout_s")
    return _under(name, FREE) and (unchanged or not exact)


def _under(name: str, places: tuple[str, ...]) -> bool:
    return any(name == place or name.startswith(f"{place}.") for place in places)


def _flattened(table: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in table.items():
        if isinstance(value, dict):
            yield from _flattened(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _value(section: BaseModel, dotted: str) -> Any:
    name, _, rest = dotted.partition(".")
    return _value(getattr(section, name), rest) if rest else getattr(section, name)


def _with(section: Any, dotted: str, value: Any) -> Any:
    """A copy of the section with one field set."""
    name, _, rest = dotted.partition(".")
    return section.model_copy(update={name: _with(getattr(section, name), rest, value) if rest else value})
