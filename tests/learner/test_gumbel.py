"""Straight-through Gumbel-Softmax: what is drawn, and the gradient of what is drawn."""

import numpy as np
import pytest
import torch
from linear_judge import ENDS, LinearJudge
from scipy.stats import chisquare
from transformers import AutoModelForCausalLM

from learner.batching import make_batches
from learner.config import GumbelConfig, LearnerConfig
from learner.drawing import draw_responses
from learner.gumbel import OBJECTIVES, SOFT, GumbelModel, SoftBatch, gumbel_noise, relaxed, tau_at
from learner.packing import Group

CPU = torch.device("cpu")
TEMPERATURE = 0.7
TAU = 0.6
SEED = (5, 2)


@pytest.fixture
def model(tiny_model):
    net = AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation="sdpa")
    return GumbelModel(net, temperature=TEMPERATURE, chunk=1000)


def prompts(lengths=(4, 9, 6), seed=0):
    rng = np.random.default_rng(seed)
    return [(number, rng.integers(8, 300, n)) for number, n in enumerate(lengths)]


def drawn(model, some, *, samples=3, max_tokens=6, end_ids=ENDS, budget=10**6):
    return draw_responses(
        model, some, samples=samples, max_tokens=max_tokens, end_ids=end_ids, seed=SEED, budget=budget
    )


def soft_batches(prompt_ids, responses, samples, table, **cfg):
    """Soft batches of groups of responses, with the numbers their noise has."""
    groups, starts, number, place, flat = [], 0, [], [], 0
    for (n, prompt), several in zip(prompt_ids, responses, strict=True):
        offsets = flat + np.cumsum([0, *map(len, several)])
        rows = np.arange(starts, starts + len(several))
        groups.append(Group(prompt, several, offsets[:-1], rows))
        flat, starts = int(offsets[-1]), starts + len(several)
        for j, ids in enumerate(several):
            number += [n * samples + j] * len(ids)
            place += range(len(ids))
    keys = {"sample": torch.tensor(number), "place": torch.tensor(place)}
    batches = [b.with_columns(**keys) for b in make_batches(groups, LearnerConfig(**cfg))]
    return [SoftBatch(b, b, torch.arange(len(b.flat)), table, SEED, TAU) for b in batches]


def plain_logits(model, prompt, response):
    """[T, V] logits over the sampling temperature by a forward pass without packing or cache."""
    ids = torch.tensor([[*prompt.tolist(), *response.tolist()]])
    return model.model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1] / TEMPERATURE


def noise_rows(number, length, vocabulary):
    return torch.stack([gumbel_noise((*SEED, number, t), vocabulary, CPU) for t in range(length)])


def straight_through(logits, noise, tau=TAU):
    """onehot(argmax) + s - stopgrad(s), written out."""
    soft = torch.softmax((logits + noise) / tau, -1)
    hard = torch.nn.functional.one_hot((logits + noise).argmax(-1), logits.shape[-1]).to(soft.dtype)
    return hard + soft - soft.detach()


def gradients(model):
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def assert_close(actual, expected):
    assert actual.keys() == expected.keys()
    scale = max(float(g.abs().max()) for g in expected.values())
    assert scale > 0
    for name, want in expected.items():
        torch.testing.assert_close(
            actual[name], want, atol=2e-5 * scale, rtol=1e-4, msg=lambda m, n=name: n + m
        )


def test_gumbel_max_samples_the_softmax():
    logits = torch.tensor([1.0, -0.5, 0.3, 2.0, -2.0, 0.0])
    rows = torch.stack([gumbel_noise((1, 0, n, 0), 6, CPU) for n in range(6000)])
    counts = torch.bincount((logits + rows).argmax(-1), minlength=6).numpy()
    expected = torch.softmax(logits, 0).double().numpy()
    assert chisquare(counts, 6000 * expected / expected.sum()).pvalue > 0.01
    assert chisquare(counts, np.full(6, 1000.0)).pvalue < 1e-6, "the test can tell another distribution"
    assert float(rows.mean()) == pytest.approx(0.5772, abs=0.02)
    assert float(rows.var()) == pytest.approx(np.pi**2 / 6, rel=0.03)


