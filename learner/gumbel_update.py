"""The Gumbel-Softmax update as part of the policy's training step.

    draw -> keep what the judge reads as it was drawn -> pack -> (in the step) rows -> scores -> loss

The judge scores text in its own spelling, and a soft sample has none: it cannot be decoded. So a drawn
response takes part only when its hard tokens, decoded and encoded again, come back as they were; the soft
score of such a response equals the score of its text. The others are left out and counted. Each response kept
weighs the same, over all micro-batches and ranks.
"""

from collections.abc import Sequence
from typing import Any, Literal, Protocol

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from learner.batching import make_batches
from learner.config import LearnerConfig
from learner.drawing import Drawn, draw_responses
from learner.engine import TrainableModel
from learner.gumbel import MISMATCHED, OBJECTIVES, POLICY, SOFT, GumbelModel, SoftBatch, tau_at
from learner.losses import LossOutput
from learner.packing import Group, PackedBatch, filler

NGRAM = 3


class Judge(Protocol):
    """What scores embedded responses. Its weights are constants here; whoever builds the learner passes
    it in."""

    end_ids: frozenset[int]
    """Policy tokens that end a response."""
    level: Literal["sequence", "token"]
    """Whether a response's last score counts, or the scores of all its prefixes."""
    vocabulary: int
    """Rows of `table`."""

    def hold(self, version: int) -> None:
        """Have exactly this version judge from now on."""

    def table(self) -> Tensor:
        """[V, H] embedding of each policy token as the judge's body reads it (end tokens: as its own)."""

    def prompt_of(self, prompt_text: str, response_ids: Sequence[int], *, ended: bool) -> list[int] | None:
        """Ids of the prompt as the judge reads it; None when it would read the response as other tokens."""

    def batch(self, groups: Sequence[Group]) -> PackedBatch:
        """All these responses, last tokens included, as one batch."""

    def scores(self, batch: PackedBatch, embedded: Tensor) -> Tensor:
        """fp32 [N] scores of responses given as embeddings [N, H]; differentiable in them."""


class GumbelUpdate:
    """Draws, packs, scores and counts, on one rank. `draw` and `metrics` are collective.

    Raises ValueError when policy and judge have different vocabularies.
    """

    def __init__(self, cfg: LearnerConfig, judge: Judge, trainable: TrainableModel, seed: int) -> None:
        self.cfg = cfg
        self.judge = judge
        self.trainable = trainable
        self.seed = seed
        if (mine := self.model.head.weight.shape[0]) != judge.vocabulary:
            raise ValueError(
                f"gumbel: the policy's vocabulary has {mine} tokens, the judge's {judge.vocabulary}; "
                "straight-through samples need a judge with the policy's own vocabulary"
            )

    @property
    def model(self) -> GumbelModel:
        return self.trainable.module  # type: ignore[return-value]

    def draw(
        self, table: pa.Table, groups: list[Group], step: int
    ) -> tuple[list[SoftBatch], dict[str, float]]:
        """This rank's batches of the step's drawn responses, as many as on every other rank, and what was
        drawn on all of them.

        Reads `prompt_text` and `disc_version`, the version that judged the table: it judges here too.
        Metrics: gumbel_tau, gumbel_tokens, gumbel_kept_tokens (of responses that were not left out),
        gumbel_length, gumbel_truncated (share cut by the limit), gumbel_masked (share left out),
        gumbel_repetition (see `repetition`).

        Raises ValueError for a table judged by several versions.
        """
        versions = set(table["disc_version"].to_pylist())
        if len(versions) != 1:
            raise ValueError(f"step {step}: judged by versions {sorted(versions)}, Gumbel-Softmax needs one")
        self.judge.hold(versions.pop())
        settings, rank, ranks = self.cfg.gumbel, self.trainable.rank, self.trainable.ranks
        if settings.max_tokens is None:
            raise ValueError("gumbel.max_tokens is not set: how long may a drawn response be?")
        self.model.tally.zero_()
        mine = [(number, group) for number, group in enumerate(groups) if number % ranks == rank]
        seed = (self.seed, step)
        drawn = draw_responses(
            self.model,
            [(number, group.prompt) for number, group in mine],
            samples=settings.samples,
            max_tokens=settings.max_tokens,
            end_ids=self.judge.end_ids,
            seed=seed,
            budget=self.cfg.micro_batch_tokens,
        )
        texts = table["prompt_text"]
        kept = _Kept(self.judge)
        for (number, group), responses in zip(mine, drawn, strict=True):
            kept.add(number * settings.samples, group.prompt, texts[int(group.rows[0])].as_py(), responses)
        every = [response for responses in drawn for response in responses]
        tokens = sum(len(response.ids) for response in every)
        counted = {
            "drawn": float(len(every)),
            "kept": float(len(kept.lengths)),
            "kept_tokens": float(sum(kept.lengths)),
            "tokens": float(tokens),
            "cut": float(sum(not response.ended for response in every)),
            "repetition": sum(repetition(response.ids) for response in every),
        }
        total = self._summed(counted)
        self._kept_tokens = total["kept_tokens"]
        tau = tau_at(settings, step)
        batches = self._batches(kept, total["kept"], seed, tau)
        told = {
            "gumbel_tau": tau,
            "gumbel_tokens": total["tokens"],
            "gumbel_kept_tokens": total["kept_tokens"],
            "gumbel_length": total["tokens"] / total["drawn"],
            "gumbel_truncated": total["cut"] / total["drawn"],
            "gumbel_masked": 1.0 - total["kept"] / total["drawn"],
            "gumbel_repetition": total["repetition"] / total["drawn"],
        }
        return batches, told

    def loss(self, model: nn.Module, batch: SoftBatch) -> LossOutput:
        """-weight x sum of share x objective(score); sums gumbel_objective and gumbel_score (the mean
        sequence score)."""
        scores = self.judge.scores(batch.judged, model(batch)[batch.order])
        columns = batch.judged.columns
        objective = (columns["share"] * OBJECTIVES[self.cfg.gumbel.objective](scores)).sum()
        loss = -self.cfg.gumbel.weight * objective
        sums = {
            "loss": loss,
            "gumbel_objective": objective,
            "gumbel_score": (columns["last"] * scores).sum(),
        }
        return LossOutput(loss, {name: value.detach() for name, value in sums.items()}, {})

    def metrics(self) -> dict[str, float]:
        """After the step: gumbel_grad_share, the judge's part of the squared gradient norm where both
        gradients enter the policy (its last hidden states), and gumbel_mismatch, the share of drawn tokens
        that the second pass would not have drawn."""
        tally = self.model.tally
        found = self.trainable.reduce(
            {"soft": tally[SOFT], "policy": tally[POLICY], "mismatched": tally[MISMATCHED]}, "sum"
        )
        both = found["soft"] + found["policy"]
        return {
            "gumbel_grad_share": found["soft"] / both if both else 0.0,
            "gumbel_mismatch": found["mismatched"] / max(1.0, self._kept_tokens),
        }

    def _summed(self, values: dict[str, float]) -> dict[str, float]:
        return self.trainable.reduce(
            {k: torch.tensor(v, dtype=torch.float64) for k, v in values.items()}, "sum"
        )

    def _batches(self, kept: "_Kept", total: float, seed: tuple[int, int], tau: float) -> list[SoftBatch]:
        table = self.judge.table()
        packed = make_batches(kept.policy, self.cfg)
        most = self.trainable.reduce({"batches": torch.tensor(float(len(packed)))}, "max")["batches"]
        lengths = torch.tensor(kept.lengths, dtype=torch.int64)
        keys = {
            "sample": torch.repeat_interleave(torch.tensor(kept.samples, dtype=torch.int64), lengths),
            "place": torch.cat([torch.zeros(0, dtype=torch.int64), *map(torch.arange, kept.lengths)]),
        }
        last = torch.zeros(int(lengths.sum())).index_fill(0, lengths.cumsum(0) - 1, 1.0 / max(1.0, total))
        evenly = torch.repeat_interleave(1.0 / (lengths * max(1.0, total)), lengths)
        shares = {"share": last if self.judge.level == "sequence" else evenly, "last": last}
        batches = []
        for policy in packed:
            judged = self.judge.batch(kept.judged_with(set(policy.trajectory.tolist())))
            order = torch.argsort(policy.flat)[torch.searchsorted(policy.flat.sort().values, judged.flat)]
            policy, judged = policy.with_columns(**keys), judged.with_columns(**shares)
            batches.append(SoftBatch(policy, judged, order, table, seed, tau))
        nothing = _empty(table, seed, tau)
        return batches + [nothing] * (max(1, int(most)) - len(batches))


