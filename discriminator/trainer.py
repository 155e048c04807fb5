"""The discriminator's training step: rollouts and demonstrations in, published versions out.

Every rank is given the same whole tables and takes its share of them by a rule that all ranks compute alike.
What a step draws depends on (seed, step, tables) only, so a resumed run repeats an unbroken one.

    warm_up -> publish (version 0) -> [ evaluate -> update -> publish ] ...

`evaluate` feeds the health gate, which decides how many steps the next `update` makes; with none, `publish`
gives the old version again.
"""

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from discriminator.calibration import calibration
from discriminator.canonical import JUDGED_COLUMNS, Encoded
from discriminator.config import DiscriminatorConfig
from discriminator.draws import demonstration_rows, rollout_batches
from discriminator.health import HEALTH_LEVEL, HealthGate, HealthReading, Transition
from discriminator.losses import balanced_weights, judged_metrics, numbered
from discriminator.model import (
    Discriminator,
    batches_of,
    group_encoded,
    load_canonicaliser,
    load_discriminator,
    responses_in,
)
from discriminator.negatives import length_matched_weights, perturbed
from discriminator.objective import Objective, StepRows, needs_first_pass, response_values, step_rows
from discriminator.versions import state_checksum
from learner import lora
from learner.early_stopping import EarlyStopping
from learner.engine import TrainableModel, resolve_device, resolve_dtype
from learner.packing import Group, PackedBatch, pad_batches, split_for_ranks
from learner.snapshot import Snapshot
from learner.whole_state import read_json

log = logging.getLogger(__name__)

WARM_UP_STEP = -1


@dataclass(frozen=True)
class Published:
    """A version as it leaves the trainer: CPU tensors by plain name, adapters merged."""

    version: int
    state: dict[str, Tensor]
    checksum: str


