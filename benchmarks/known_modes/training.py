"""One run: warm up, train, evaluate, measure. The loops are `services.controller` and
`services.supervised.controller`, the watch and the alarms those of `rlgaf train`; only processes, checkpoints
and files are missing.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from benchmarks.known_modes.artefacts import Plant
from benchmarks.known_modes.judging import Judge, discriminator_accuracy
from benchmarks.known_modes.modes import ModeWindow, known_mode_monitors
from benchmarks.known_modes.systems import OneProcessSupervised, OneProcessSystem, check
from benchmarks.known_modes.unguarded import UnguardedSystem
from benchmarks.recorded import recorded
from examples.known_modes.language import Distribution
from rollout.data import load_data
from rollout.templates import Renderer, load_tokenizer
from services.answers import first_prompts
from services.config import Config
from services.controller import Controller
from services.metrics import expand_lists, flatten
from services.supervised.controller import SupervisedController
from services.supervised.system import SupervisedWatch
from services.watching.alarms import Alarm, AlarmBounds, Alarms
from services.watching.watch import Watch

Row = dict[str, Any]

EVERY = 5
"""Steps between two recorded ones."""


@dataclass
class Outcome:
    """What a run leaves. Alarms are the system's; `known_alarms` those of the same check with the known modes
    in place of clusters.
    """

    curve: list[Row] = field(default_factory=list)
    steps: list[Row] = field(default_factory=list)
    test: dict[str, Row] = field(default_factory=dict)
    best_step: int = 0
    last_step: int = 0
    selection: float = float("-inf")
    """The best `selection_key`."""
    warm_up: Row = field(default_factory=dict)
    alarms: list[Alarm] = field(default_factory=list)
    known_alarms: list[Alarm] = field(default_factory=list)
    tokens: dict[str, int] = field(default_factory=dict)
    phases: dict[str, float] = field(default_factory=dict)
    discriminator_accuracy: float | None = None


class Run:
    """One run of a configuration.

        outcome = Run(config, EXPERT).train(closing=True)

    Args:
        config: a run's, with lags of zero and one rank.
        target: the distribution that the policy is judged against.
        say: told one line an evaluation.
        plant: artefact planted in the demonstrations, to be counted.
        guard: off, the discriminator reads both sides as they came.

    Raises:
        ConfigError: the configuration asks for what one process cannot do.
    """

    def __init__(
        self,
        config: Config,
        target: Distribution,
        say: Callable[[str], None] = lambda line: None,
        *,
        plant: Plant | None = None,
        guard: bool = True,
    ) -> None:
        check(config)
        self.config = config
        self.say = say
        self.outcome = Outcome()
        self.rows: list[Row] = []
        self.row: Row = {}
        self.window = ModeWindow(target)
        self.alarms = Alarms(AlarmBounds(logprob_mismatch=config.rollout.logprob_alarm))
        self.known_alarms = Alarms()
        self._known: list[Row] = []
        renderer = Renderer(load_tokenizer(config.policy), config.data, config.policy)
        splits = load_data(config.data, renderer)
        self.system: Any
        self.controller: Any
        self.watch: Watch
        if config.run.method == "sft":
            self.system = OneProcessSupervised(config, splits, renderer)
            self.controller = SupervisedController(config, self.system, self.observe, lambda phase: None)
            self.watch = SupervisedWatch(config, self.system)
        else:
            if guard or plant is None:
                self.system = OneProcessSystem(config, splits, renderer)
            else:
                self.system = UnguardedSystem(config, splits, renderer, plant)
            self.controller = Controller(config, self.system, self.observe, lambda phase: None)
            self.watch = Watch(config, self.system)
        self.judge = Judge(config, self.system, self.say)
        self.judge.plant = plant

    def train(self, *, closing: bool = True) -> Outcome:
        """Train to the end; with `closing` best and last are measured on test prompts.

        Raises:
            FloatingPointError: a gradient is not finite.
        """
        asyncio.run(self._train(closing))
        return self.outcome

    def reference(self, fresh: list[str], nll: float) -> dict[str, Row]:
        """Rows on test prompts without training: `base`, and `human`, the texts `fresh` in the policy's
        place, whose writer needs `nll` nats per token for the test demonstrations.
        """

        async def rows() -> dict[str, Row]:
            return {"base": await self.judge.test_row(0), "human": await self.judge.real_row(fresh, nll)}

        return asyncio.run(rows())

    async def _train(self, closing: bool) -> None:
        outcome, controller = self.outcome, self.controller
        await self.watch.begin(self.say)
        await self._evaluate(0)
        self._record(0)
        if self.config.run.method != "sft":
            with controller.timer("warm-up"):
                outcome.warm_up = await self.system.warm_up(self.say)
            controller.budget.rollout_tokens += outcome.warm_up["rollout_tokens"]
            controller.budget.discriminated(outcome.warm_up)
        await controller.run(self._after_step)
        outcome.last_step = controller.step
        outcome.best_step, outcome.selection = self.judge.best_step, self.judge.best_key
        if closing:
            with controller.timer("close"):
                await self._close()
        outcome.tokens = controller.budget.state()
        outcome.phases = {name: total["seconds"] for name, total in controller.timer.totals().items()}
        outcome.alarms, outcome.known_alarms = self.alarms.raised, self.known_alarms.raised

    async def _close(self) -> None:
        outcome, judge = self.outcome, self.judge
        outcome.test["last"] = await judge.test_row(outcome.last_step)
        if self.config.run.method != "sft":
            outcome.discriminator_accuracy = discriminator_accuracy(self.system, judge.test_responses)
        if outcome.best_step == outcome.last_step:
            outcome.test["best"] = outcome.test["last"]
            return
        self.system.put_weights(judge.best_weights)
        outcome.test["best"] = await judge.test_row(outcome.best_step)

    async def _after_step(self, step: int) -> None:
        evaluation = self.config.evaluation
        if step % evaluation.every == 0 or self.controller.finished:
            await self._evaluate(step)
        elif evaluation.look_every and step % evaluation.look_every == 0:
            self.row["monitor"] = await self.judge.look()
        self._record(step)

    async def _evaluate(self, step: int) -> None:
        with self.controller.timer("evaluate"):
            row, _ = await self.judge.selection(step)
            watched = await self.watch.evaluated(step, self.judge)
        self.row |= {"evaluation": dict(row), **watched}
        human = first_prompts(self.system.splits.selection, self.config.evaluation.prompts)
        known = known_mode_monitors(
            human["response"].to_pylist(), self.judge.responses["response_text"].to_pylist()
        )
        self._known.append({"step": step, **flatten({"monitor": known})})
        self.known_alarms.check(self._known)
        self.outcome.curve.append({"step": step, **row, **flatten(watched), **flatten({"known": known})})
        shown = ("c2st", "coverage", "mode_tv", "modes_kept", "nll_gap", "valid")
        self.say(f"step {step}: " + "  ".join(f"{name} {row[name]:.3f}" for name in shown if name in row))

    def observe(self, step: int, values: dict[str, Any]) -> None:
        """Take the metrics of the step that was just made."""
        self.row = values

    def _record(self, step: int) -> None:
        """Keep the step's metrics, raise alarms, record every fifth."""
        row: Row = {"step": step, "time": time.time(), **expand_lists(flatten(self.row))}
        self.row = {}
        self.rows.append(row)
        self.alarms.check(self.rows)
        kept = recorded(row)
        if self.system.last_batch is not None:
            self.window.add(self.system.last_batch["response_text"].to_pylist())
            kept |= self.window.numbers()
        if (step and step % EVERY == 0) or step in (1, self.config.run.steps):
            self.outcome.steps.append({"step": step, **kept})
