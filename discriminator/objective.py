"""What one discriminator step minimises: a loss, regularisers and weights, summed over any split of the step.

A micro-batch of a step knows its own scores only. What needs all of them (comparisons of responses, the
mean score) is read in a *first pass* without gradients and becomes one constant per response, the derivative
of the step's loss in that response's score: differentiating slope . scores gives the step's exact gradient,
however the step is split.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from discriminator.config import SHIFT_FREE_LOSSES, DiscriminatorConfig, Level
from discriminator.losses import (
    balanced_weights,
    bradley_terry,
    judged_metrics,
    pair_weights,
    pointwise,
    response_means,
)
from discriminator.model import responses_in
from discriminator.regularisers import centring_slope, r1_direction, r1_penalty
from learner.losses import LossOutput
from learner.packing import PackedBatch


@dataclass(frozen=True)
class StepRows:
    """The responses of a step, each [R], in any order; perturbed demonstrations are on the rollouts' side."""

    is_demonstration: Tensor
    """bool"""
    prompt: Tensor
    """int64, equal for equal prompts."""
    weight: Tensor
    """Share of the loss; 1/2 a side."""
    counted: Tensor
    """Share of the metrics, which leave perturbed demonstrations out; 1/2 a side."""

    def to(self, device: torch.device | str) -> "StepRows":
        return StepRows(
            self.is_demonstration.to(device),
            self.prompt.to(device),
            self.weight.to(device),
            self.counted.to(device),
        )


def step_rows(
    is_demonstration: Tensor, prompt: Tensor, *, weight: Tensor | None = None, perturbed: Tensor | None = None
) -> StepRows:
    """`StepRows` with equal weights within a side unless others are given; `perturbed` rows are not
    counted."""
    weight = balanced_weights(is_demonstration) if weight is None else weight.to(torch.float32)
    counted = weight
    if perturbed is not None and perturbed.any():
        kept = weight * ~perturbed
        on_rollouts = (kept * ~is_demonstration).sum()
        if on_rollouts == 0:  # the lengths that both sides share are those of perturbed rows alone
            kept = torch.where(perturbed, 0.0, 1.0)
            on_rollouts = (kept * ~is_demonstration).sum()
        on_demonstrations = (kept * is_demonstration).sum()
        counted = 0.5 * kept / torch.where(is_demonstration, on_demonstrations, on_rollouts)
    return StepRows(is_demonstration, prompt, weight, counted)


def needs_first_pass(config: DiscriminatorConfig) -> bool:
    """Whether a step's scores must be known before it can be split."""
    return config.loss in SHIFT_FREE_LOSSES or config.score_centring > 0


def response_values(scores: Tensor, response: Tensor, last: Tensor, *, level: Level) -> Tensor:
    """[R] one score per response: the last one at the sequence level, the mean over its prefixes per token.

    Args:
        scores: [T], response: [T] int64, last: [R] int64, see `losses.pointwise`.
        level: of the discriminator.
    """
    return scores[last] if level == "sequence" else response_means(scores, response, len(last))


class Objective:
    """Loss of one step, called with each of its micro-batches.

        objective = Objective(config, rows, sequence=s, values=v)     # s, v: of a first pass, or None
        out = objective(module, batch)                                # a part; parts add up to the step
        metrics | objective.metrics                                   # numbers known for the whole step

    Args:
        config: of the discriminator.
        rows: the step's responses; `PackedBatch.trajectory` indexes them.
        sequence: [R] sequence scores from the first pass, under the weights that the step differentiates.
        values: [R] `response_values` from the same pass.

    Raises:
        ValueError: a first pass is needed and not given.
    """

    metrics: dict[str, Tensor]
    """Numbers of the whole step; they go before sums of the same name over its parts."""

    def __init__(
        self,
        config: DiscriminatorConfig,
        rows: StepRows,
        *,
        sequence: Tensor | None = None,
        values: Tensor | None = None,
    ) -> None:
        self.config = config
        self.rows = rows
        self.metrics = {}
        self._slope: Tensor | None = None
        if not needs_first_pass(config):
            return
        if sequence is None or values is None:
            raise ValueError(f"loss = {config.loss!r} or score_centring needs the scores of a first pass")
        values = values.detach()
        self._slope = torch.zeros_like(values)
        if config.loss in SHIFT_FREE_LOSSES:
            self.metrics |= judged_metrics(
                config.loss, sequence.detach(), rows.is_demonstration, rows.counted, rows.prompt
            )
        if config.loss == "bradley_terry":
            loss, slope = self._pairwise(values)
            self._slope += slope
            self.metrics["loss"] = loss
        if config.score_centring:
            square, slope = centring_slope(values, rows.weight)
            self._slope += config.score_centring * slope
            self.metrics["score_mean_squared"] = square

    def __call__(self, module: nn.Module, batch: PackedBatch) -> LossOutput:
        config = self.config
        response, last = responses_in(batch)
        at = batch.trajectory[last]
        real = batch.weight[last]
        side = self.rows.is_demonstration[at]
        weight = self.rows.weight[at] * real
        if config.gradient_penalty:
            direction = r1_direction(response, last, side, level=config.level)
            scores, squared = module(batch, direction)
        else:
            scores, squared = module(batch), None
        if config.loss == "bradley_terry":
            out = LossOutput(0.0 * scores.sum(), {}, {})
        else:
            out = pointwise(
                config.loss,
                scores,
                response,
                last,
                side,
                weight,
                level=config.level,
                label_smoothing=config.label_smoothing,
                counted=self.rows.counted[at] * real,
            )
        loss, sums = out.loss, dict(out.sums)
        if self._slope is not None:
            values = response_values(scores, response, last, level=config.level)
            loss = loss + (self._slope[at] * real * values).sum()
        if squared is not None:
            penalty = r1_penalty(squared, response, side, weight)
            loss = loss + config.gradient_penalty * penalty
            sums["gradient_penalty"] = penalty.detach()
        return LossOutput(loss, sums, {})

    def _pairwise(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """The pairwise loss of the step and its gradient in each response's value."""
        rows = self.rows
        pairs = pair_weights(rows.is_demonstration, rows.weight, rows.prompt)
        with torch.enable_grad():
            leaf = values.clone().requires_grad_()
            loss = bradley_terry(leaf, pairs, self.config.label_smoothing)
            (slope,) = torch.autograd.grad(loss, leaf)
        return loss.detach(), slope
