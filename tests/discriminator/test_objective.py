"""A step's objective in parts equals the plain formula on whole responses, one at a time, without packing."""

from pathlib import Path

import pytest
import torch
from judging import judged, small
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import softplus

from discriminator.config import DiscriminatorConfig
from discriminator.losses import POINTWISE
from discriminator.model import (
    Discriminator,
    batches_of,
    group_encoded,
    load_canonicaliser,
    load_discriminator,
    responses_in,
)
from discriminator.objective import Objective, StepRows, needs_first_pass, response_values, step_rows
from learner.packing import filler

TABLE = judged(
    [
        ("say 1: ", "the cat sat on the mat"),
        ("say 2: ", "the dog"),
        ("say 2: ", "the dog sat on the door"),
        ("say 1: ", "mat the on sat"),
        ("say 1: ", "a dog lay by the door and the cat"),
        ("say 3: ", "one big tool"),
    ]
)
SIDE = torch.tensor([True, True, True, False, False, False])
PROMPT = torch.tensor([1, 2, 2, 1, 1, 3])


def loaded(config: DiscriminatorConfig, model: Path) -> Discriminator:
    module = load_discriminator(config, str(model), device="cpu", dtype=torch.float32, seed=0)
    with torch.no_grad():
        module.head.weight.mul_(20)  # scores far enough from zero to tell the formulas apart
    return module.eval()


def gradient_in_parts(
    config: DiscriminatorConfig, module: Discriminator, rows: StepRows
) -> tuple[int, Tensor, dict[str, float]]:
    """Number of parts, flat gradient and metrics of the step, with a filler batch among its parts."""
    encoded = load_canonicaliser(config, module.body.config.name_or_path).encode_table(TABLE)
    batches = batches_of(
        group_encoded(encoded),
        "causal",
        packing=config.packing,
        pack_length=config.pack_length,
        micro_batch_tokens=config.micro_batch_tokens,
    )
    batches.append(filler())
    sequence, values = torch.zeros(len(SIDE)), torch.zeros(len(SIDE))
    if needs_first_pass(config):
        with torch.no_grad():
            for batch in batches[:-1]:
                scores, (response, last) = module(batch), responses_in(batch)
                sequence[batch.trajectory[last]] = scores[last]
                values[batch.trajectory[last]] = response_values(scores, response, last, level=config.level)
    objective = Objective(config, rows, sequence=sequence, values=values)
    module.zero_grad()
    sums: dict[str, float] = {}
    for batch in batches:
        out = objective(module, batch)
        out.loss.backward()
        for name, value in out.sums.items():
            sums[name] = sums.get(name, 0.0) + float(value)
    metrics = sums | {name: float(value) for name, value in objective.metrics.items()}
    return len(batches), flat_gradient(module), metrics


def flat_gradient(module: Discriminator) -> Tensor:
    return torch.cat([p.grad.flatten().clone() for p in module.parameters() if p.grad is not None])


