"""The run configuration: every folder's section composed, read from TOML, overridden from the command line.

Nothing here imports torch, Ray or vLLM: a wrong field is reported within the first second.
"""

import copy
import difflib
import os
import tomllib
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError, model_validator
from pydantic.fields import FieldInfo

from discriminator.config import DiscriminatorConfig
from learner.config import LearnerConfig
from rollout.config import DataConfig, PolicyConfig, RolloutConfig, SamplingConfig, Section
from rollout.credentials import Redacted, fields_with_credentials
from services.contradictions import gumbel_problems, length_problems, update_problems
from services.evaluation.config import EvaluationConfig
from services.foreign_names import FOREIGN_NAMES
from services.methods import PRESETS, method_problems, with_own, with_preset
from services.run_config import RunSection


class ConfigError(Redacted, ValueError):
    """A configuration that cannot run; the message names field, value and remedy, one problem a line."""


class Config(Section):
    """One training run."""

    run: RunSection = RunSection()
    data: DataConfig = DataConfig()
    policy: PolicyConfig = PolicyConfig()
    sampling: SamplingConfig = SamplingConfig()
    rollout: RolloutConfig = RolloutConfig()
    learner: LearnerConfig = LearnerConfig()
    discriminator: DiscriminatorConfig = DiscriminatorConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @model_validator(mode="after")
    def _consistent(self) -> "Config":
        problems = []
        if not self.policy.model:
            problems.append("policy.model is empty: give a hub name or the folder of a causal language model")
        if not self.data.demonstrations:
            problems.append("data.demonstrations is empty: give a JSONL or Parquet file or a dataset folder")
        if "://" in self.run.output:
            problems.append(
                f'run.output = "{self.run.output}" is no folder: name one, and give the URL as run.mirror'
            )
        if self.run.mirror and "://" not in self.run.mirror:
            problems.append(
                f'run.mirror = "{self.run.mirror}" is no URL: give one like s3://bucket/runs, or leave it out'
            )
        if self.run.exact and (self.run.max_policy_lag or self.run.max_disc_lag):
            problems.append("run.exact needs run.max_policy_lag = 0 and run.max_disc_lag = 0")
        if self.run.method != "sft" and self.learner.needs_groups and self.sampling.group_size == 1:
            problems.append(
                f'learner.advantage = "{self.learner.advantage}" with learner.baseline = '
                f'"{self.learner.baseline}" compares the answers to one prompt: it needs '
                "sampling.group_size > 1"
            )
        if self.discriminator.reward.form == "relativistic" and self.data.prompts:
            problems.append(
                'discriminator.reward.form = "relativistic" compares with the prompt\'s demonstration, which '
                "data.prompts has not; leave one out"
            )
        if self.rollout.max_model_len is not None:
            need = self.data.max_prompt_tokens + self.sampling.max_tokens
            if self.rollout.max_model_len < need:
                problems.append(
                    f"rollout.max_model_len = {self.rollout.max_model_len} is below data.max_prompt_tokens "
                    f"+ sampling.max_tokens = {need}"
                )
        scoring = self.discriminator.scoring
        if scoring.http and not os.environ.get(scoring.http_token):
            problems.append(
                "discriminator.scoring.http needs a bearer token: put one into the environment variable "
                + scoring.http_token
            )
        if self.run.method != "sft":  # which reads none of what these compare
            problems += gumbel_problems(self)
            problems += length_problems(self)
            problems += update_problems(self)
        problems += method_problems(self)
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def folder(self) -> Path:
        """The run's folder, absolute."""
        return Path(self.run.output).expanduser().absolute() / self.run.name

    @property
    def gamma(self) -> float:
        """Discount of later rewards: learner.gamma, or 1 at the sequence level and .25 per token
        (docs/design.md).
        """
        if self.learner.gamma is not None:
            return self.learner.gamma
        return 1.0 if self.discriminator.level == "sequence" else 0.25

    @property
    def evaluation_sampling(self) -> dict[str, float]:
        """How evaluations draw their responses."""
        temperature = self.evaluation.temperature or self.sampling.temperature
        return {"temperature": temperature, "top_p": self.evaluation.top_p}

    @property
    def discriminator_updates(self) -> int:
        """Most updates of the discriminator, warm-up and the health gate's extra steps included."""
        judge = self.discriminator
        a_turn = judge.steps_per_policy_step + (judge.health.extra_steps if judge.health.enabled else 0)
        return judge.warmup_max_steps + (0 if judge.frozen else self.run.steps * a_turn)

    @property
    def max_model_len(self) -> int:
        """Longest prompt plus response in tokens."""
        return self.rollout.max_model_len or self.data.max_prompt_tokens + self.sampling.max_tokens


