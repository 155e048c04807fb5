"""What is checked of a run's functions, models and data before anything is started."""

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from discriminator.config import DiscriminatorConfig
from discriminator.external_reward import UserRewardError, load_user_reward
from rollout.data import SPLITS, DataError, DataSplits, require_at_least
from rollout.hub import hub_problem
from rollout.templates import load_tokenizer
from services.config import Config, ConfigError
from services.evaluation.extra_measures import load_extra_measures


def check_user_functions(config: Config) -> None:
    """The user's own functions can be loaded.

    Raises:
        ConfigError: one cannot.
    """
    load_extra_measures(config.evaluation.extra_measures)
    if config.run.method == "sft":
        return
    try:
        load_user_reward(config.discriminator.reward)
    except UserRewardError as error:
        raise ConfigError(f"discriminator.reward: {error}") from None


def check_other_models(config: Config) -> None:
    """The models that judge can be found and have a fast tokenizer, like the policy, and the discriminator's
    is of a kind that can judge at its level; no weights are read.

    Raises:
        DataError: names the field.
    """
    if config.run.method != "sft":
        _check_model(config, "discriminator.model", config.discriminator.model)
        if config.discriminator.model:
            _check_body(config.discriminator)
    check_embedding_model(config)


def check_embedding_model(config: Config) -> None:
    """The same of the model behind the embedding classifier."""
    if config.evaluation.embedding_model != "none":
        _check_model(config, "evaluation.embedding_model", config.evaluation.embedding_model)


def _check_model(config: Config, field: str, name: str) -> None:
    if name:
        try:
            load_tokenizer(config.policy.model_copy(update={"model": name}))
        except DataError as error:
            raise DataError(str(error).replace("policy.model", field)) from None


def _check_body(judge: DiscriminatorConfig) -> None:
    from transformers import AutoConfig  # seconds to import, and so is the model's module

    from discriminator.model import body_kind

    try:
        shape = AutoConfig.from_pretrained(
            judge.model,
            trust_remote_code=judge.trust_remote_code,
            local_files_only=not Path(judge.model).is_dir() and hub_problem(judge.model) is not None,
        )
        kind = body_kind(shape, judge.body)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"discriminator.model: {error}") from None
    if kind == "encoder" and judge.level == "token":
        raise DataError(
            f'discriminator.model = {judge.model!r} is bidirectional: discriminator.level = "token" would '
            'score prefixes that saw the future; choose a causal model or level = "sequence"'
        )


def check_data(config: Config, splits: DataSplits) -> None:
    """There is enough of everything.

    Raises:
        DataError: too few rows, with what to change.
    """
    _check_different_prompts([getattr(splits, name) for name in SPLITS])
    field = "learner.sft.batch_size" if config.run.method == "sft" else "discriminator.batch_size"
    batch = config.learner.sft.batch_size if config.run.method == "sft" else config.discriminator.batch_size
    require_at_least(splits.train, batch, "training demonstrations", f"give more or lower {field}")
    if config.data.preferences:
        require_at_least(splits.preferences, batch, "preference pairs", f"give more or lower {field}")
        require_at_least(
            splits.heldout_preferences,
            8,
            "held-out preference pairs",
            "give more pairs or raise data.heldout_fraction",
        )
    for name in ("heldout", "selection", "test"):
        require_at_least(
            getattr(splits, name),
            8,
            f"{name} split",
            f"give more demonstrations or raise data.{name}_fraction",
        )
    if config.run.method != "sft" and not config.discriminator.frozen:
        _check_demonstrated(config.run.prompts_per_step, splits.rollout_prompts())


def _check_different_prompts(splits: list[pa.Table]) -> None:
    """Splits are of prompts: a few prompts leave one empty, however many rows they have."""
    rows = pa.concat_tables([table.select(["prompt_id"]) for table in splits])
    prompts = pc.count_distinct(rows["prompt_id"]).as_py()
    if prompts < rows.num_rows and not all(table.num_rows for table in splits):
        raise DataError(
            f"data.demonstrations: {rows.num_rows} rows have {prompts} different prompt(s), and all rows of "
            "one are in one split; give the rows different prompts, as by the first words of each answer"
        )


def _check_demonstrated(per_step: int, prompts: pa.Table) -> None:
    """Each step has a prompt with a demonstration, as `PromptSource` lays them where two are to be expected:
    without one the discriminator would have nothing to learn from."""
    every, known = prompts.num_rows, pc.sum(prompts["demonstrated"]).as_py()
    if known < every and known * per_step < 2 * every:
        raise DataError(
            f"data.prompts: {known} of {every} training prompts have demonstrations, and the discriminator "
            f"learns from answers to these alone: fewer than 2 of run.prompts_per_step = {per_step} on "
            f"average; raise that to {-(-2 * every // known)}, or give no more than "
            f"{max(0, known * per_step // 2 - known)} prompts without a demonstration"
        )
