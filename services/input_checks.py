"""What is checked of a run's functions and data before anything is started."""

import pyarrow as pa
import pyarrow.compute as pc

from discriminator.external_reward import UserRewardError, load_user_reward
from rollout.data import SPLITS, DataError, DataSplits, require_at_least
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