def slow(config: DiscriminatorConfig, module: Discriminator, rows: StepRows) -> tuple[Tensor, Tensor, Tensor]:
    """Main loss, R1 term and gradient, by the formulas, every response a forward pass of its own."""
    canonical = load_canonicaliser(config, module.body.config.name_or_path)
    module.zero_grad()
    scores, values, penalties = [], [], []
    with sdpa_kernel(SDPBackend.MATH):
        for item in canonical.encode_table(TABLE):
            ids = torch.tensor([item.prompt_ids + item.response_ids])
            embedded = module.body.get_input_embeddings()(ids)
            if not embedded.requires_grad:
                embedded.requires_grad_()
            states = module.body(inputs_embeds=embedded, use_cache=False).last_hidden_state[0].float()
            normed = states / (states.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()
            row = module.gain * module.head.weight
            if config.spectral_norm is not None and row.norm() > config.spectral_norm:
                row = row * config.spectral_norm / row.norm()
            s = (normed @ row.T).squeeze(-1) + module.gain * module.head.bias
            begin = len(item.prompt_ids)
            scores.append(s[begin:])
            values.append(s[-1] if config.level == "sequence" else s[begin:].mean())
            (slope,) = torch.autograd.grad(values[-1], embedded, create_graph=True)
            penalties.append(slope[0, begin:].square().sum() / 2)
    weight, smooth = rows.weight, config.label_smoothing
    if config.loss == "bradley_terry":
        loss = torch.zeros(())
        for d in SIDE.nonzero()[:, 0].tolist():
            rivals = [r for r in range(len(SIDE)) if not SIDE[r] and PROMPT[r] == PROMPT[d] and weight[r] > 0]
            rivals = rivals or [r for r in range(len(SIDE)) if not SIDE[r]]
            total = sum(weight[r] for r in rivals)
            for r in rivals:
                ahead = values[d] - values[r]
                cost = (1 - smooth) * softplus(-ahead) + smooth * softplus(ahead)
                loss = loss + 2 * weight[d] * weight[r] / total * cost
    else:
        form = POINTWISE[config.loss]
        losses = [
            form(s if config.level == "token" else s[-1:], side.expand(1), smooth).mean()
            for s, side in zip(scores, SIDE, strict=True)
        ]
        loss = (weight * torch.stack(losses)).sum()
    r1 = sum(2 * weight[d] * penalties[d] for d in SIDE.nonzero()[:, 0].tolist())
    mean = sum(w * v for w, v in zip(weight, values, strict=True))
    (loss + config.gradient_penalty * r1 + config.score_centring * mean**2).backward()
    return loss.detach(), r1.detach(), flat_gradient(module)


CASES = [
    {"loss": "bce", "level": "token", "gradient_penalty": 0.7},
    {"loss": "hinge", "score_centring": 0.4, "reward": {"form": "logit"}},
    {
        "loss": "least_squares",
        "level": "token",
        "score_centring": 0.4,
        "spectral_norm": 0.5,
        "reward": {"form": "logit"},
    },
    {"loss": "wasserstein", "spectral_norm": 3.0, "gradient_penalty": 0.2, "reward": {"form": "logit"}},
    {"loss": "bradley_terry", "reward": {"form": "bradley_terry"}},
    {
        "loss": "bradley_terry",
        "level": "token",
        "label_smoothing": 0.1,
        "gradient_penalty": 0.3,
        "score_centring": 0.5,
        "reward": {"form": "relativistic"},
    },
    {"loss": "bce", "gradient_penalty": 0.7, "lora": {"rank": 2}},
]


@pytest.mark.parametrize("fields", CASES, ids=[f"{c['loss']}-{i}" for i, c in enumerate(CASES)])
def test_parts_of_a_step_have_the_gradient_of_the_formula(fields, tiny_model: Path) -> None:
    weight = torch.tensor([0.1, 0.25, 0.15, 0.2, 0.1, 0.2])
    rows = step_rows(SIDE, PROMPT, weight=weight)
    module = loaded(small(**fields), tiny_model)
    loss, r1, expected = slow(small(**fields), module, rows)
    for split in (
        {"micro_batch_tokens": 4096},
        {"pack_length": 24, "micro_batch_tokens": 24},
        {"packing": False},
    ):
        parts, gradient, metrics = gradient_in_parts(small(**fields, **split), module, rows)
        assert parts == 2 or split != {"micro_batch_tokens": 4096}
        # Relative to the whole: R1's gradients are large, and single entries of them mostly cancel.
        assert (gradient - expected).norm() < 1e-5 * expected.norm()
        assert (gradient - expected).abs().max() < 1e-5 * expected.abs().max()
        assert metrics["loss"] == pytest.approx(float(loss), abs=1e-5)
        if fields.get("gradient_penalty"):
            assert metrics["gradient_penalty"] == pytest.approx(float(r1), rel=1e-4)


def test_an_encoder_is_penalised_too(tiny_encoder: Path) -> None:
    """Directional derivative of the penalty: it grows with the head's square."""
    config = small(gradient_penalty=1.0, body="encoder")
    module = load_discriminator(config, str(tiny_encoder), device="cpu", dtype=torch.float32).eval()
    encoded = load_canonicaliser(config, str(tiny_encoder)).encode_table(TABLE)
    (batch,) = batches_of(
        group_encoded(encoded), "encoder", packing=False, pack_length=128, micro_batch_tokens=4096
    )
    objective = Objective(config, step_rows(SIDE, PROMPT))
    first = objective(module, batch).sums["gradient_penalty"]
    with torch.no_grad():
        module.head.weight.mul_(3)
    assert float(first) > 0
    torch.testing.assert_close(
        objective(module, batch).sums["gradient_penalty"], 9 * first, rtol=1e-4, atol=0
    )


def test_perturbed_rows_weigh_in_the_loss_and_not_in_the_metrics() -> None:
    rows = step_rows(SIDE, PROMPT, perturbed=torch.tensor([False] * 5 + [True]))
    torch.testing.assert_close(rows.weight, torch.full((6,), 1 / 6))
    torch.testing.assert_close(rows.counted, torch.tensor([1 / 6, 1 / 6, 1 / 6, 1 / 4, 1 / 4, 0.0]))


def test_a_first_pass_cannot_be_left_out() -> None:
    with pytest.raises(ValueError, match="first pass"):
        Objective(small(score_centring=0.1), step_rows(SIDE, PROMPT))
