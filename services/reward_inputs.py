"""What a reward may need beside the discriminator's scores of the batch: the scores of the prompts' own
demonstrations (reward form `relativistic`) and the user's reward. Numbers only: no demonstration leaves.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from discriminator.config import DiscriminatorConfig
from discriminator.external_reward import call_user_reward, load_user_reward
from discriminator.rewards import demonstration_score

Score = Callable[[pa.Table, int], Awaitable[list[dict[str, Any]]]]


class RewardInputs:
    """Keyword arguments of `discriminator.rewards.stamp` for a batch; only those the configuration asks for.

    Args:
        config: form, level and the user's reward.
        demonstrations: canonical training demonstrations.
        score: scores a table of trajectories with one discriminator version.

    Raises:
        UserRewardError: the user's function cannot be loaded.
    """

    def __init__(self, config: DiscriminatorConfig, demonstrations: pa.Table, score: Score) -> None:
        self._config = config
        self._demonstrations = demonstrations
        self._score = score
        self._user_reward = load_user_reward(config.reward)

    async def __call__(self, batch: pa.Table, version: int) -> dict[str, list[float]]:
        """`references` and `user_rewards`, one number per row of `batch` each.

        Raises:
            KeyError: a prompt without a demonstration.
            UserRewardError: the user's reward failed or was late.
        """
        inputs: dict[str, list[float]] = {}
        if self._config.reward.form == "relativistic":
            inputs["references"] = await self._references(batch, version)
        if self._user_reward is not None:
            inputs["user_rewards"] = await asyncio.to_thread(
                call_user_reward,
                self._user_reward,
                batch["prompt_text"].to_pylist(),
                batch["response_text"].to_pylist(),
                [reason == "stop" for reason in batch["finish_reason"].to_pylist()],
                name=self._config.reward.user_reward,
                timeout_s=self._config.reward.user_timeout_s,
            )
        return inputs

    async def _references(self, batch: pa.Table, version: int) -> list[float]:
        """Per row the score of its prompt's demonstration under the same version; of several, their mean."""
        wanted = pc.is_in(self._demonstrations["prompt_id"], pc.unique(batch["prompt_id"]))
        rows = self._demonstrations.filter(wanted)
        scored = await self._score(rows.append_column("group_id", rows["prompt_id"]), version)
        by_prompt: dict[str, list[float]] = {}
        for prompt, item in zip(rows["prompt_id"].to_pylist(), scored, strict=True):
            by_prompt.setdefault(prompt, []).append(demonstration_score(item["scores"], self._config.level))
        return [float(np.mean(by_prompt[prompt])) for prompt in batch["prompt_id"].to_pylist()]
