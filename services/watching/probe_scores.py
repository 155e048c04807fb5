"""What every evaluated discriminator version said about one fixed set of responses.

The set is chosen once (base responses and human answers to the same prompts) and never changes, so a frozen
earlier discriminator is remembered by its scores: no old weights are kept.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from services.evaluation.monitors import cycling

COLUMNS = ("group_id", "prompt_text", "response_text", "finish_reason", "side")


class ProbeScores:
    """Chooses the probes, collects their scores by version, and says whether the discriminator cycles.

    probes = ProbeScores(prompts=64, kept=8)
    probes.choose(base_responses, human_answers)                       # once, at step 0
    answers = await system.score(probes.table, system.disc_version)    # at every later evaluation
    metrics = probes.add(system.disc_version, answers)
    """

    def __init__(self, prompts: int = 64, kept: int = 8) -> None:
        self.prompts = prompts
        self.kept = kept
        self._rows: list[dict[str, str]] = []
        self._scores: dict[int, list[float]] = {}

    @property
    def table(self) -> pa.Table:
        """The probes as `System.score` reads them; empty before `choose`."""
        return pa.Table.from_pylist(self._rows, schema=pa.schema([(name, pa.string()) for name in COLUMNS]))

    def choose(self, responses: pa.Table, human: pa.Table) -> None:
        """Fix the probes: the first response and the first human answer to each of the first prompts.

        Args:
            responses: trajectories of the base model.
            human: a split (prompt_id, prompt_text, response) with the same prompts.
        """
        answers: dict[str, str] = {}
        for name, text in zip(human["prompt_id"].to_pylist(), human["response"].to_pylist(), strict=True):
            answers.setdefault(name, text)
        names = ("prompt_id", "prompt_text", "response_text", "finish_reason")
        first: dict[str, tuple[str, str, str]] = {}
        for name, *row in zip(*(responses[column].to_pylist() for column in names), strict=True):
            if name in answers:
                first.setdefault(name, (row[0], row[1], row[2]))
        self._rows = []
        for name in sorted(first)[: self.prompts]:
            prompt, text, reason = first[name]
            for values in ((text, reason, "policy"), (answers[name], "stop", "human")):
                self._rows.append(dict(zip(COLUMNS, (name, prompt, *values), strict=True)))

    def add(self, version: int, answers: Sequence[dict[str, Any]]) -> dict[str, float]:
        """Remember one version's answers on `table` (its sequence scores), compare it with earlier ones.

        Returns `monitors.cycling`. Raises ValueError when the answers do not belong to the probes.
        """
        if len(answers) != len(self._rows):
            raise ValueError(f"{len(answers)} answers for {len(self._rows)} probes")
        self._scores.pop(version, None)
        self._scores[version] = [float(answer["scores"][-1]) for answer in answers]
        for old in sorted(self._scores)[: -self.kept]:
            del self._scores[old]
        ordered = np.array([self._scores[v] for v in sorted(self._scores)])
        return cycling(ordered, [row["side"] for row in self._rows])

    def state(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"rows": self._rows, "scores": [[version, row] for version, row in self._scores.items()]}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._rows = state["rows"]
        self._scores = {int(version): row for version, row in state["scores"]}
