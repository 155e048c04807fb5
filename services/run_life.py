"""The life of one run around the controller's loop: start, train, evaluate, save, report; every way out ends
the processes.
"""

import asyncio
import signal
import time
import traceback
from typing import TYPE_CHECKING, Any

from rich.console import Console

from rollout.data import DataSplits
from rollout.templates import Renderer
from services.checkpoint import Checkpoints, verify
from services.config import Config
from services.config_text import to_toml
from services.lease import Lease
from services.methods import method_title
from services.metrics import MetricsLog, flatten, process_memory, read_metrics
from services.mirror import Mirror
from services.not_finite import NotFiniteError
from services.plan import ResourcePlan
from services.ray_metrics import RunMetrics
from services.run_folder import BEGIN_ANEW
from services.wandb_run import WandbRun
from services.watching.alarms import AlarmBounds, Alarms

if TYPE_CHECKING:
    from services.controller import Controller
    from services.supervised.controller import SupervisedController
    from services.supervised.system import SupervisedSystem
    from services.system import System
    from services.watching.watch import Watch

INTERRUPTED = 130
FAILED = 1


class RunLife:
    """One run, from the first process to the report."""

    def __init__(
        self,
        config: Config,
        plan: ResourcePlan,
        splits: DataSplits,
        renderer: Renderer,
        checkpoints: Checkpoints,
        resume: bool,
        console: Console,
        tracker: WandbRun | None,
        lease: Lease,
    ) -> None:
        from services.display import Display
        from services.evaluator import Evaluator

        self.config = config
        self.resume = resume
        self.console = console
        self.checkpoints = checkpoints
        self.lease = lease
        self.mirror = Mirror(config.folder, config.run.mirror) if config.run.mirror else None
        self.began = time.monotonic()
        self.earlier_seconds = 0.0
        self.rows: list[dict[str, Any]] = []
        self.row: dict[str, Any] = {}
        """Metrics of the step that was just made; written once its evaluation, where one is due, is known."""
        self.interrupted = False
        self.rollbacks = 0
        self.warm: dict[str, Any] = {}
        """Evaluation of the discriminator at the end of its warm-up; empty where there is none."""
        start = checkpoints.steps()[-1] if resume else 0
        config.folder.mkdir(parents=True, exist_ok=True)
        (config.folder / "config.toml").write_text(to_toml(config))
        self.display = Display(config.run.steps, start, console)
        self.log = MetricsLog(config.folder)
        self.alarms = Alarms(AlarmBounds(logprob_mismatch=config.rollout.logprob_alarm))
        self.exported = RunMetrics(config)
        self.tracker = tracker
        self.system, self.controller, self.watch = self._parts(plan, splits, renderer, start)
        self.evaluator = Evaluator(config, self.system, self.display.note)

    def _parts(
        self, plan: ResourcePlan, splits: DataSplits, renderer: Renderer, start: int
    ) -> "tuple[System | SupervisedSystem, Controller | SupervisedController, Watch]":
        """Processes, loop and watch of the run's method."""
        from services.controller import Controller
        from services.supervised.controller import SupervisedController
        from services.supervised.system import SupervisedSystem, SupervisedWatch
        from services.system import System
        from services.watching.watch import Watch

        if self.config.run.method == "sft":
            trained = SupervisedSystem(self.config, plan, splits, renderer, start)
            supervised = SupervisedController(self.config, trained, self.observe, self.display.phase)
            return trained, supervised, SupervisedWatch(self.config, trained)
        system = System(self.config, plan, splits, renderer, start)
        controller = Controller(self.config, system, self.observe, self.display.phase)
        return system, controller, Watch(self.config, system)

    async def main(self) -> int:
        """Start, train, report; every way out ends the processes."""
        from services.watching.auditor import ShortcutRefusal

        loop = asyncio.get_running_loop()
        work = asyncio.ensure_future(self._work())
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._interrupt, work, number)
        try:
            return await work
        except asyncio.CancelledError:
            self.console.print("stopped; the last finished checkpoint stays")
            await self.system.abort()
            return INTERRUPTED
        except ShortcutRefusal as refusal:
            self.console.print(str(refusal), markup=False)
            await self.system.abort()
            return FAILED
        except NotFiniteError as error:
            self.console.print(str(error), markup=False)
            self.console.print(self._way_on("the run ended"))
            await self.system.abort()
            return FAILED
        except Exception:  # the top of the program: the whole traceback, then an orderly end and exit code 1
            traceback.print_exc()
            self.console.print(self._way_on("the run failed"))
            await self.system.abort()
            return FAILED
        finally:
            self.exported.close()
            self.log.close()

    def _way_on(self, what: str) -> str:
        steps = self.checkpoints.steps()
        if steps:
            return f"{what}; --resume goes on from step {steps[-1]}"
        return f"{what} before a checkpoint; {BEGIN_ANEW}"

    def _interrupt(self, work: "asyncio.Future[int]", number: int) -> None:
        again, self.interrupted = self.interrupted, True
        if again and number == signal.SIGTERM:
            return  # a stopped job on a pod that ends gets it twice, from Ray and from the pod's hook
        if self.controller.stopping or not self.controller.running:
            work.cancel()
            return
        self.controller.stopping = True
        self.display.note("stopping after this step with a checkpoint; once more to stop at once")

    async def _work(self) -> int:
        with self.display:
            self.exported.begin()
            await self.system.start(self.display.note)
            self.watching = asyncio.create_task(self.exported.watch_workers(lambda: self.system.fleet.actors))
            if self.resume:
                await self._load()
            else:
                await self._begin()
            self.display.training()
            await self.controller.run(self._after_step)
            if self.controller.step not in self.checkpoints.steps():
                await self._save()
            self.controller.running = False  # a resume repeats what follows: a signal ends it at once
            if self.controller.stopping or not self.controller.finished:
                await self.system.stop()
                self.display.note(f"stopped at step {self.controller.step}; go on with --resume")
                return INTERRUPTED
            evaluation = await self.evaluator.finish(self.controller.step)
            await self._export_discriminator()
            memory = await self.system.memory()
            await self.system.stop()
        self._report(evaluation, memory)
        if await self._copy():
            return 0
        self.console.print(f"the run is whole in {self.config.folder}, its copy is not")
        return FAILED

    async def _begin(self) -> None:
        await self.watch.begin(self.display.note)
        self.display.note("evaluating the base model")
        await self._evaluate(0)
        self._record(0)
        if self.config.run.method != "sft":
            await self._warm_up()

    async def _warm_up(self) -> None:
        from services.system import System

        assert isinstance(self.system, System), "sft has no discriminator"
        with self.controller.timer("warm-up"):
            self.warm = await self.system.warm_up(self.display.note)
        self.controller.budget.rollout_tokens += self.warm["rollout_tokens"]
        self.controller.budget.discriminated(self.warm)
        what = (
            "reward model trained and frozen"
            if self.config.discriminator.frozen
            else "discriminator warmed up"
        )
        self.display.note(
            f"{what}: {self.warm['steps']:.0f} steps, held-out accuracy {self.warm['accuracy']:.3f}"
        )

    async def _export_discriminator(self) -> None:
        from services.system import System

        if isinstance(self.system, System):
            await self.system.export_discriminator(self.config.folder / "discriminator")

    async def _after_step(self, step: int) -> None:
        run, evaluation = self.config.run, self.config.evaluation
        if step % evaluation.every == 0 or self.controller.finished:
            await self._evaluate(step)
        elif evaluation.look_every and step % evaluation.look_every == 0:
            with self.controller.timer("look"):
                self.row["monitor"] = await self.evaluator.look()
        self._record(step)
        await self._check_finite()
        due = run.checkpoint_every and step % run.checkpoint_every == 0
        if due and not self.controller.not_finite.active:
            await self._save()

    async def _check_finite(self) -> None:
        """Go back to the last checkpoint's weights at the limit of steps left out, where the run may."""
        account = self.controller.not_finite
        try:
            account.check()
        except NotFiniteError as error:
            newest = self.checkpoints.newest()
            if self.rollbacks >= self.config.run.rollbacks or newest is None:
                raise
            self.rollbacks += 1
            self.display.note(f"{error}; going back to the weights of {newest.name}")
            await self.controller.quiesce()
            await asyncio.to_thread(verify, newest)
            await self.system.reload(newest)
            account.in_a_row.clear()

    async def _evaluate(self, step: int) -> None:
        with self.controller.timer("evaluate"):
            measured, samples = await self.evaluator.selection(step)
        interval = f"[{measured['c2st_low']:.3f}, {measured['c2st_high']:.3f}]"
        self.display.note(
            f"step {step}: C2ST {measured['c2st']:.3f} {interval}"
            f"  NLL {measured['nll']:.3f}  distinct-2 {measured['distinct_2']:.3f}"
            f"  coverage {measured['coverage']:.3f}"
        )
        for sample in samples:
            self.display.note(
                f"    {sample['prompt']!r}  human: {sample['human']!r}  model: {sample['model']!r}"
            )
        await self.controller.quiesce()  # or timing would decide which discriminator judges the probes
        with self.controller.timer("evaluate"):
            watched = await self.watch.evaluated(step, self.evaluator)
        known = {name: value for name, value in measured.items() if value is not None}
        self.row |= {"evaluation": known, **watched}
        measured.update(flatten(watched))

    @property
    def elapsed(self) -> float:
        """Seconds of this run, those before it was resumed included, the time between them not."""
        return self.earlier_seconds + time.monotonic() - self.began

    def observe(self, step: int, values: dict[str, Any]) -> None:
        """Take the metrics of the step that was just made."""
        self.row = {"time": time.time(), "wall_seconds": self.elapsed, **values}

    def _record(self, step: int) -> None:
        """Write the step's row, raise alarms, show progress. Step 0 is the base's evaluation."""
        self.lease.check()
        row, self.row = self.log.log(step, {"wall_seconds": self.elapsed, **self.row}), {}
        self.exported.step(row, self.rows[-1] if self.rows else None)
        if self.tracker is not None:
            self.tracker.step(row)
        self.rows.append(row)
        if "selection/nll" in row:
            self.display.note(
                f"step {step}: NLL of selection answers {row['selection/nll']:.3f}, "
                f"best {row['selection/best_nll']:.3f}"
            )
        if "discriminator/transition" in row:
            self.display.note(f"health: {row['discriminator/transition']}")
        self._raise_alarms()
        if step > 0:
            self.display.step(step, row)

    def _raise_alarms(self) -> None:
        raised = self.alarms.check(self.rows)
        for alarm in raised:
            self.display.note(f"alarm: {alarm.name}: {alarm.message}")
        self.exported.alarms(raised, self.alarms.state_dict()["active"])
        if self.tracker is not None:
            self.tracker.alarms(raised)

    async def _save(self) -> None:
        self.lease.check()
        with self.controller.timer("checkpoint"):
            await self.controller.quiesce()
            step = self.controller.step
            folder = self.checkpoints.begin(step)
            system = await self.system.save(folder)
            state = {
                "system": system,
                "controller": self.controller.state(),
                "evaluator": self.evaluator.state(),
                "alarms": self.alarms.state_dict(),
                "watch": self.watch.state(),
                "warm": self.warm,
                "seconds": self.elapsed,
            }
            await asyncio.to_thread(self.checkpoints.commit, step, state)
        await self._copy()

    async def _copy(self) -> bool:
        """Bring the run's copy up to date; False when that failed, which is said."""
        if self.mirror is None:
            return True
        with self.controller.timer("mirror"):
            try:
                await asyncio.wait_for(asyncio.to_thread(self.mirror.push), self.config.run.mirror_timeout_s)
            except OSError as error:  # TimeoutError is one too
                reason = str(error) or f"not done within {self.config.run.mirror_timeout_s:g} s"
                self.display.note(f"run.mirror: the copy to {self.config.run.mirror} failed: {reason}")
                return False
        return True

    async def _load(self) -> None:
        folder = self.checkpoints.newest()
        assert folder is not None, "checked before"
        self.display.note(f"resuming from {folder.name}")
        state = await asyncio.to_thread(verify, folder)
        await self.system.load(folder, state["system"])
        self.controller.load_state(state["controller"])
        self.evaluator.load_state(state["evaluator"])
        self.alarms.load_state_dict(state["alarms"])
        self.watch.load_state(state["watch"])
        self.warm = state["warm"]
        self.earlier_seconds = state["seconds"]
        self.log.truncate_after(self.controller.step)
        self.rows = read_metrics(self.log.path)

    def _report(self, evaluation: dict[str, dict[str, Any]], memory: dict[str, float]) -> None:
        from services.report import print_report, write_report, write_summary

        self.lease.check()
        config, folder = self.config, self.config.folder
        wall = self.elapsed
        phases = self.controller.timer.totals()
        samples = self.evaluator.samples(config.evaluation.shown_samples)
        budget: dict[str, Any] = self.controller.budget.state()
        budget |= {"wall_seconds": wall, "seconds": {name: item["seconds"] for name, item in phases.items()}}
        facts = {
            "method": method_title(config),
            "steps": self.controller.step,
            "best_step": self.evaluator.best_step,
            "wall_seconds": wall,
            "responses": self.controller.ledger.check(),
            **self.controller.facts(),
            "not_finite": dict(self.controller.not_finite.counts),
            "budget": budget,
            "warm_up": self.warm,
            "demonstrations": self.system.splits.train.num_rows,
            "memory_mib": {"controller": process_memory()["rss"], **memory},
            "learning_curve": [{"step": step, **row} for step, row in self.evaluator.curve],
        }
        write_report(
            folder,
            f"rlgaf run {config.run.name}",
            evaluation,
            phases,
            self.alarms.raised,
            self.evaluator.curve,
            samples,
            wall,
            method=method_title(config),
            budget=self.controller.budget.state(),
        )
        if self.tracker is not None:
            self.tracker.closing(evaluation)
        # Last: a run that has it is whole, and is not resumed.
        write_summary(folder, evaluation, phases, self.alarms.raised, facts)
        print_report(self.console, evaluation, phases, self.alarms.raised, samples, wall)
        self.console.print(
            f"everything is in {folder}: report.md, summary.json, metrics.jsonl, samples/, best/, last/"
        )