class DiscriminatorTrainer:
    """The discriminator, its optimizer and its health gate, on one rank.

    Tables are Arrow tables with `JUDGED_COLUMNS`; demonstrations come from `prepare_demonstrations`.

    Args:
        config: the discriminator's configuration.
        model: hub name or folder of the body.
        model_dtype: dtype that `compute_dtype = "auto"` follows.
        seed: of the head, of what is drawn and of dropout.
    """

    version: int
    """Version of the last `publish`; -1 before the first."""

    def __init__(
        self, config: DiscriminatorConfig, model: str, *, model_dtype: str = "bfloat16", seed: int = 0
    ) -> None:
        self.config = config
        self.seed = seed
        self.version = -1
        self.gate = HealthGate(config.health, steps=config.steps_per_policy_step)
        self.canonical = load_canonicaliser(config, model)
        device = resolve_device(config.device)
        dtype = resolve_dtype(config.compute_dtype, model_dtype, device)
        module = load_discriminator(config, model, device=str(device), dtype=dtype, seed=seed)
        self.kind = module.kind
        if config.gradient_checkpointing:
            module.body.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        self.trainable = TrainableModel(module, config, dtype=dtype)
        self._published_updates = -1
        self._untold: list[Transition] = []

    @property
    def module(self) -> Discriminator:
        """The module in training; sharded under ZeRO-3."""
        return self.trainable.module  # type: ignore[return-value]

    def warm_up(
        self, rollouts: pa.Table, demonstrations: pa.Table, heldout: pa.Table, heldout_rollouts: pa.Table
    ) -> dict[str, float]:
        """Train until held-out accuracy reaches `warmup_accuracy`, `warmup_max_steps` are done or
        `warmup_patience` is at its end; with a patience, then go back to the best weights.

        Args:
            rollouts: of the untrained policy, on training prompts.
            demonstrations: training demonstrations.
            heldout: held-out demonstrations.
            heldout_rollouts: rollouts that the warm-up does not train on.

        Returns:
            The evaluation of the weights that stay, with `steps`, `tokens_trained` (see `update`) and the
            updates `skipped`.

        Raises:
            ValueError: a table is empty or lacks a column.
            FloatingPointError: every update was skipped.
        """
        done, tokens, patience = 0, 0.0, self.config.warmup_patience
        skipped = 0.0
        metrics = best = self._evaluate(heldout, heldout_rollouts)
        stopping, kept = EarlyStopping(patience or 1), Snapshot()
        plan = self._plan(rollouts, self.config.warmup_max_steps, WARM_UP_STEP)
        while done < self.config.warmup_max_steps and metrics["accuracy"] < self.config.warmup_accuracy:
            for rows in plan[done : done + self.config.warmup_eval_every]:
                trained = self._train(rollouts.take(rows), demonstrations, WARM_UP_STEP, done)
                tokens += trained["tokens_trained"]
                skipped += trained["skipped"]
                done += 1
            metrics = self._evaluate(heldout, heldout_rollouts)
            if patience is not None and stopping.observe(done, metrics["accuracy"]):
                best = metrics
                kept.take(self.trainable)
            if patience is not None and stopping.exhausted:
                break
        if done and skipped == done:
            raise FloatingPointError(
                f"no update of the discriminator's warm-up had a finite loss and gradient, of {done}; lower "
                "discriminator.lr"
            )
        if kept.taken:
            kept.restore(self.trainable)
            metrics = best
        if metrics["accuracy"] < self.config.warmup_accuracy:
            log.warning(
                "discriminator warm-up ended after %d steps at held-out accuracy %.3f, short of %.3f",
                done,
                metrics["accuracy"],
                self.config.warmup_accuracy,
            )
        return metrics | {"steps": float(done), "tokens_trained": tokens, "skipped": skipped}

    def update(self, rollouts: pa.Table, demonstrations: pa.Table, step: int) -> dict[str, float]:
        """The discriminator's steps that go with one policy step: as many as the health gate allows.

        Args:
            rollouts: what the steps draw from, in whole prompt groups: fresh rollouts, with replay mixed in.
            demonstrations: all training demonstrations.
            step: the policy step; the draw depends on it.

        Returns:
            Means over the steps of loss, accuracies, scores, margin, saturation, grad_norm, skipped; their
            sum of `tokens_trained` (prompts once a step, and responses); `steps` and `health` (-1 boost, 0
            train, 1 slow, 2 paused), with `health.pause_policy` also `policy_factor`, which the policy's next
            learning rate is multiplied by. Only the last three when there was no step; `steps` = 0 alone with
            `frozen`.
        """
        if self.config.frozen:
            return {"steps": 0.0}
        allowed = self.gate.allowed_steps()
        history = [
            self._train(rollouts.take(rows), demonstrations, step, number)
            for number, rows in enumerate(self._plan(rollouts, allowed, step))
        ]
        means = {name: float(np.mean([h[name] for h in history])) for name in history[0]} if history else {}
        if history:
            means["tokens_trained"] = sum(h["tokens_trained"] for h in history)
        said = {"steps": float(len(history)), "health": HEALTH_LEVEL[self.gate.state]}
        if self.config.health.pause_policy:
            said["policy_factor"] = self.gate.policy_factor()
        return means | said

    def evaluate(self, heldout: pa.Table, rollouts: pa.Table, step: int) -> dict[str, float]:
        """Judge held-out demonstrations against fresh rollouts, and (unless `frozen`) tell the health gate.

        Returns:
            accuracy (balanced), accuracy_demonstration, accuracy_rollout, score_demonstration, score_rollout,
            margin, saturation, and calibration: the expected calibration error of D over ten equal bins (Guo
            et al. 2017, eq. 3) with both sides weighing half.
        """
        metrics = self._evaluate(heldout, rollouts)
        if self.config.frozen:
            return metrics
        reading = HealthReading(metrics["accuracy"], metrics["margin"], metrics["saturation"])
        changes = self.gate.observe(step, reading)
        for change in changes:
            log.info(
                "%s: %s -> %s at step %d: %s", change.side, change.before, change.after, step, change.reason
            )
        self._untold += changes
        return metrics

    def take_transitions(self) -> list[dict[str, Any]]:
        """The health gate's transitions since the last call (JSON types: step, before, after, reason, side);
        the same on every rank."""
        told, self._untold = self._untold, []
        return [asdict(t) | {"before": t.before.value, "after": t.after.value} for t in told]

    def scores(self, table: pa.Table) -> list[float]:
        """Sequence score of every row under the weights in training; the same on every rank."""
        return self._sequence_scores(self.canonical.encode_table(table)).tolist()

    @property
    def changed(self) -> bool:
        """Whether there were updates since the last `publish`; the same on every rank."""
        return self.trainable.updates != self._published_updates

    def publish(self) -> Published | None:
        """The current weights as a version; collective. Rank 0 gets it, the others None.

        The version number grows by one when there were updates since the last call, and stays otherwise.
        Raises FloatingPointError for weights that are not finite.
        """
        self.trainable.require_finite()
        if self.changed:
            self.version += 1
            self._published_updates = self.trainable.updates
        state: dict[str, Tensor] = {}
        for weight in lora.plain_weights(self.module):
            with self.trainable.gathered(weight.sources()):
                if self.trainable.rank == 0:
                    state[weight.name] = weight.value().to("cpu", copy=True).contiguous()
        if self.trainable.rank != 0:
            return None
        return Published(self.version, state, state_checksum(state))

    def save(self, folder: Path | str) -> None:
        """Write everything needed to continue exactly; all ranks together."""
        folder = Path(folder)
        self.trainable.save(folder)
        if self.trainable.rank == 0:
            state = {
                "version": self.version,
                "published_updates": self._published_updates,
                "gate": self.gate.state_dict(),
            }
            (folder / "discriminator.json").write_text(json.dumps(state))
        torch.distributed.barrier()

    def load(self, folder: Path | str) -> None:
        """Continue from `save`; all ranks together."""
        folder = Path(folder)
        state = read_json(folder / "discriminator.json")
        self.trainable.load(folder)
        self.version = state["version"]
        self._published_updates = state["published_updates"]
        self.gate.load_state_dict(state["gate"])

    def _train(
        self, rollouts: pa.Table, demonstrations: pa.Table, step: int, number: int
    ) -> dict[str, float]:
        """One optimizer update on these rollouts and demonstrations drawn for them."""
        config = self.config
        rng = np.random.default_rng([self.seed, step + 1, number, 1])
        chosen = self._draw_demonstrations(rollouts, demonstrations, rng)
        tables = [chosen, rollouts]
        if added := round(config.perturbed_fraction * rollouts.num_rows):
            tables.append(perturbed(chosen, added, np.random.default_rng([self.seed, step + 1, number, 2])))
        encoded = [item for table in tables for item in self._encode(table)]
        rows, metrics = self._rows(tables, encoded)
        rows = rows.to(self.trainable.device)
        groups = group_encoded(encoded)
        tokens = sum(len(g.prompt) + sum(len(answer) for answer in g.responses) for g in groups)
        batches = [batch.to(self.trainable.device) for batch in self._batches(groups)]
        # Dropout draws from the global generator: seeded by the step, a resumed run draws the same.
        dropout_seed = int(rng.integers(2**31)) + self.trainable.rank
        if needs_first_pass(config):
            objective = self._objective(rows, batches, dropout_seed)
        else:
            objective = Objective(config, rows)
        torch.manual_seed(dropout_seed)
        trained = self.trainable.step(batches, objective)
        known = {name: float(value) for name, value in objective.metrics.items()}
        return trained | known | metrics | {"tokens_trained": float(tokens)}

    def _objective(self, rows: StepRows, batches: list[PackedBatch], dropout_seed: int) -> Objective:
        """The step's objective after a first pass with the dropout that the step itself will draw."""
        torch.manual_seed(dropout_seed)
        self.trainable.engine.train()
        sequence, values = self._pass(batches, len(rows.weight))
        return Objective(self.config, rows, sequence=sequence, values=values)

    def _rows(self, tables: list[pa.Table], encoded: list[Encoded]) -> tuple[StepRows, dict[str, float]]:
        """Sides, prompts and weights of a step's demonstrations, rollouts and perturbed demonstrations."""
        number = torch.arange(len(encoded))
        is_demonstration = number < tables[0].num_rows
        extra = number >= tables[0].num_rows + tables[1].num_rows
        prompt = numbered([key for table in tables for key in table["prompt_id"].to_pylist()])
        if not self.config.length_matched:
            return step_rows(is_demonstration, prompt, perturbed=extra), {}
        weight, overlap = length_matched_weights(
            [len(e.response_ids) for e in encoded], is_demonstration.numpy(), self.config.length_bins
        )
        if overlap == 0:
            log.warning("no length occurs on both sides of a discriminator step: lengths are not matched")
        matched = step_rows(is_demonstration, prompt, weight=torch.from_numpy(weight), perturbed=extra)
        return matched, {"length_overlap": overlap}

    def _plan(self, rollouts: pa.Table, steps: int, step: int) -> list[NDArray[np.int64]]:
        """Rows of each step's rollouts."""
        if steps == 0:
            return []
        if rollouts.num_rows == 0:
            raise ValueError(f"step {step}: the discriminator was given no rollouts")
        rng = np.random.default_rng([self.seed, step + 1, 0])
        return rollout_batches(rollouts, steps, self.config.batch_size, rng)

    def _draw_demonstrations(
        self, rollouts: pa.Table, demonstrations: pa.Table, rng: np.random.Generator
    ) -> pa.Table:
        if demonstrations.num_rows == 0:
            raise ValueError("the discriminator was given no demonstrations")
        paired, at_least = self.config.pair_demonstrations, self.config.min_demonstrations
        return demonstrations.take(
            demonstration_rows(rollouts, demonstrations, paired=paired, at_least=at_least, rng=rng)
        )

    def _encode(self, table: pa.Table) -> list[Encoded]:
        missing = [name for name in JUDGED_COLUMNS if name not in table.column_names]
        if missing:
            raise ValueError(f"a table for the discriminator lacks the columns {missing}")
        return self.canonical.encode_table(table)

    def _batches(self, groups: list[Group]) -> list[PackedBatch]:
        """This rank's micro-batches, as many as on every other rank."""
        config = self.config
        packed = [
            batches_of(
                share,
                self.kind,
                packing=config.packing,
                pack_length=config.pack_length,
                micro_batch_tokens=config.micro_batch_tokens,
            )
            for share in split_for_ranks(groups, self.trainable.ranks)
        ]
        return pad_batches(packed[self.trainable.rank], max(len(p) for p in packed))

    def _evaluate(self, heldout: pa.Table, rollouts: pa.Table) -> dict[str, float]:
        demonstrations, samples = self._some(heldout), self._some(rollouts)
        encoded = self._encode(demonstrations) + self._encode(samples)
        is_demonstration = torch.arange(len(encoded)) < demonstrations.num_rows
        sequence = self._sequence_scores(encoded)
        prompt = numbered(demonstrations["prompt_id"].to_pylist() + samples["prompt_id"].to_pylist())
        finite = torch.isfinite(sequence)
        is_demonstration, sequence, prompt = is_demonstration[finite], sequence[finite], prompt[finite]
        if not finite.all():
            log.warning("%d of %d held-out scores are not finite and left out", (~finite).sum(), len(finite))
            if is_demonstration.all() or not is_demonstration.any():
                raise FloatingPointError("no held-out score of one of the two sides is finite")
        weight = balanced_weights(is_demonstration)
        judged = judged_metrics(self.config.loss, sequence, is_demonstration, weight, prompt)
        metrics = {name: float(v) for name, v in judged.items()}
        error = calibration(self.config.loss, sequence, is_demonstration, weight, prompt)
        return metrics | {"calibration": error}

    def _some(self, table: pa.Table) -> pa.Table:
        """At most `heldout_size` rows, the same ones every time."""
        order = np.random.default_rng(self.seed).permutation(table.num_rows)[: self.config.heldout_size]
        return table.take(np.sort(order))

    def _sequence_scores(self, encoded: list[Encoded]) -> Tensor:
        """[len(encoded)] fp32 on the CPU, gathered from all ranks."""
        self.trainable.engine.eval()
        batches = [batch.to(self.trainable.device) for batch in self._batches(group_encoded(encoded))]
        return self._pass(batches, len(encoded))[0].cpu()

    @torch.no_grad()
    def _pass(self, batches: list[PackedBatch], count: int) -> Tensor:
        """[2, count] fp32, gathered from all ranks: sequence scores and `response_values`, in the engine's
        present mode."""
        out = torch.zeros(2, count, device=self.trainable.device)
        for batch in batches:
            scores = self.trainable.engine(batch)
            response, last = responses_in(batch)
            values = response_values(scores, response, last, level=self.config.level)
            real = batch.weight[last] > 0
            out[:, batch.trajectory[last][real]] = torch.stack([scores[last], values])[:, real]
        torch.distributed.all_reduce(out)
        return out