class _Kept:
    """The drawn responses that take part, as groups for policy and judge; rows and starts count these."""

    def __init__(self, judge: Judge) -> None:
        self.judge = judge
        self.policy: list[Group] = []
        self.judged: list[Group] = []
        self.lengths: list[int] = []
        self.samples: list[int] = []

    def add(self, first: int, prompt: np.ndarray, prompt_text: str, responses: Sequence[Drawn]) -> None:
        """Take one prompt's responses in, numbered from `first`, leaving out those that the judge would read
        otherwise."""
        read, ids, starts, rows = [], [], [], []
        for number, response in enumerate(responses, start=first):
            judged = self.judge.prompt_of(prompt_text, response.ids.tolist(), ended=response.ended)
            if judged is None:
                continue
            read.append(judged)
            ids.append(response.ids)
            starts.append(sum(self.lengths))
            rows.append(len(self.lengths))
            self.lengths.append(len(response.ids))
            self.samples.append(number)
        if ids:
            places = np.array(starts), np.array(rows)
            self.policy.append(Group(prompt, ids, *places))
            self.judged.append(Group(np.array(read[0]), ids, *places))

    def judged_with(self, rows: set[int]) -> list[Group]:
        """The judge's groups of these rows alone."""
        chosen = []
        for group in self.judged:
            members = [i for i, row in enumerate(group.rows) if int(row) in rows]
            if members:
                responses = [group.responses[i] for i in members]
                chosen.append(Group(group.prompt, responses, group.starts[members], group.rows[members]))
        return chosen


def _empty(table: Tensor, seed: tuple[int, int], tau: float) -> SoftBatch:
    """A batch of weight zero, for ranks with fewer than the others, or when nothing was kept."""
    key = torch.zeros(1, dtype=torch.int64)
    policy = filler().with_columns(sample=key, place=key)
    judged = filler().with_columns(share=torch.zeros(1), last=torch.zeros(1))
    return SoftBatch(policy, judged, key, table, seed, tau)


def repetition(ids: Sequence[int] | np.ndarray) -> float:
    """Share of a response's token trigrams that it has had before: 0 for none, near 1 for a loop."""
    grams: list[Any] = [tuple(ids[i : i + NGRAM]) for i in range(len(ids) - NGRAM + 1)]
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0