def test_noise_is_a_function_of_its_key():
    once, again = gumbel_noise((3, 1, 4, 1), 50, CPU), gumbel_noise((3, 1, 4, 1), 50, CPU)
    assert torch.equal(once, again)
    for other in [(4, 1, 4, 1), (3, 0, 4, 1), (3, 1, 5, 1), (3, 1, 4, 2), (-3, 1, 4, 1)]:
        assert abs(float(torch.corrcoef(torch.stack([once, gumbel_noise(other, 50, CPU)]))[0, 1])) < 0.5


def test_relaxations_approach_the_hard_sample():
    logits, noise = torch.tensor([0.5, 0.1, -1.0]), torch.tensor([0.0, 1.0, 0.3])
    torch.testing.assert_close(relaxed(logits, noise, 1.0), torch.softmax(torch.tensor([0.5, 1.1, -0.7]), 0))
    assert relaxed(logits, noise, 0.01)[1] > 0.999
    torch.testing.assert_close(relaxed(logits, noise, 1e6), torch.full((3,), 1 / 3), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("schedule", "half", "end"), [("constant", 2.0, 2.0), ("linear", 1.25, 0.5), ("exponential", 1.0, 0.5)]
)
def test_temperature_follows_its_schedule(schedule, half, end):
    cfg = GumbelConfig(schedule=schedule, tau_start=2.0, tau_end=0.5, tau_steps=10)
    assert [tau_at(cfg, step) for step in (0, 5, 10, 99)] == pytest.approx([2.0, half, end, end])


def test_a_schedule_needs_its_length():
    with pytest.raises(ValueError, match="needs tau_steps"):
        tau_at(GumbelConfig(), 0)


def test_objectives_are_the_rewards_of_their_names():
    score = torch.linspace(-6, 6, 25)
    d = torch.sigmoid(score)
    expected = {"neg_log_one_minus_d": -(1 - d).log(), "log_d": d.log(), "logit": score, "prob": d}
    for name, want in expected.items():
        torch.testing.assert_close(OBJECTIVES[name](score), want, atol=1e-4, rtol=1e-4)


def test_drawing_is_argmax_of_logits_plus_noise_at_every_position(model):
    """The slow recursion: a whole forward pass for each token, one response at a time."""
    found = drawn(model, prompts())
    for (number, prompt), several in zip(prompts(), found, strict=True):
        for j, response in enumerate(several):
            ids = torch.zeros(0, dtype=torch.int64)
            ended = False
            while len(ids) < 6 and not ended:
                row = torch.cat([torch.from_numpy(prompt), ids])[None]
                with torch.no_grad():
                    logits = model.model(row, use_cache=False).logits[0, -1] / TEMPERATURE
                noise = gumbel_noise((*SEED, 3 * number + j, len(ids)), len(logits), CPU)
                ids = torch.cat([ids, (logits + noise).argmax()[None]])
                ended = int(ids[-1]) in ENDS
            assert response.ids.tolist() == ids.tolist()
            assert response.ended == ended
    flat = [response for several in found for response in several]
    assert {r.ended for r in flat} == {True, False}, "both kinds of end are part of the test"
    assert len({len(r.ids) for r in flat}) > 2


def test_what_is_drawn_depends_on_nothing_else(model):
    together = drawn(model, prompts())
    alone = [drawn(model, [one])[0] for one in prompts()]
    small = drawn(model, prompts(), budget=1)
    for want, *others in zip(together, alone, small, strict=True):
        for other in others:
            assert [r.ids.tolist() for r in want] == [r.ids.tolist() for r in other]
    assert model.model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("cfg", [{}, {"packing": False}, {"pack_length": 16, "micro_batch_tokens": 16}])
