"""The processes of a supervised run: learner and, for its evaluations, rollout workers. No discriminator,
replay buffer or scoring service is started.
"""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray

from services.config import Config
from services.policy_side import PolicySide
from services.saving import all_written
from services.watching.watch import Watch

POLICY_GRADIENT_OFF: dict[str, Any] = {
    "kl_coef": 0.0, "kl_target": None, "advantage": "return", "baseline": "batch"
}  # fmt: skip
"""Settings under which the learner loads neither reference nor critic."""


class SupervisedSystem(PolicySide):
    """Behind the words of `services.supervised.controller.SupervisedController` and of the evaluator."""

    async def start(self, say: Callable[[str], None]) -> None:
        """Bring everything up; `say` is told what is being waited for."""
        say(f"starting {self.config.rollout.workers} rollout worker(s) for evaluations and the learner")
        await asyncio.gather(*self._start_policy(say))
        await self._meet()

    def _learner_config(self) -> dict[str, Any]:
        given = super()._learner_config()
        alone = POLICY_GRADIENT_OFF | {
            "schedule_steps": self.config.learner.schedule_steps or self.config.run.steps,
            "gumbel": type(self.config.learner.gumbel)(),
        }
        return given | {"learner": given["learner"].model_copy(update=alone)}

    async def learn(self, examples: pa.Table) -> list[dict[str, Any]]:
        """One supervised update on examples; metrics by rank."""
        timeout = self.config.learner.step_timeout_s
        return await self.learner.call("supervised_step", timeout_s=timeout, table=ray.put(examples))

    async def keep(self) -> None:
        """Remember the present weights."""
        await self.learner.call("keep", timeout_s=self.config.learner.step_timeout_s)

    async def restore(self) -> None:
        """Go back to the weights remembered last."""
        await self.learner.call("restore", timeout_s=self.config.learner.step_timeout_s)

    async def save(self, folder: Path) -> dict[str, Any]:
        """Write the learner's state into `folder`; returns what belongs into the checkpoint's own state."""
        timeout = self.config.learner.step_timeout_s
        await all_written(self.learner.call("save", timeout_s=timeout, folder=str(folder / "learner")))
        return {"policy_version": self.policy_version}

    async def load(self, folder: Path, state: dict[str, Any]) -> None:
        """Continue from `save`: the learner's weights go out to the workers."""
        timeout = self.config.learner.step_timeout_s
        self.policy_version = state["policy_version"]
        await self.learner.call("load", timeout_s=timeout, folder=str(folder / "learner"))
        await self.sync(self.policy_version)


class SupervisedWatch(Watch):
    """The monitors and audits of a supervised run's evaluations. Nothing can be refused for a shortcut, since
    no discriminator could take one, and there are no versions that could go in circles."""

    def __init__(self, config: Config, system: SupervisedSystem) -> None:
        # Nothing of a discriminator's is read but by the methods overridden here, and the audit reads as the
        # policy does.
        judge = config.discriminator.model_copy(update={"model": "", "body": "auto"})
        super().__init__(config.model_copy(update={"discriminator": judge}), system)  # type: ignore[arg-type]

    async def begin(self, say: Callable[[str], None]) -> None:
        """No audit before training."""

    async def evaluated(self, step: int, evaluator: Any) -> dict[str, Any]:
        """Monitors and audit of the evaluation just made."""
        return {"monitor": dict(evaluator.monitors), **await self._audit(step, evaluator)}
