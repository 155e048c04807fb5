"""What a run looks at beside its measures: shortcuts that give the sides away, collapse, copying, a
discriminator that goes in circles. Numbers for the metrics and lines for the console; it changes nothing,
but it can refuse to start.
"""

import asyncio
from collections.abc import Callable
from typing import Any

from discriminator.model import load_canonicaliser
from rollout.files import write_whole
from services.config import Config
from services.evaluator import Evaluator
from services.system import System
from services.watching.auditor import Auditor
from services.watching.probe_scores import ProbeScores


class Watch:
    """Audits before training, audits and monitors at every evaluation.

    watch = Watch(config, system)
    await watch.begin(say)                          # raises ShortcutRefusal
    numbers = await watch.evaluated(step, evaluator)
    """

    def __init__(self, config: Config, system: System) -> None:
        self._config = config
        self._system = system
        self._probes = ProbeScores()
        self._auditor: Auditor | None = None
        judge = config.discriminator
        if judge.audit.enabled:
            self._auditor = Auditor(
                judge.audit,
                load_canonicaliser(judge, judge.model or config.policy.model),
                system.renderer.tokenizer,
                end_id=system.renderer.end_id,
                max_tokens=config.sampling.max_tokens,
                seed=config.run.seed,
            )

    async def begin(self, say: Callable[[str], None]) -> None:
        """Audit what the discriminator will learn from: the training demonstrations against base samples, or
        the preference pairs; the report is the run's `audit.md`.

        Raises:
            ShortcutRefusal: the sides differ in something that the policy cannot produce.
        """
        if self._auditor is None:
            return
        splits = self._system.splits
        if splits.preferences.num_rows:
            say("auditing the chosen answers of the preference pairs against the rejected ones")
            found = await asyncio.to_thread(self._auditor.pairs, splits.preferences)
        else:
            count = self._config.discriminator.audit.base_samples
            say(f"auditing the demonstrations against {count} base samples")
            samples = await self._system.base_samples(count)
            found = await asyncio.to_thread(self._auditor.base, splits.train, samples)
        for line in found.notes:
            if not line.startswith(" "):  # examples are in the file
                say(line)
        write_whole(self._config.folder / "audit.md", found.report.markdown() + "\n")

    async def evaluated(self, step: int, evaluator: Evaluator) -> dict[str, Any]:
        """Monitors and audit of the evaluation just made; the discriminator's turns must be done."""
        selection = self._system.splits.selection
        monitors: dict[str, Any] = dict(evaluator.monitors)
        if step == 0:
            self._probes.choose(evaluator.responses, selection)
        else:
            version = self._system.disc_version
            monitors |= self._probes.add(version, await self._system.score(self._probes.table, version))
        return {"monitor": monitors, **await self._audit(step, evaluator)}

    async def _audit(self, step: int, evaluator: Evaluator) -> dict[str, Any]:
        """Audit the evaluation's responses; the cues and their examples are in `samples/`, beside them."""
        if self._auditor is None:
            return {}
        selection = self._system.splits.selection
        audited = await asyncio.to_thread(self._auditor.policy, selection, evaluator.responses)
        file = self._config.folder / "samples" / f"step-{step:06d}-audit.md"
        write_whole(file, audited.report.markdown() + "\n")
        return {"audit": audited.metrics}

    def state(self) -> dict[str, Any]:
        """For the checkpoint."""
        return self._probes.state()

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._probes.load_state(state)
