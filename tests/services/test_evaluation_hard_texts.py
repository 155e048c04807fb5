"""Evaluation of texts that leave its instruments little to hold on to: all rows come, and all are finite."""

import math
import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score import rouge_scorer
from sacrebleu.metrics import BLEU

from services.evaluation import text_metrics
from services.evaluation.config import EvaluationConfig
from services.evaluation.evaluate import KEYS, evaluate_texts, human_row
from services.evaluation.monitors import evaluation_monitors

FAST = EvaluationConfig(bootstrap=100, self_bleu_texts=4)
TEXT = st.one_of(
    st.sampled_from(["", "a", "b", ".", "  ", "\x1b[31m", "\x02", "é", "東", "aa"]), st.text(max_size=6)
)
SIDE = st.lists(TEXT, min_size=8, max_size=12)


def measured(human: list[str], model: list[str], seen: list[str]) -> list[dict]:
    ids = [f"p{i}" for i in range(len(human))]
    return [
        evaluate_texts(ids, model, human, seen, 1.0, FAST),
        human_row(ids, human, seen, 1.0, FAST),
        evaluation_monitors(ids, model, human, seen),
    ]


def everything_is_finite(human: list[str], model: list[str], seen: list[str]) -> None:
    for row in measured(human, model, seen):
        numbers = {name: value for name, value in row.items() if isinstance(value, float)}
        assert all(math.isfinite(value) for value in numbers.values()), numbers
        assert KEYS[0] not in row or not set(KEYS) - set(row)


@pytest.mark.parametrize("letter", ["a", "", ".", "東"])
def test_answers_of_one_letter_are_measured(letter: str) -> None:
    human = [letter, "b", "c", "d"] * 5
    everything_is_finite(human, ["e"] * 20, ["a", "b"])
    everything_is_finite([letter] * 20, [letter] * 20, [letter])


@settings(max_examples=15, deadline=None)
@given(human=SIDE, model=SIDE, seen=st.lists(TEXT, min_size=1, max_size=5))
def test_any_texts_are_measured(human: list[str], model: list[str], seen: list[str]) -> None:
    count = min(len(human), len(model))
    everything_is_finite(human[:count], model[:count], seen)


@given(st.lists(st.sampled_from("abcd"), max_size=12), st.lists(st.sampled_from("abcde"), max_size=12))
def test_rouge_l_is_that_of_its_authors(one: list[str], two: list[str]) -> None:
    theirs = rouge_scorer.RougeScorer(["rougeL"]).score(" ".join(two), " ".join(one))["rougeL"].fmeasure
    assert text_metrics.rouge_l([" ".join(one)], [" ".join(two)]) == pytest.approx(theirs)


@given(st.lists(st.one_of(TEXT, st.text("abc .", max_size=16)), min_size=2, max_size=8))
def test_self_bleu_is_sacrebleus_of_each_text_against_the_others(texts: list[str]) -> None:
    bleu = BLEU(effective_order=True)
    each = [bleu.sentence_score(text, texts[:i] + texts[i + 1 :]).score for i, text in enumerate(texts)]
    assert text_metrics.self_bleu(texts) == pytest.approx(sum(each) / len(each), abs=1e-9)


def test_rouge_l_of_long_answers_takes_no_longer_than_reading_them() -> None:
    rng = random.Random(0)
    text = [" ".join(rng.choices("abcdefghij", k=4000)) for _ in range(2)]
    began = time.process_time()
    text_metrics.rouge_l(text[:1] * 5, text[1:] * 5)
    assert time.process_time() - began < 2.0
