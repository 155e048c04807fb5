"""The shortcut audit of a run: before training on base samples, or on the preference pairs of a reward model;
on the evaluation's responses afterwards.

On base samples it may refuse; later it only reports, because by then the policy's samples are no longer the
base's, and on pairs too, because the policy wrote neither side. "Raw" are the demonstrations as the data file
has them and the ids as sampled. Where canonicalisation is off (Unicode or whitespace), the first table holds
instead what the discriminator will read (re-encoded, cut and ended alike, but not normalised), and the second
what it would read with the default normalisation.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from discriminator.audit import AuditReport, audit
from discriminator.audit_config import AuditConfig
from discriminator.canonical import Canonicaliser, prepare_demonstrations
from discriminator.config import CanonicalConfig
from discriminator.probes import Response, canonical_responses, raw_responses

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Sides = tuple[list[Response], list[Response]]


class ShortcutRefusal(RuntimeError):
    """The discriminator could tell the sides apart by what the policy cannot produce."""


@dataclass(frozen=True)
class Audited:
    """What one audit has to say."""

    metrics: dict[str, float]
    """Balanced accuracy per cue and `max`, for the step's metrics under "audit"."""
    notes: list[str]
    """Lines for the console."""
    report: AuditReport


class Auditor:
    """Audits one run's demonstrations against samples of its policy.

        auditor = Auditor(config.discriminator.audit, canonicaliser, renderer.tokenizer,
                          end_id=renderer.end_id, max_tokens=config.sampling.max_tokens)
        auditor.base(splits.train, base_samples)          # raises ShortcutRefusal
        auditor.policy(splits.selection, responses)       # reports only

    Args:
        config: thresholds.
        canonical: the discriminator's own path (`discriminator.model.load_canonicaliser`).
        tokenizer: the policy's.
        end_id: the policy's end token.
        max_tokens: most tokens of a rollout, its end token included.
        seed: of folds and of the choice among too many demonstrations.
    """

    def __init__(
        self,
        config: AuditConfig,
        canonical: Canonicaliser,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        end_id: int,
        max_tokens: int,
        seed: int = 0,
    ) -> None:
        self.config = config
        self.canonical = canonical
        self.tokenizer = tokenizer
        self.end_id = end_id
        self.max_tokens = max_tokens
        self.seed = seed
        self.guarded = canonical.config.whitespace != "off" and canonical.config.unicode != "off"
        """Whether canonicalisation is on."""

    def base(self, demonstrations: pa.Table, samples: pa.Table) -> Audited:
        """Audit before training.

        Args:
            demonstrations: a split (prompt_id, prompt_text, response).
            samples: trajectories of the base model.

        Raises:
            ShortcutRefusal: with cue, examples, reason and remedy of everything that is refused.
        """
        found = self._audit(demonstrations, samples, self.config)
        if found.report.refused:
            what = "the discriminator would separate the sides by what the policy cannot produce"
            allow = "discriminator.audit.refuse = false starts the run all the same"
            raise ShortcutRefusal("\n".join([f"{what}; {allow}", *found.notes]))
        return found

    def policy(self, demonstrations: pa.Table, samples: pa.Table) -> Audited:
        """Audit at an evaluation: the human answers of its split against the policy's responses."""
        return self._audit(demonstrations, samples, self.config.model_copy(update={"refuse": False}))

    def pairs(self, pairs: pa.Table) -> Audited:
        """Audit preference pairs (prompt_id, prompt_text, chosen, rejected), which are all that their reward
        model reads."""
        drawn = self._some(pairs)
        return self._compare(_written(drawn, "chosen"), _written(drawn, "rejected"), self.config, pairs=True)

    def _audit(self, demonstrations: pa.Table, samples: pa.Table, config: AuditConfig) -> Audited:
        return self._compare(_written(self._some(demonstrations), "response"), samples, config)

    def _compare(
        self, first: pa.Table, second: pa.Table, config: AuditConfig, *, pairs: bool = False
    ) -> Audited:
        own = self._canonical(first, second, self.canonical)
        if self.guarded:
            raw = (
                raw_responses(first, self.tokenizer, self.end_id),
                raw_responses(second, self.tokenizer, self.end_id),
            )
            tables = raw, own
        else:
            tables = own, self._canonical(first, second, self._default())
        report = audit(*tables, canonicalisation=self.guarded, config=config, pairs=pairs, seed=self.seed)
        return Audited(report.metrics(), report.lines(), report)

    def _canonical(self, first: pa.Table, second: pa.Table, canonical: Canonicaliser) -> Sides:
        def side(table: pa.Table) -> list[Response]:
            if "finish_reason" not in table.column_names:  # written, not sampled
                table = prepare_demonstrations(
                    table, self.tokenizer, canonical.config, max_tokens=self.max_tokens
                )
            return canonical_responses(table, canonical)

        return side(first), side(second)

    def _default(self) -> Canonicaliser:
        """The discriminator's path with the default normalisation and its own limits."""
        limits: dict[str, Any] = {
            "max_prompt_tokens": self.canonical.max_prompt,
            "max_response_tokens": self.canonical.max_response,
        }
        context = self.canonical.max_prompt + self.canonical.max_response
        return Canonicaliser(self.canonical.tokenizer, CanonicalConfig(**limits), context=context)

    def _some(self, demonstrations: pa.Table) -> pa.Table:
        """At most as many demonstrations, or pairs, as base samples, drawn by the seed."""
        if demonstrations.num_rows <= self.config.base_samples:
            return demonstrations
        drawn = np.random.default_rng(self.seed).permutation(demonstrations.num_rows)
        return demonstrations.take(np.sort(drawn[: self.config.base_samples]))


def _written(table: pa.Table, column: str) -> pa.Table:
    """The answers of a column of a data file's rows."""
    chosen = table.select(["prompt_id", "prompt_text", column])
    return chosen.rename_columns(["prompt_id", "prompt_text", "response_text"])
