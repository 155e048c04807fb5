"""The controller: generate → score → learn → sync, with the discriminator alongside.

Invariants: a batch trained at policy version v holds nothing sampled by a version before v - max_policy_lag
and no score older than max_disc_lag discriminator versions; a step's prompts are asked for only when that
will hold, so lag 0 is the synchronous case of the same loop. Each response is in exactly one place
(`services.ledger`).

The two clocks: policy version = learner steps done; discriminator version = discriminator turns done (a turn
that the health gate skips still counts, so the clocks stay comparable). The turn of step s yields version s +
1.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from discriminator.rewards import stamp
from rollout.trajectory import lag
from services.batch_metrics import response_metrics, reward_metrics
from services.budget import Budget, policy_passes, response_tokens
from services.config import Config
from services.ledger import Ledger
from services.metrics import PhaseTimer, process_memory
from services.not_finite import NotFinite, NotFiniteError, finite_rows
from services.system import System


class Controller:
    """One training run. `system` holds the processes, `observe` is told every step's metrics, `entered`
    each phase as it begins."""

    def __init__(
        self,
        config: Config,
        system: System,
        observe: Callable[[int, dict[str, Any]], None],
        entered: Callable[[str], None],
    ) -> None:
        self.config = config
        self.system = system
        self.observe = observe
        self.ledger = Ledger()
        self.timer = PhaseTimer(entered=entered)
        self.budget = Budget()
        self.not_finite = NotFinite(config.folder, config.run.max_skipped)
        self.step = 0
        self.running = False
        self.stopping = False
        self._alongside: asyncio.TaskGroup
        self._generating: dict[int, asyncio.Task[pa.Table]] = {}
        self._rates: dict[int, float] = {}
        """Response tokens per second of the generation that a step's batch came from."""
        self._cursors: dict[int, dict[str, Any]] = {}
        self._turns: deque[asyncio.Task[None]] = deque()
        self._untold: deque[dict[str, Any]] = deque()
        """Metrics of the finished turns that no step has reported yet."""
        self._policy_factor = 1.0
        """What the last finished turn lets the policy do."""

    async def run(self, every_step: Callable[[int], Any]) -> None:
        """Train to `run.steps`; `every_step(step)` is awaited after each (evaluation, checkpoints). What goes
        on alongside and fails ends the loop at once, whatever the loop waits for."""
        self.running = True
        try:
            async with asyncio.TaskGroup() as self._alongside:
                await self._loop(every_step)
        except* Exception as failed:
            raise failed.exceptions[0] from None

    async def _loop(self, every_step: Callable[[int], Any]) -> None:
        while not self.finished and not self.stopping:
            batch = await self.generate()
            scored = await self.score(batch)
            judged = self.discriminate(batch)
            learned = await self.learn(scored)
            synced = await self.sync(self.step + 1)
            self.report(batch, scored, judged, learned, synced)
            self.step += 1
            await every_step(self.step)
        await self.settle()

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to train."""
        return self.step >= self.config.run.steps

    async def generate(self) -> pa.Table:
        """This step's trajectories. Asks ahead for the steps whose samples may be that old."""
        last = min(self.step + self.config.run.max_policy_lag, self.config.run.steps - 1)
        for step in range(self.step, last + 1):
            if step not in self._generating:
                self._generating[step] = self._alongside.create_task(self._generate(step))
        with self.timer("generate"):
            batch = await self._generating.pop(self.step)
        self._cursors.pop(self.step)
        self.timer.tokens("generate", response_tokens(batch))
        self.budget.generated(batch)
        fit = self._drop(
            batch, pc.greater(lag(batch, self.step), self.config.run.max_policy_lag), "policy_lag"
        )
        if fit.num_rows == 0:
            raise RuntimeError(f"step {self.step + 1}: every group is older than run.max_policy_lag allows")
        finite = self._finite(fit, finite_rows(fit["response_logprobs"]), "logprobs")
        if finite.num_rows == 0:
            raise NotFiniteError(
                f"step {self.step + 1}: log-probabilities of every group are not finite: the sampler is "
                f"broken; the samples are in {self.not_finite.folder}"
            )
        return finite

    async def _generate(self, step: int) -> pa.Table:
        self._cursors[step] = self.system.prompts.state()
        requests = self.system.prompts.next(self.config.run.prompts_per_step, step)
        for group, n in zip(requests["group_id"].to_pylist(), requests["n"].to_pylist(), strict=True):
            self.ledger.submit(group, n)
        began = time.perf_counter()
        try:
            batch = await self.system.generate(requests, min_version=step - self.config.run.max_policy_lag)
        except BaseException:
            for group in requests["group_id"].to_pylist():
                self.ledger.fail(group, "generation failed")
            raise
        self._rates[step] = response_tokens(batch) / (time.perf_counter() - began)
        return batch

    async def score(self, batch: pa.Table) -> pa.Table:
        """The batch with reward columns; all responses of a group are judged by one version, none staler than
        allowed.
        """
        if self.step - self.system.disc_version > self.config.run.max_disc_lag:
            with self.timer("wait for discriminator"):
                while self.step - self.system.disc_version > self.config.run.max_disc_lag:
                    await self._turns.popleft()
        version = self.system.disc_version
        with self.timer("score"):
            answers = await self.system.score(batch, version)
            inputs = await self.system.reward_inputs(batch, version)
        finite = np.array([np.isfinite(item["scores"]).all() for item in answers], dtype=bool)
        for numbers in inputs.values():
            finite &= np.isfinite(numbers)
        fit = self._finite(batch, pa.array(finite), "scores")
        kept = np.flatnonzero(pc.is_in(batch["group_id"], pc.unique(fit["group_id"])).to_numpy())
        scores, spans = [answers[row]["scores"] for row in kept], [answers[row]["spans"] for row in kept]
        given = {name: [numbers[row] for row in kept] for name, numbers in inputs.items()}
        settings = self.config.discriminator
        return stamp(fit, version, scores, spans, level=settings.level, config=settings.reward, **given)

    async def learn(self, scored: pa.Table) -> dict[str, Any]:
        """One policy update, slower or none where the health gate says so; returns the learner's metrics. An
        update that was not finite has trained nothing: its groups count as dropped. Without a group that has
        finite scores there is none.
        """
        metrics: dict[str, Any] = {"skipped": 1.0}
        if scored.num_rows:
            with self.timer("learn"):
                metrics = (await self.system.learn(scored, self.step, self._policy_factor))[0]
        skipped = metrics.get("skipped", 0.0)
        self.not_finite.saw("policy", self.step + 1, bad=skipped > 0, samples=scored, what=metrics)
        for group in pc.unique(scored["group_id"]).to_pylist():
            self.ledger.train(group) if skipped < 1 else self.ledger.drop(group, "not_finite")
        self.timer.tokens("learn", response_tokens(scored))
        self.budget.learned(scored, *policy_passes(self.config.learner))
        self.budget.drawn(metrics)
        return metrics

    async def sync(self, version: int) -> dict[str, float]:
        """Broadcast the new weights; afterwards every worker serves `version`."""
        with self.timer("sync"):
            return await self.system.sync(version)

    def discriminate(self, batch: pa.Table) -> dict[str, Any]:
        """Queue this step's discriminator turn; turns run one after another while the policy goes on. Returns
        the metrics of the first finished one that no step has reported, empty where there is none."""
        earlier = self._turns[-1] if self._turns else None
        self._turns.append(self._alongside.create_task(self._discriminate(batch, self.step, earlier)))
        return self._untold.popleft() if self._untold else {}

    async def _discriminate(self, batch: pa.Table, step: int, earlier: "asyncio.Task[None] | None") -> None:
        if earlier is not None:
            await earlier
        with self.timer("discriminate"):
            metrics = await self.system.discriminate(batch, step)
        bad = metrics.get("skipped", 0.0) > 0
        self.not_finite.saw("discriminator", step + 1, bad=bad, samples=batch, what=metrics)
        self._untold.append(metrics)
        self._policy_factor = metrics.get("policy_factor", 1.0)
        self.budget.discriminated(metrics)

    async def quiesce(self) -> None:
        """Wait for the discriminator's turns, so that a checkpoint holds one consistent state."""
        while self._turns:
            await self._turns.popleft()

    async def settle(self) -> None:
        """Nothing in the air: the discriminator's turn is done, generation asked for ahead is given up and
        counted.
        """
        await self.quiesce()
        cursor = self._cursors[min(self._cursors)] if self._cursors else None
        for step, task in sorted(self._generating.items()):
            batch = await task
            for group in pc.unique(batch["group_id"]).to_pylist():
                self.ledger.drop(group, "run ended")
            del self._generating[step], self._cursors[step], self._rates[step]
        if cursor is not None:
            self.system.prompts.load_state(cursor)  # a resumed run asks for these prompts again

    def _finite(self, batch: pa.Table, finite: pa.Array, what: str) -> pa.Table:
        """The groups of which every row is finite; the others count as dropped and their samples are kept."""
        fit = self._drop(batch, pc.invert(finite), f"{what}_not_finite")
        bad = batch.filter(pc.invert(finite))
        if bad.num_rows:
            self.not_finite.keep(what, self.step + 1, bad.num_rows, bad, {"responses": bad.num_rows})
        return fit

    def _drop(self, batch: pa.Table, unfit: pa.Array, reason: str) -> pa.Table:
        """Leave out whole groups in which any row is unfit, and count them."""
        groups = pc.unique(batch["group_id"].filter(unfit)).to_pylist() if pc.any(unfit).as_py() else []
        for group in groups:
            self.ledger.drop(group, reason)
        return (
            batch.filter(pc.invert(pc.is_in(batch["group_id"], pa.array(groups, pa.string()))))
            if groups
            else batch
        )

    def report(
        self,
        batch: pa.Table,
        scored: pa.Table,
        judged: dict[str, Any],
        learned: dict[str, Any],
        synced: dict[str, float],
    ) -> None:
        """Hand this step's metrics to the observer."""
        self.observe(
            self.step + 1,
            {
                "reward": reward_metrics(
                    scored, self.config.gamma, absorbing_end=self.config.learner.absorbing_end
                )
                if scored.num_rows
                else {},
                "response": response_metrics(batch),
                "policy": learned,
                "discriminator": judged,
                "sync": synced,
                "lag": {
                    "policy": lag(batch, self.step).to_pylist(),
                    "disc": (self.step - scored["disc_version"].to_numpy()).tolist(),
                },
                "responses": self.ledger.check(),
                "not_finite": dict(self.not_finite.counts),
                "rollout": {
                    "tokens_per_s": self._rates.pop(self.step),
                    "replacements": self.system.replacements,
                    "sync_failures": self.system.sync_failures,
                },
                "seconds": self.timer.take(),
                "memory_mib": {"controller": process_memory()["rss"], **self.system.resident},
            },
        )

    def facts(self) -> dict[str, Any]:
        """For the summary."""
        return {"prompts_seen": self.step * self.config.run.prompts_per_step}

    def state(self) -> dict[str, Any]:
        """For the checkpoint. Prompts asked for ahead are asked for again: the cursor is the oldest one in
        use.
        """
        oldest = self._cursors[min(self._cursors)] if self._cursors else self.system.prompts.state()
        return {
            "step": self.step,
            "prompts": oldest,
            "ledger": self.ledger.state(),
            "timer": self.timer.state_dict(),
            "budget": self.budget.state(),
            "untold_turns": list(self._untold),
            "policy_factor": self._policy_factor,
            "not_finite": dict(self.not_finite.counts),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.step = state["step"]
        self.system.prompts.load_state(state["prompts"])
        self.ledger = Ledger(**state["ledger"])
        self.timer.load_state_dict(state["timer"])
        self.budget = Budget(**state["budget"])
        self._untold = deque(state["untold_turns"])
        self._policy_factor = state["policy_factor"]
        self.not_finite.counts.update(state["not_finite"])
