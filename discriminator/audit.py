"""The shortcut audit: which cues tell demonstrations from rollouts before a word of them is read.

A discriminator takes the cheapest difference. Some differences are the task (humans write longer sentences:
let the policy learn it), some destroy the training: the policy cannot produce them, so its reward never
rises. Both tables count: the sides as they came (raw) and as the canonical path spells them. A run is refused
for two reasons only:

* what the discriminator reads separates by a value that `dominant_share` of the demonstrations show and none
  of at least `absent_from` base samples (where a probe looks at complete responses only, a quarter of them
  must be complete);
* a cue separates the raw sides, canonicalisation removes it, and canonicalisation is off.

Cues that any policy can learn to produce (length, case, punctuation) are reported, never refused. The two
sides of preference pairs are reported on only: neither says what the policy can produce.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from discriminator.audit_config import AuditConfig
from discriminator.probes import PROBES, Probe, Response, Separation, separate

Verdict = Literal["refuse", "report"]
Table = dict[str, Separation]
SIDES = ("demonstrations", "rollouts")
PAIRED_SIDES = ("chosen answers", "rejected answers")
LEAST_SHARE = 0.05
"""Share of the demonstrations that a value needs for its absence among the rollouts to be told."""


@dataclass(frozen=True)
class Finding:
    """One cue that tells the sides apart."""

    cue: str
    accuracy: float
    """Balanced accuracy of its probe on the sides that the discriminator reads."""
    low: float
    high: float
    """95 % interval, simultaneous over all probes and both tables."""
    demonstrations: tuple[str, ...]
    rollouts: tuple[str, ...]
    """Up to three values seen on either side."""
    verdict: Verdict
    explanation: str
    remedy: str
    """Empty where there is nothing to do."""


@dataclass(frozen=True)
class AuditReport:
    """Both tables and what follows from them."""

    raw: Table
    canonical: Table
    canonicalisation: bool
    rollouts: int
    findings: tuple[Finding, ...]
    sides: tuple[str, str] = SIDES
    """What the two sides are called."""

    @property
    def read(self) -> Table:
        """The table of the sides that the discriminator reads."""
        return self.canonical if self.canonicalisation else self.raw

    @property
    def refused(self) -> tuple[Finding, ...]:
        """Findings for which a run must not start."""
        return tuple(finding for finding in self.findings if finding.verdict == "refuse")

    def metrics(self) -> dict[str, float]:
        """Balanced accuracy of every probe on the sides that the discriminator reads, and their maximum."""
        found = {cue.replace(" ", "_"): separation.accuracy for cue, separation in self.read.items()}
        return {**found, "max": max(found.values(), default=0.5)}

    def lines(self) -> list[str]:
        """The findings as plain text, refusals first; one line says so when there are none."""
        first, second = self.sides
        if not self.findings:
            return [f"shortcut audit: no cue tells {first} from {self.rollouts} {second}"]
        lines = []
        for finding in sorted(self.findings, key=lambda found: (found.verdict != "refuse", -found.accuracy)):
            remedy = f" Remedy: {finding.remedy}." if finding.remedy else ""
            lines += [
                f"shortcut audit: {finding.verdict}: {finding.cue}: balanced accuracy {finding.accuracy:.3f} "
                f"[{finding.low:.2f}, {finding.high:.2f}]. {finding.explanation}{remedy}",
                f"    {first}: {'; '.join(finding.demonstrations)}",
                f"    {second}: {'; '.join(finding.rollouts)}",
            ]
        return lines

    def markdown(self) -> str:
        """A table of all probes on both pairs of sides, and the findings below it."""

        def cell(table: Table, cue: str) -> str:
            found = table.get(cue)
            return "-" if found is None else f"{found.accuracy:.3f} [{found.low:.2f}, {found.high:.2f}]"

        verdicts = {finding.cue: finding.verdict for finding in self.findings}
        rows = ["| cue | raw sides | canonical sides | verdict |", "| --- | --- | --- | --- |"]
        for probe in PROBES:
            cue = probe.cue
            rows.append(
                f"| {cue} | {cell(self.raw, cue)} | {cell(self.canonical, cue)} | {verdicts.get(cue, '-')} |"
            )
        items = [
            f"- {line}" if not line.startswith(" ") else line.replace("    ", "  - ") for line in self.lines()
        ]
        return "\n".join([*rows, "", *items])


def audit(
    raw: tuple[Sequence[Response], Sequence[Response]],
    canonical: tuple[Sequence[Response], Sequence[Response]],
    *,
    canonicalisation: bool,
    config: AuditConfig,
    pairs: bool = False,
    folds: int = 5,
    seed: int = 0,
) -> AuditReport:
    """Run every probe on both pairs (demonstrations, rollouts) and give each cue its verdict.

    Args:
        raw: the sides as they came (`probes.raw_responses`).
        canonical: the same responses through the canonical path (`probes.canonical_responses`).
        canonicalisation: which of the two the discriminator reads.
        config: thresholds.
        pairs: the sides are the chosen and the rejected answers of preference pairs.
        folds: cross-validation folds, by prompt.
        seed: of the folds.
    """
    alpha = 0.05 / (2 * len(PROBES))
    tables: list[Table] = []
    for sides in (raw, canonical):
        found = {probe.cue: separate(probe, *sides, alpha=alpha, folds=folds, seed=seed) for probe in PROBES}
        tables.append({cue: separation for cue, separation in found.items() if separation is not None})
    findings = []
    for probe in PROBES:
        before, after = (table.get(probe.cue) for table in tables)
        finding = _finding(probe, before, after, canonicalisation, len(raw[1]), config, pairs)
        if finding is not None:
            findings.append(finding)
    names = PAIRED_SIDES if pairs else SIDES
    return AuditReport(tables[0], tables[1], canonicalisation, len(raw[1]), tuple(findings), names)


def _finding(
    probe: Probe,
    raw: Separation | None,
    canonical: Separation | None,
    canonicalisation: bool,
    rollouts: int,
    config: AuditConfig,
    pairs: bool,
) -> Finding | None:
    """What to say about one cue; None when neither table names it."""
    read, other = (canonical, raw) if canonicalisation else (raw, canonical)
    named, named_other = _named(read, config), _named(other, config)
    if not named and not named_other:
        return None
    shown = read if named else other
    assert shown is not None
    verdict, explanation, remedy = _judge(
        probe, shown, named, named_other, canonicalisation, rollouts, config, pairs
    )
    at = read or shown
    return Finding(
        probe.cue,
        at.accuracy,
        at.low,
        at.high,
        shown.demonstrations,
        shown.rollouts,
        verdict if config.refuse else "report",
        explanation,
        remedy,
    )


def _named(found: Separation | None, config: AuditConfig) -> bool:
    return found is not None and found.low > 0.5 and found.accuracy >= config.least_accuracy


def _judge(
    probe: Probe,
    shown: Separation,
    named: bool,
    named_other: bool,
    canonicalisation: bool,
    rollouts: int,
    config: AuditConfig,
    pairs: bool,
) -> tuple[Verdict, str, str]:
    """Verdict, explanation and remedy of a cue that `shown` names. `named`: on the sides that are read."""
    if not named:
        why = (
            "It separates the raw sides only: canonicalisation removes it before the discriminator reads."
            if canonicalisation
            else "It separates the canonical sides only, which the discriminator does not read."
        )
        return "report", why, ""
    if pairs:
        return (
            "report",
            "The reward model can tell the chosen answer by it, and reward it.",
            "",
        )
    if probe.reachable:
        how = "discriminator.length_matched = true takes it out" if probe.cue == "length" else ""
        return "report", "Any policy can learn to produce it: it counts as part of the task.", how
    if not canonicalisation and not named_other:
        why = "It is spelling: canonicalisation removes it, but canonicalisation is off."
        return "refuse", why, "turn canonicalisation on (discriminator.canonical), or " + probe.remedy
    if shown.absent is None or shown.absent_share < LEAST_SHARE:
        return "report", "The policy produces it too: it counts as part of the task.", ""
    seen = f"{shown.absent_share:.0%} of the demonstrations show: {shown.absent}; 0 of "
    seen += f"{shown.judged_rollouts} samples of the policy do"
    if shown.absent_share < config.dominant_share:
        why = f"{seen}; what most of them show it produces, and can earn by that."
        return "report", why, probe.remedy
    if rollouts >= config.absent_from and 4 * shown.judged_rollouts >= config.absent_from:
        why = f"{seen}: it cannot produce that, so its reward could not rise."
        return "refuse", why, probe.remedy
    why = f"{seen}, too few (< {config.absent_from}) to say that it never would."
    return "report", why, probe.remedy