def with_absolute_paths(config: Config) -> Config:
    """The same configuration with local model folders as absolute paths: worker processes have other
    directories.
    """

    def settled(name: str) -> str:
        folder = Path(name).expanduser()
        return str(folder.absolute()) if name and folder.is_dir() else name

    return config.model_copy(
        update={
            "policy": config.policy.model_copy(update={"model": settled(config.policy.model)}),
            "discriminator": config.discriminator.model_copy(
                update={"model": settled(config.discriminator.model)}
            ),
            "evaluation": config.evaluation.model_copy(
                update={"embedding_model": settled(config.evaluation.embedding_model)}
            ),
        }
    )


def field_paths(model: type[BaseModel] = Config, prefix: str = "") -> dict[str, type[BaseModel] | None]:
    """Dotted path of every field; the value is the section's class for sections, None for plain fields."""
    paths: dict[str, type[BaseModel] | None] = {}
    for name, field in model.model_fields.items():
        section = _section_of(field.annotation)
        paths[prefix + name] = section
        if section is not None:
            paths |= field_paths(section, f"{prefix}{name}.")
    return paths


def _section_of(annotation: Any) -> type[BaseModel] | None:
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def load(path: Path | None, overrides: list[str] | None = None) -> Config:
    """Read a TOML file, apply `--section.field value` overrides, validate.

    Raises:
        ConfigError: unreadable file, unknown field (with the nearest known one), wrong value or
        contradiction.
    """
    try:
        return Config.model_validate(with_preset(given(path, overrides)))
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            where = ".".join(str(part) for part in problem["loc"]) or "configuration"
            message = problem["msg"].removeprefix("Value error, ")
            value = "" if problem["type"] == "value_error" else f" (given: {problem['input']!r})"
            lines += [f"{where}: {part}{value}" for part in message.split("; ")]
        raise ConfigError("\n".join(lines)) from None


def given(path: Path | None, overrides: list[str] | None = None) -> dict[str, Any]:
    """What a TOML file and the command line say for their `run.method`, as nested sections, not validated.

    Raises:
        ConfigError: unreadable file or unknown field.
    """
    raw: dict[str, Any] = {}
    if path is not None:
        try:
            raw = tomllib.loads(path.read_text(encoding="utf-8-sig"))
        except FileNotFoundError:
            raise ConfigError(f"{path}: no such configuration file") from None
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path}: not valid TOML: {error}") from None
    said = parse_overrides(overrides or [])
    refuse_credentials([*fields_with_credentials(raw), *fields_with_credentials(said)])
    tables = raw.pop("method") if isinstance(raw.get("method"), dict) else {}
    _override(raw, said)
    _refuse_unknown(raw, tables, path)
    raw = with_own(raw, tables)
    _override(raw, said)  # again: it overrides the method's tables too
    return raw


def refuse_credentials(fields: list[str]) -> None:
    """Raise ConfigError where fields hold credentials."""
    if fields:
        raise ConfigError(
            "\n".join(
                f"{field}: the URL holds credentials, and a configuration is copied to folders and logs; "
                "leave them out and put them into the environment, as in AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY, HF_TOKEN, RAY_AUTH_TOKEN or RLGAF_REWARD_TOKEN"
                for field in dict.fromkeys(fields)
            )
        )


