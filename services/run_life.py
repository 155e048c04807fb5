"""The life of one run around the controller's loop: start, train, evaluate, save, report; every way out ends
the processes.
"""

import asyncio
import signal
import sys
import time
import traceback
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from rollout.credentials import redacted
from rollout.data import DataSplits
from rollout.files import write_whole
from rollout.printable import printable
from rollout.templates import Renderer
from services.checkpoint import CONFIG, CheckpointError, Found
from services.config import Config
from services.config_text import to_toml
from services.ending import FAILED, STILL_S, Deadman, first_end, handle_signals
from services.lease import Lease
from services.liveness import DeadProcess, LifeSigns
from services.methods import method_title
from services.metrics import MetricsLog, flatten, process_memory, read_metrics
from services.mirror import Mirror
from services.not_finite import NotFiniteError
from services.plan import ResourcePlan
from services.ray_metrics import RunMetrics
from services.resume_rules import settled
from services.run_folder import BEGIN_ANEW, checkpoints_of, data_digests
from services.saving import Saver
from services.waiting import DaemonThreads
from services.wandb_run import WandbRun
from services.watching.alarms import AlarmBounds, Alarms

INTERRUPTED = 130


class RunLife:
    """One run, from the first process to the report."""

    def __init__(
        self,
        config: Config,
        plan: ResourcePlan,
        splits: DataSplits,
        renderer: Renderer,
        found: Found | None,
        console: Console,
        tracker: WandbRun | None,
        lease: Lease,
    ) -> None:
        from services.display import Display
        from services.evaluator import Evaluator
        from services.parts import parts

        self.config = config
        self.found = found
        """The checkpoint that the run goes on from; None for one that begins."""
        self.console = console
        self.checkpoints = checkpoints_of(config)
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
        start = found.step if found is not None else 0
        if found is None:
            self._write_config()
        self.display = Display(config.run.steps, start, console)
        self.data_digests = data_digests(splits)
        self.saver = Saver(self.checkpoints, config.run.checkpoint_every, self.display.note)
        self.log = MetricsLog(config.folder)
        self.alarms = Alarms(AlarmBounds(logprob_mismatch=config.rollout.logprob_alarm))
        self.exported = RunMetrics(config)
        self.tracker = tracker
        made = parts(config, plan, splits, renderer, start, self.observe, self.display.phase)
        self.system, self.controller, self.watch = made
        self.signs = LifeSigns(self.system.actors, self.system.groups, self.display.note, config.folder)
        self.evaluator = Evaluator(config, self.system, self.display.note)

    async def main(self) -> int:
        """Start, train, report; every way out ends the processes, and none waits for what hangs."""
        from services.sampler_check import SamplerError
        from services.watching.auditor import ShortcutRefusal

        asyncio.get_running_loop().set_default_executor(DaemonThreads())
        work = asyncio.ensure_future(self._work())
        deadman = Deadman(max(STILL_S, self.config.learner.step_timeout_s), self.display.note)
        handle_signals(partial(self._interrupt, work))
        try:
            return await first_end(work, asyncio.ensure_future(self.signs.watch(deadman.beat)))
        except asyncio.CancelledError:
            self.console.print("stopped; the last finished checkpoint stays")
            await self._abort()
            return INTERRUPTED
        except (ShortcutRefusal, SamplerError, CheckpointError, NotFiniteError) as refusal:
            self.console.print(str(refusal), markup=False)
            if self.checkpoints.steps():
                self.console.print(self._way_on("the run ended"))
            await self._abort()
            return FAILED
        except Exception as error:  # the top of the program: all that is known, an orderly end, exit code 1
            print(redacted(traceback.format_exc()), file=sys.stderr)
            signs = redacted(await self.signs.post_mortem(error))
            self.console.print(printable(signs), markup=False, highlight=False)
            self.console.print(self._way_on("the run failed"))
            await self._abort()
            return FAILED
        finally:
            deadman.close()
            self.exported.close()
            self.log.close()

    async def _abort(self) -> None:
        for problem in await self.system.abort():
            self.console.print(f"at the end: {problem}", markup=False)

    def _way_on(self, what: str) -> str:
        steps = self.checkpoints.steps()
        if steps:
            return f"{what}; --resume goes on from step {steps[-1]}"
        return f"{what} before a checkpoint; {BEGIN_ANEW}"

    def _interrupt(self, work: "asyncio.Future[int]", number: int) -> None:
        again, self.interrupted = self.interrupted, True
        if again and number != signal.SIGINT:
            return  # a stopped job on a pod that ends gets it twice, from Ray and from the pod's hook
        if self.controller.stopping or not self.controller.running:
            work.cancel()
            return
        self.controller.stopping = True
        self.promising = asyncio.ensure_future(self._promise())

    async def _promise(self) -> None:
        """Promise a checkpoint if all that it needs is there; a death ends the run by itself."""
        try:
            silent = await self.signs.unanswering()
        except DeadProcess:
            return
        doubt = f", if {' and '.join(silent)} answers in time" if silent else ""
        self.display.note(f"stopping after this step with a checkpoint{doubt}; once more to stop at once")

    async def _work(self) -> int:
        with self.display:
            self.exported.begin()
            await self.system.start(self.display.note)
            self.signs.up = True
            self.watching = asyncio.create_task(self.exported.watch_workers(lambda: self.system.fleet.actors))
            if self.found is not None:
                await self._load(self.found)
            else:
                await self._begin()
            self.display.training()
            await self.controller.run(self._after_step)
            if self.controller.step not in self.checkpoints.steps():
                await self._save(must=not self.controller.finished)
            self.controller.running = False  # a resume repeats what follows: a signal ends it at once
            if self.controller.stopping or not self.controller.finished:
                self.display.note(f"stopped at step {self.controller.step}; go on with --resume")
                await self._stop()
                return INTERRUPTED
            evaluation = await self.evaluator.finish(self.controller.step)
            await self._export_discriminator()
            memory = await self._memory()
        self._report(evaluation, memory)
        whole = await self._copy()
        if not whole:
            self.console.print(f"the run is whole in {self.config.folder}, its copy is not")
        await self._stop()
        return 0 if whole else FAILED

    async def _memory(self) -> dict[str, float]:
        try:
            return await self.system.memory()
        except RuntimeError as error:  # no reason to lose the report
            self.display.note(f"memory is not known: {error}")
            return {}

    async def _stop(self) -> None:
        """End the processes in order; what was done is written by now and counts whatever happens here."""
        self.signs.expect_ends()
        try:
            await self.system.stop()
        except Exception as error:
            self.console.print(f"at the end: {error}", markup=False)
            await self._abort()

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
        evaluation = self.config.evaluation
        if step % evaluation.every == 0 or self.controller.finished:
            await self._evaluate(step)
        elif evaluation.look_every and step % evaluation.look_every == 0:
            with self.controller.timer("look"):
                self.row["monitor"] = await self.evaluator.look()
        self._record(step)
        await self._check_finite()
        if self.saver.due(step) and not self.controller.not_finite.active:
            await self._save()

    async def _check_finite(self) -> None:
        """Go back to the last checkpoint's weights at the limit of steps left out, where the run may."""
        account = self.controller.not_finite
        try:
            account.check()
        except NotFiniteError as error:
            if self.rollbacks >= self.config.run.rollbacks:
                raise
            found = await asyncio.to_thread(self.checkpoints.newest_whole)
            if found is None:
                raise
            self.rollbacks += 1
            self.display.note(f"{error}; going back to the weights of {found.folder.name}")
            await self.controller.quiesce()
            await self.system.reload(found.folder)
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
        if self.log.problem:
            self.display.note(self.log.problem)
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

    async def _save(self, *, must: bool = False) -> None:
        self.lease.check()
        with self.controller.timer("checkpoint"):
            await self.controller.quiesce()
            saved = await self.saver.save(self.controller.step, self._write, must=must)
        if saved:
            await self._copy()

    async def _write(self, folder: Path) -> dict[str, Any]:
        """Write all but its state into a checkpoint's folder, and return that."""
        (folder / CONFIG).write_text(to_toml(settled(self.config)), encoding="utf-8")
        system = await self.system.save(folder)
        return {
            "system": system,
            "controller": self.controller.state(),
            "data": self.data_digests,
            "evaluator": self.evaluator.state(),
            "alarms": self.alarms.state_dict(),
            "watch": self.watch.state(),
            "warm": self.warm,
            "seconds": self.elapsed,
        }

    async def _copy(self) -> bool:
        """Bring the run's copy up to date; False when that failed, which is said."""
        if self.mirror is None:
            return True
        with self.controller.timer("mirror"):
            return await self.mirror.pushed(self.config.run.mirror_timeout_s, self.display.note)

    async def _load(self, found: Found) -> None:
        state = found.state
        self.display.note(f"resuming from step {found.step}")
        await self.system.load(found.folder, state["system"])
        self.controller.load_state(state["controller"])
        self.evaluator.load_state(state["evaluator"])
        self.alarms.load_state_dict(state["alarms"])
        self.watch.load_state(state["watch"])
        self.warm = state["warm"]
        self.earlier_seconds = state["seconds"]
        later = self.checkpoints.supersede(found.step)
        self._write_config()
        self.log.truncate_after(found.step)
        self.rows = read_metrics(self.log.path)
        if later:  # or whoever resumes from the copy before the next checkpoint would find them there
            await self._copy()

    def _write_config(self) -> None:
        write_whole(self.config.folder / "config.toml", to_toml(self.config))

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
