"""The audit of a run: refuses before training, reports later, knows whether canonicalisation is on."""

import asyncio
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from transformers import AutoTokenizer

from discriminator.audit_config import AuditConfig
from discriminator.canonical import Canonicaliser
from discriminator.config import CanonicalConfig
from services.config import load
from services.watching.auditor import Auditor, ShortcutRefusal
from services.watching.watch import Watch

WORDS = ["the", "cat", "sat", "mat", "and", "dog", "lay", "by", "a", "small", "tool", "reads", "mail", "news"]
CONFIG = AuditConfig(base_samples=80, absent_from=80)


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path):
    return AutoTokenizer.from_pretrained(tiny_model)


def sentences(seed: int, count: int = 80) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, size=rng.integers(4, 9))) for _ in range(count)]


def prompts(count: int) -> dict[str, list[str]]:
    return {"prompt_id": [f"p{i}" for i in range(count)], "prompt_text": [f"say {i}: " for i in range(count)]}


def split(texts: list[str]) -> pa.Table:
    return pa.table({**prompts(len(texts)), "response": texts})


def trajectories(tokenizer, texts: list[str]) -> pa.Table:
    ids = [[*row, tokenizer.eos_token_id] for row in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    columns = {"response_text": texts, "response_ids": ids, "finish_reason": ["stop"] * len(texts)}
    return pa.table({**prompts(len(texts)), **columns})


def auditor(tokenizer, config: AuditConfig = CONFIG, max_tokens: int = 64, **canonical) -> Auditor:
    path = Canonicaliser(tokenizer, CanonicalConfig(**canonical), context=256)
    return Auditor(config, path, tokenizer, end_id=tokenizer.eos_token_id, max_tokens=max_tokens)


def test_leading_space_is_refused_without_canonicalisation_and_removed_with_it(tokenizer) -> None:
    human, samples = split([f" {text}" for text in sentences(0)]), trajectories(tokenizer, sentences(1))
    with pytest.raises(ShortcutRefusal) as refusal:
        auditor(tokenizer, whitespace="off").base(human, samples)
    text = str(refusal.value)
    assert "refuse: outer whitespace" in text
    assert "leading ' ' (100%)" in text
    assert "discriminator.audit.refuse" in text
    later = auditor(tokenizer, whitespace="off").policy(human, samples)
    assert not later.report.refused
    assert later.metrics["outer_whitespace"] == 1.0
    for whitespace in ("outer", "collapse"):
        found = auditor(tokenizer, whitespace=whitespace).base(human, samples)
        assert found.metrics["max"] < 0.65
        assert "outer whitespace" in {finding.cue for finding in found.report.findings}
        assert all("canonicalisation removes it" in finding.explanation for finding in found.report.findings)
        assert found.report.raw["outer whitespace"].accuracy == 1.0
    lenient = CONFIG.model_copy(update={"refuse": False})
    assert not auditor(tokenizer, lenient, whitespace="off").base(human, samples).report.refused


def test_what_the_discriminator_never_reads_is_no_reason_to_refuse(tokenizer) -> None:
    """Sampled ids are re-encoded even where whitespace stays: letter-by-letter sampling is only reported."""
    human, texts = split(sentences(0)), sentences(1)
    letters = [
        [i for char in text for i in tokenizer(char, add_special_tokens=False)["input_ids"]] for text in texts
    ]
    samples = trajectories(tokenizer, texts)
    spelled = pa.array([[*row, tokenizer.eos_token_id] for row in letters])
    samples = samples.set_column(samples.column_names.index("response_ids"), "response_ids", spelled)
    assert not auditor(tokenizer, whitespace="off").base(human, samples).report.findings
    cues = {finding.cue for finding in auditor(tokenizer).base(human, samples).report.findings}
    assert "tokenisation" in cues


def pairs(chosen: list[str], rejected: list[str]) -> pa.Table:
    return pa.table({**prompts(len(chosen)), "chosen": chosen, "rejected": rejected})


def test_preference_pairs_are_audited_side_against_side_and_never_refused(tokenizer) -> None:
    spaced = pairs([f" {text}" for text in sentences(0)], sentences(1))
    found = auditor(tokenizer, whitespace="off").pairs(spaced)
    assert not found.report.refused
    assert found.metrics["outer_whitespace"] == 1.0
    (finding,) = [finding for finding in found.report.findings if finding.cue == "outer whitespace"]
    assert "The reward model can tell the chosen answer by it" in finding.explanation
    assert "    chosen answers: leading ' ' (100%)" in found.notes
    assert "    rejected answers: none (100%)" in found.notes
    guarded = auditor(tokenizer).pairs(spaced)
    assert guarded.metrics["outer_whitespace"] == 0.5
    assert "canonicalisation removes it" in guarded.report.findings[0].explanation
    longer = auditor(tokenizer, max_tokens=10).pairs(pairs([f"{t} {t}" for t in sentences(0)], sentences(1)))
    assert {finding.cue for finding in longer.report.findings} == {"length", "truncation"}, (
        "cut like rollouts"
    )


def test_a_run_on_pairs_audits_them_and_asks_for_no_base_samples(tokenizer, tiny_model, tmp_path) -> None:
    """The demonstrations here would be refused, and no discriminator reads them."""
    config = load(
        None,
        [f"--policy.model={tiny_model}", "--data.demonstrations=d", f"--run.output={tmp_path}",
         "--run.method=rlhf", "--data.preferences=p", "--discriminator.canonical.whitespace=off"],
    )  # fmt: skip
    config.folder.mkdir()
    splits = SimpleNamespace(
        train=split([f" {text}" for text in sentences(0)]), preferences=pairs(sentences(2), sentences(3))
    )
    renderer = SimpleNamespace(tokenizer=tokenizer, end_id=tokenizer.eos_token_id)
    said: list[str] = []
    asyncio.run(Watch(config, SimpleNamespace(splits=splits, renderer=renderer)).begin(said.append))
    assert said[0] == "auditing the chosen answers of the preference pairs against the rejected ones"
    assert said[1:] == ["shortcut audit: no cue tells chosen answers from 80 rejected answers"]
    assert said[1] in (config.folder / "audit.md").read_text()


def test_demonstrations_are_cut_like_rollouts_and_to_as_many(tokenizer) -> None:
    long = [f"{a} {b} {c}" for a, b, c in zip(sentences(0), sentences(2), sentences(3), strict=True)]
    ids = tokenizer(long, add_special_tokens=False)["input_ids"]
    samples = trajectories(tokenizer, [tokenizer.decode(row[:10]) for row in ids])
    cut = pa.array([row[:10] for row in ids])
    samples = samples.set_column(samples.column_names.index("response_ids"), "response_ids", cut)
    ended = samples.column_names.index("finish_reason")
    samples = samples.set_column(ended, "finish_reason", pa.array(["length"] * 80))
    found = auditor(tokenizer, max_tokens=10).base(split(long), samples)
    assert found.report.canonical["truncation"].accuracy == pytest.approx(0.5)
    assert found.report.raw["truncation"].accuracy == 1.0
    few = auditor(tokenizer, AuditConfig(base_samples=40))
    assert few._some(split(long)).num_rows == 40
    assert few._some(split(long)).equals(few._some(split(long)))