def _override(raw: dict[str, Any], said: dict[str, Any]) -> None:
    for dotted, value in said.items():
        node = raw
        *parents, leaf = dotted.split(".")
        for depth, parent in enumerate(parents, start=1):
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                where = ".".join(parents[:depth])
                known = field_paths().get(where)
                raise ConfigError(
                    f"{where} is a section; write [{where}] and fields below it"
                    if known is not None
                    else f"unknown field {dotted}: {where} is no section"
                )
        node[leaf] = copy.deepcopy(value)


def parse_overrides(arguments: list[str]) -> dict[str, Any]:
    """`["--a.b", "1", "--c.d=x"]` → `{"a.b": 1, "c.d": "x"}`; values are TOML, or else plain strings.

    A text field takes a bare word as it stands (`--run.name 2024`).

    Raises:
        ConfigError: a word that is no override, or an override without value.
    """
    overrides: dict[str, Any] = {}
    words = iter(arguments)
    for word in words:
        if not word.startswith("--"):
            raise ConfigError(f"unexpected argument {word!r}; overrides look like --learner.lr 1e-5")
        dotted, equals, text = word[2:].partition("=")
        if not equals:
            text = next(words, "")
            if text == "" or text.startswith("--"):
                raise ConfigError(
                    f"--{dotted}: a value is missing, as in --{dotted} VALUE or --{dotted}=VALUE"
                )
        overrides[dotted] = _override_value(dotted, text)
    return overrides


def _override_value(dotted: str, text: str) -> Any:
    field = _field(dotted)
    annotation = field.annotation if field is not None else None
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return text
    return text if annotation is str and not isinstance(value, str) else value


def _field(dotted: str) -> FieldInfo | None:
    parent, _, leaf = dotted.rpartition(".")
    section = field_paths().get(parent) if parent else Config
    return section.model_fields.get(leaf) if section is not None else None


def _refuse_unknown(raw: dict[str, Any], tables: dict[str, Any], path: Path | None) -> None:
    known = field_paths()
    problems = []

    def walk(node: dict[str, Any], prefix: str, within: str = "") -> None:
        for name, value in node.items():
            dotted = prefix + name
            if dotted not in known:
                problems.append(_unknown(dotted, list(known), within))
            elif known[dotted] is not None and isinstance(value, dict):
                walk(value, dotted + ".", within)
            elif known[dotted] is not None:
                where = within + dotted
                problems.append(f"{where} is a section; write [{where}] and fields below it")
            elif within and dotted == "run.method":
                problems.append(f"{within}run.method: the table is already one method's; set run.method")

    walk(raw, "")
    for method, table in tables.items():
        if method in PRESETS and isinstance(table, dict):
            walk(table, "", f"method.{method}.")
        elif method in PRESETS:
            problems.append(f"method.{method} is no field; write [method.{method}.run] or another section")
        else:
            problems.append(f"unknown method {method} in [method.{method}]; there are {', '.join(PRESETS)}")
    if problems:
        raise ConfigError("\n".join(f"{path or 'command line'}: {problem}" for problem in problems))


def _unknown(dotted: str, known: list[str], within: str) -> str:
    section, _, leaf = dotted.rpartition(".")
    if ours := FOREIGN_NAMES.get(leaf.replace("-", "_")):
        same = f"{section}.{ours.partition('.')[2]}"  # discriminator.learning_rate is discriminator.lr
        return f"unknown field {within}{dotted}; here it is {within}{same if same in known else ours}"
    same_leaf = [path for path in known if path.rsplit(".", 1)[-1] == leaf]
    close = same_leaf or difflib.get_close_matches(dotted, known, n=2, cutoff=0.6)
    close = close or [
        p for p in known if difflib.SequenceMatcher(None, leaf, p.rsplit(".", 1)[-1]).ratio() > 0.75
    ]
    meant = " or ".join(within + path for path in close[:2])
    hint = f"; did you mean {meant}?" if close else "; `rlgaf config` lists all fields"
    return f"unknown field {within}{dotted}{hint}"
