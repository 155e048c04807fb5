"""Shortcut audit: planted artefacts are named, honest differences are reported, equal sides stay silent."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from scipy.stats import norm
from transformers import AutoTokenizer

from discriminator.audit import AuditReport, audit
from discriminator.audit_config import AuditConfig
from discriminator.canonical import Canonicaliser
from discriminator.config import CanonicalConfig
from discriminator.probes import PROBES, balanced_accuracy, canonical_responses, raw_responses, separate

WORDS = [
    "the",
    "cat",
    "sat",
    "mat",
    "and",
    "dog",
    "lay",
    "by",
    "a",
    "small",
    "tool",
    "reads",
    "mail",
    "news",
    "of",
    "day",
]
CONFIG = AuditConfig(base_samples=120, absent_from=120)
N = 120

Spell = Callable[[str, list[int]], tuple[str, list[int]]]


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path):
    return AutoTokenizer.from_pretrained(tiny_model)


def sentences(seed: int, low: int = 4, high: int = 9, count: int = N) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, size=rng.integers(low, high))) + "." for _ in range(count)]


def side(tokenizer, texts: Sequence[str], spell: Spell | None = None, cut: Sequence[bool] = ()) -> pa.Table:
    """Judged columns and ids; `spell` plants an artefact into text and ids (end token included)."""
    rows = []
    for index, text in enumerate(texts):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        whole = not (cut and cut[index])
        ids = [*ids, tokenizer.eos_token_id] if whole else ids
        text, ids = spell(text, ids) if spell else (text, ids)
        name = f"p{index // 2}"
        reason = "stop" if whole else "length"
        rows.append((name, f"say {name}: ", text, ids, reason))
    names = ("prompt_id", "prompt_text", "response_text", "response_ids", "finish_reason")
    return pa.table({name: list(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)})


def audited(tokenizer, human: pa.Table, model: pa.Table, *, on: bool, config=CONFIG) -> AuditReport:
    canonical = Canonicaliser(tokenizer, CanonicalConfig(), context=256)
    raw = tuple(raw_responses(table, tokenizer, tokenizer.eos_token_id) for table in (human, model))
    spelled = tuple(canonical_responses(table, canonical) for table in (human, model))
    return audit(raw, spelled, canonicalisation=on, config=config)


def trailing_token(tokenizer, text: str, ids: list[int]) -> tuple[str, list[int]]:
    return text, [*ids[:-1], tokenizer.convert_tokens_to_ids("<|system|>"), ids[-1]]


def missing_end(tokenizer, text: str, ids: list[int]) -> tuple[str, list[int]]:
    return text, ids[:-1]


def other_tokens(tokenizer, text: str, ids: list[int]) -> tuple[str, list[int]]:
    letters = [i for char in text for i in tokenizer(char, add_special_tokens=False)["input_ids"]]
    return text, [*letters, ids[-1]]


def leading_space(tokenizer, text: str, ids: list[int]) -> tuple[str, list[int]]:
    return f" {text}", [*tokenizer(f" {text}", add_special_tokens=False)["input_ids"], ids[-1]]


@pytest.mark.parametrize(
    ("artefact", "cue", "seen"),
    [
        (trailing_token, "last token", "<|system|>"),
        (missing_end, "end token", "without"),
        (other_tokens, "tokenisation", "differ"),
        (leading_space, "outer whitespace", "leading ' '"),
    ],
)
def test_a_planted_artefact_is_refused_unless_canonicalisation_removes_it(
    tokenizer, artefact, cue, seen
) -> None:
    human = side(tokenizer, sentences(0), partial(artefact, tokenizer))
    model = side(tokenizer, sentences(1))
    off = audited(tokenizer, human, model, on=False)
    (finding,) = off.refused
    assert finding.cue == cue
    assert finding.accuracy > 0.95
    assert seen in finding.demonstrations[0]
    assert not any(seen in value for value in finding.rollouts)
    assert "canonicalisation is off" in finding.explanation
    assert finding.remedy
    on = audited(tokenizer, human, model, on=True)
    assert not on.refused
    assert abs(on.canonical[cue].accuracy - 0.5) < 0.1
    (same,) = (found for found in on.findings if found.cue == cue)
    assert same.verdict == "report"
    assert "canonicalisation removes it" in same.explanation


def test_a_mark_that_the_policy_never_makes_is_refused_whatever_the_guard(tokenizer) -> None:
    human, model = side(tokenizer, [f"{text} §" for text in sentences(0)]), side(tokenizer, sentences(1))
    for on in (True, False):
        refused = audited(tokenizer, human, model, on=on).refused
        assert {finding.cue for finding in refused} == {"last character", "last token"}
        assert "0 of 120" in refused[0].explanation
    wanted = CONFIG.model_copy(update={"absent_from": 121})
    few = audited(tokenizer, human, model, on=True, config=wanted)
    assert not few.refused
    assert any("too few (< 121)" in finding.explanation for finding in few.findings)
    lenient = CONFIG.model_copy(update={"refuse": False})
    assert not audited(tokenizer, human, model, on=True, config=lenient).refused
    texts = sentences(1)
    texts[7] += " §"
    once = audited(tokenizer, human, side(tokenizer, texts), on=True)
    assert not once.refused
    assert "last character" in {finding.cue for finding in once.findings}


def test_a_mark_on_some_demonstrations_is_told_though_not_refused(tokenizer) -> None:
    """Two in five end with a sign that no sample shows; the rest as the samples do."""
    texts = [f"{text} §" if index % 5 < 2 else text for index, text in enumerate(sentences(0))]
    human, model = side(tokenizer, texts), side(tokenizer, sentences(1))
    report = audited(tokenizer, human, model, on=True)
    assert not report.refused
    (finding,) = (found for found in report.findings if found.cue == "last character")
    assert "40% of the demonstrations show: '§'; 0 of 120 samples of the policy do" in finding.explanation
    strict = CONFIG.model_copy(update={"dominant_share": 0.4})
    refused = audited(tokenizer, human, model, on=True, config=strict).refused
    assert "last character" in {found.cue for found in refused}


@pytest.mark.parametrize("on", [True, False])
def test_length_case_and_punctuation_are_the_task(tokenizer, on: bool) -> None:
    model = side(tokenizer, [text[:-1] for text in sentences(1, 10, 14)])
    longer = audited(tokenizer, side(tokenizer, [text[:-1] for text in sentences(0, 13, 18)]), model, on=on)
    assert [finding.cue for finding in longer.findings] == ["length"]
    assert longer.findings[0].accuracy > 0.8
    assert not longer.refused
    loud = [text.upper().replace(" ", ", ") for text in sentences(0, 10, 14)]
    report = audited(tokenizer, side(tokenizer, loud), model, on=on, config=CONFIG)
    classes = next(finding for finding in report.findings if finding.cue == "character classes")
    assert classes.verdict == "report"
    assert classes.accuracy > 0.95
    assert "upper" in classes.demonstrations[0]


def test_truncated_rollouts_are_named_as_such_and_nothing_else(tokenizer) -> None:
    cut = [index % 2 == 0 for index in range(N)]
    human, model = side(tokenizer, sentences(0)), side(tokenizer, sentences(1), cut=cut)
    report = audited(tokenizer, human, model, on=True)
    assert [(finding.cue, finding.verdict) for finding in report.findings] == [("truncation", "report")]
    assert report.findings[0].accuracy == pytest.approx(0.75)
    never = audited(tokenizer, human, side(tokenizer, sentences(1), cut=[True] * N), on=True)
    assert [finding.cue for finding in never.refused] == ["truncation"]
    assert "sampling.max_tokens" in never.refused[0].remedy


def test_equal_sides_name_nothing(tokenizer) -> None:
    """12 audits of 22 intervals each: at 5 % per audit, three or more false ones come by once in 50."""
    false = 0
    for seed in range(12):
        human, model = (side(tokenizer, sentences(1000 * part + seed)) for part in (1, 2))
        false += bool(audited(tokenizer, human, model, on=True).findings)
    assert false <= 2


def test_report_lists_every_cue_and_its_examples(tokenizer) -> None:
    human = side(tokenizer, sentences(0), partial(leading_space, tokenizer))
    report = audited(tokenizer, human, side(tokenizer, sentences(1)), on=False)
    lines = report.lines()
    assert lines[0].startswith("shortcut audit: refuse: outer whitespace: balanced accuracy 1.000")
    assert lines[1] == "    demonstrations: leading ' ' (100%)"
    assert lines[2] == "    rollouts: none (100%)"
    text = report.markdown()
    assert all(f"| {probe.cue} |" in text for probe in PROBES)
    assert "| refuse |" in text
    metrics = report.metrics()
    assert metrics["outer_whitespace"] == metrics["max"] == 1.0
    assert set(metrics) == {probe.cue.replace(" ", "_") for probe in PROBES} | {"max"}
    equal = audited(tokenizer, human, human, on=True)
    assert equal.lines() == ["shortcut audit: no cue tells demonstrations from 120 rollouts"]


def test_a_probe_never_sees_the_prompt_it_is_tested_on(tokenizer) -> None:
    """Each prompt ends its answers with a character of its own on one random side."""
    rng = np.random.default_rng(3)
    human, model = sentences(0), sentences(1)
    for prompt in range(N // 2):
        texts = human if rng.random() < 0.5 else model
        for row in (2 * prompt, 2 * prompt + 1):
            texts[row] += chr(0x4E00 + prompt)
    pair = [
        raw_responses(side(tokenizer, texts), tokenizer, tokenizer.eos_token_id) for texts in (human, model)
    ]
    probe = next(probe for probe in PROBES if probe.cue == "last character")
    found = separate(probe, *pair)
    assert found is not None
    assert found.accuracy < 0.6
    assert separate(probe, pair[0][:6], pair[1]) is None  # three prompts are no ground for folds


def test_interval_against_the_normal_approximation() -> None:
    """Independent answers, 3 to 1: the width of the mean of two proportions; answers that agree within a
    prompt count once."""
    rng = np.random.default_rng(0)
    labels = np.repeat([1, 0], [1200, 400])
    hits = (rng.random(1600) < np.where(labels == 1, 0.8, 0.6)).astype(float)
    a, b = hits[:1200].mean(), hits[1200:].mean()
    accuracy, low, high = balanced_accuracy(hits, labels, np.arange(1600))
    assert accuracy == pytest.approx((a + b) / 2)
    expected = norm.ppf(0.975) * np.sqrt(a * (1 - a) / 1200 + b * (1 - b) / 400)
    assert high - low == pytest.approx(expected, rel=0.02)
    double = balanced_accuracy(np.repeat(hits, 2), np.repeat(labels, 2), np.repeat(np.arange(1600), 2))
    assert double == pytest.approx((accuracy, low, high), abs=1e-9)
    sure = balanced_accuracy(np.ones(80), np.repeat([1, 0], 40), np.arange(80))
    assert sure[0] == sure[2] == 1.0
    assert 0.85 < sure[1] < 0.97
    widths = [
        np.subtract(*balanced_accuracy(hits, labels, np.arange(1600), alpha)[:0:-1])
        for alpha in (0.2, 0.05, 0.01)
    ]
    assert all(narrow < wide for narrow, wide in pairwise(widths))