@pytest.mark.parametrize("chunk", [1000, 4])
def test_rows_have_hard_values_and_soft_gradients(model, cfg, chunk):
    """Values and gradients of the chunked function equal the straight-through rows written out."""
    model.chunk, model.packing = chunk, cfg.get("packing", True)
    judge = LinearJudge(model.head.weight.shape[0])
    responses = [[r.ids for r in several] for several in drawn(model, prompts())]
    weights = torch.randn(sum(len(r) for several in responses for r in several), judge.embedding.shape[1])
    for batch in soft_batches(prompts(), responses, 3, judge.table(), **cfg):
        rows = model(batch)
        torch.testing.assert_close(rows, judge.table()[batch.policy.target], rtol=0, atol=0)
        (rows * weights[batch.policy.flat]).sum().backward()
    actual, tally = gradients(model), model.tally.clone()
    total, start, squares = 0.0, 0, 0.0
    for (number, prompt), several in zip(prompts(), responses, strict=True):
        for j, response in enumerate(several):
            logits = plain_logits(model, prompt, torch.from_numpy(response))
            rows = straight_through(logits, noise_rows(3 * number + j, len(response), logits.shape[1]))
            assert rows.argmax(-1).tolist() == response.tolist(), "the second pass draws what was drawn"
            values = rows @ judge.table()
            total = total + (values * weights[start : start + len(response)]).sum()
            slope = torch.autograd.grad(
                (values * weights[start : start + len(response)]).sum(), logits, retain_graph=True
            )[0]
            squares += float((slope @ model.head.weight / TEMPERATURE).detach().square().sum())
            start += len(response)
    total.backward()
    assert_close(actual, gradients(model))
    assert float(tally[SOFT]) == pytest.approx(squares, rel=1e-4)
    assert float(tally.sum() - tally[SOFT]) == 0, "no mismatch, and no policy gradient"


def test_the_gradient_of_a_linear_judge_has_a_closed_form(model):
    """With score sum_t b[y_t], b = table @ direction: d / d logits_t = s_t (b - <s_t, b>) / tau."""
    judge = LinearJudge(model.head.weight.shape[0])
    ((number, prompt),) = prompts((5,))
    response = drawn(model, [(number, prompt)], samples=1)[0][0].ids
    (batch,) = soft_batches([(number, prompt)], [[response]], 1, judge.table())
    (score,) = judge.scores(batch.judged, model(batch))[-1:]
    b = judge.token_scores()
    assert float(score.detach()) == pytest.approx(float(b[torch.from_numpy(response)].sum()), rel=1e-4)
    score.backward()
    actual = gradients(model)
    logits = plain_logits(model, prompt, torch.from_numpy(response))
    soft = torch.softmax((logits + noise_rows(0, len(response), len(b))) / TAU, -1).detach()
    logits.backward(soft * (b - soft @ b[:, None]) / TAU)
    assert_close(actual, gradients(model))


def test_two_passes_equal_the_recursion_that_forms_rows_as_it_draws(model):
    """Same values; the same gradient when the recursion feeds its tokens back detached, and another one when
    it differentiates through them: that path is the one left out."""
    judge = LinearJudge(model.head.weight.shape[0])
    ((number, prompt),) = prompts((5,))
    response = drawn(model, [(number, prompt)], samples=1)[0][0].ids
    (batch,) = soft_batches([(number, prompt)], [[response]], 1, judge.table())
    two_pass = model(batch)
    judge.scores(batch.judged, two_pass)[-1].backward()
    kept = gradients(model)
    found = {}
    for through_the_past in (False, True):
        embed = model.model.get_input_embeddings()
        past, rows = embed(torch.from_numpy(prompt))[None], []
        for t in range(len(response)):
            logits = model.model(inputs_embeds=past, use_cache=False).logits[0, -1] / TEMPERATURE
            row = straight_through(logits, gumbel_noise((*SEED, 0, t), len(logits), CPU))
            rows.append(row)
            token = row @ embed.weight if through_the_past else embed(row.argmax())
            past = torch.cat([past, token[None, None]], 1)
        recursion = torch.stack(rows) @ judge.table()
        torch.testing.assert_close(recursion, two_pass.detach(), atol=1e-5, rtol=1e-5)
        (recursion @ judge.direction.detach()).sum().backward()
        found[through_the_past] = gradients(model)
    assert_close(kept, found[False])
    apart = [float((kept[n] - g).norm()) for n, g in found[True].items()]
    assert max(apart) > 0.05 * max(float(g.norm()) for g in kept.values())
