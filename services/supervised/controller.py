"""The baseline `sft`: learn → check, on the training split's human answers, until the held-out ones say stop.

The one configured exception to "no demonstration reaches the policy": whoever sets `run.method = "sft"` asks
for it. Invariants: what is trained is spelled and cut like what the evaluation's likelihood is measured on
(`services.answers`); which answers a step trains on depends on seed, step and answers alone, so a resumed run
repeats an unbroken one; a finished run holds the weights with the best likelihood of selection answers.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from learner.early_stopping import EarlyStopping
from services.answers import human_answers
from services.budget import Budget
from services.config import Config
from services.ledger import Ledger
from services.metrics import PhaseTimer, process_memory
from services.not_finite import NotFinite
from services.supervised.system import SupervisedSystem


def examples_of(step: int, total: int, batch: int, seed: int) -> NDArray[np.int64]:
    """Rows of step `step`: each of `total` rows once an epoch, in an order of its own, `batch` a step; a step
    that crosses the end of an epoch goes on with the next."""
    places = np.arange(step * batch, (step + 1) * batch)
    orders = {
        epoch: np.random.default_rng([seed, epoch]).permutation(total)
        for epoch in np.unique(places // total).tolist()
    }
    return np.array([orders[place // total][place % total] for place in places.tolist()], dtype=np.int64)


class SupervisedController:
    """One supervised run, with the words of `services.controller.Controller` that a run's life needs."""

    def __init__(
        self,
        config: Config,
        system: SupervisedSystem,
        observe: Callable[[int, dict[str, Any]], None],
        entered: Callable[[str], None],
    ) -> None:
        self.config = config
        self.settings = config.learner.sft
        self.system = system
        self.observe = observe
        self.ledger = Ledger()  # nothing is rolled out: it stays empty
        self.timer = PhaseTimer(entered=entered)
        self.budget = Budget()
        self.not_finite = NotFinite(config.folder, config.run.max_skipped)
        self.early = EarlyStopping(self.settings.patience)
        self.examples = human_answers(
            system.splits.train,
            system.renderer,
            config.sampling.max_tokens,
            config.discriminator.canonical,
        )
        self.step = 0
        self.running = False
        self.stopping = False

    async def run(self, every_step: Callable[[int], Any]) -> None:
        """Train until the patience or `run.steps` ends; `every_step(step)` is awaited after each. Its last
        call finds the best weights restored, and one that evaluates finds the workers in sync."""
        self.running = True
        if self.step == 0:
            await self.check()
        while not self.finished and not self.stopping:
            learned = await self.learn()
            self.step += 1
            checked = await self.check()
            if self.finished:
                await self.restore()
            self.report(learned, checked)
            if self.finished or self.step % self.config.evaluation.every == 0:
                await self.sync(self.step)
            await every_step(self.step)

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to train."""
        return self.step >= self.config.run.steps or self.early.exhausted

    async def learn(self) -> dict[str, Any]:
        """One supervised update; returns the learner's metrics."""
        rows = examples_of(self.step, self.examples.num_rows, self.settings.batch_size, self.config.run.seed)
        batch = self.examples.take(pa.array(rows))
        with self.timer("learn"):
            metrics = (await self.system.learn(batch))[0]
        bad = metrics.get("skipped", 0.0) > 0
        self.not_finite.saw("policy", self.step + 1, bad=bad, samples=batch, what=metrics)
        self.timer.tokens("learn", round(metrics["tokens_response"]))
        self.budget.learned(batch, trained=1)
        return metrics

    async def check(self) -> dict[str, float]:
        """Every `check_every` steps, and at the last: the likelihood of selection answers. The best weights
        so far are kept, the base's among them."""
        if self.step % self.settings.check_every and self.step < self.config.run.steps:
            return {}
        with self.timer("check"):
            nll = await self.system.human_nll(self.system.splits.selection, self.config.evaluation.prompts)
            if self.early.observe(self.step, -nll.per_token):
                await self.system.keep()
        return {
            "nll": nll.per_token,
            "best_nll": -self.early.best,
            "looks_without_improvement": self.early.looks,
        }

    async def restore(self) -> None:
        """Go back to the best weights."""
        with self.timer("restore"):
            await self.system.restore()

    async def sync(self, version: int) -> dict[str, float]:
        """Broadcast the weights; afterwards every worker serves `version`."""
        with self.timer("sync"):
            return await self.system.sync(version)

    async def quiesce(self) -> None:
        """Nothing runs beside the loop."""

    def report(self, learned: dict[str, Any], checked: dict[str, float]) -> None:
        """Hand this step's metrics to the observer."""
        self.observe(
            self.step,
            {
                "policy": learned,
                "selection": checked,
                "not_finite": dict(self.not_finite.counts),
                "epoch": self.step * self.settings.batch_size / self.examples.num_rows,
                "seconds": self.timer.take(),
                "memory_mib": {"controller": process_memory()["rss"], **self.system.resident},
            },
        )

    def facts(self) -> dict[str, Any]:
        """For the summary."""
        ended = "patience" if self.early.exhausted else "steps"
        return {
            "prompts_seen": self.step * self.settings.batch_size,
            "early_stopping": {
                "ended_by": ended,
                "restored_step": self.early.best_step,
                "selection_nll": -self.early.best,
            },
        }

    def state(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {
            "step": self.step,
            "early": self.early.state(),
            "timer": self.timer.state_dict(),
            "budget": self.budget.state(),
            "not_finite": dict(self.not_finite.counts),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.step = state["step"]
        self.early.load_state(state["early"])
        self.timer.load_state_dict(state["timer"])
        self.budget = Budget(**state["budget"])
        self.not_finite.counts.update(state["not_finite"])
