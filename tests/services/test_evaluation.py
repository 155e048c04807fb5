"""Classifier two-sample test, text measures, coverage and rows, against closed forms and counts by hand."""

import math
from pathlib import Path

import numpy as np
import pytest

from discriminator.canonical import normalise
from discriminator.config import CanonicalConfig
from services.evaluation import text_metrics
from services.evaluation.c2st import assign_folds, c2st, human_floor, one_spelling, prompt_interval
from services.evaluation.config import EvaluationConfig
from services.evaluation.embed import Embedder, make_embedder
from services.evaluation.evaluate import KEYS, coverage, evaluate_texts, human_row, selection_key
from services.evaluation.monitors import evaluation_monitors

WORDS = [f"{a}{b}" for a in ("ka", "lo", "mi", "ru", "te", "va") for b in ("n", "s", "rt", "ll", "x", "d")]


def sentences(count: int, seed: int, words: list[str] = WORDS) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(words, size=rng.integers(4, 9))) for _ in range(count)]


IDS = [f"p{index}" for index in range(120)]
FAST = EvaluationConfig(bootstrap=200, self_bleu_texts=10)


def test_c2st_of_one_distribution_is_chance() -> None:
    inside = 0
    for seed in range(6):
        result = c2st(IDS, sentences(120, seed), sentences(120, 100 + seed), bootstrap=300, seed=seed)
        inside += result.low <= 0.5 <= result.high
        assert abs(result.accuracy - 0.5) < 0.15
    assert inside >= 5


def test_c2st_finds_a_rare_word_and_a_difference_in_length() -> None:
    human = sentences(120, 0)
    marked = [f"{text} zzz" for text in sentences(120, 1)]
    result = c2st(IDS, human, marked, bootstrap=200)
    assert result.accuracy > 0.97
    assert result.low > 0.9
    longer = [f"{a} {b}" for a, b in zip(sentences(120, 2), sentences(120, 3), strict=True)]
    assert c2st(IDS, human, longer, bootstrap=200).accuracy > 0.9


def test_c2st_headline_is_the_better_classifier() -> None:
    rng = np.random.default_rng(0)
    left, right = rng.normal(size=(120, 8)), rng.normal(size=(120, 8)) + 3
    result = c2st(
        IDS,
        sentences(120, 0),
        sentences(120, 1),
        first_embeddings=left,
        second_embeddings=right,
        bootstrap=200,
    )
    assert result.classifier == "embedding"
    assert result.accuracy == result.accuracies["embedding"] > 0.98 > result.accuracies["ngram"]


def test_c2st_never_sees_the_prompt_it_is_tested_on() -> None:
    """Each prompt has a word of its own on one random side, which separates any training fold."""
    rng = np.random.default_rng(5)
    first, second = sentences(120, 0), sentences(120, 1)
    for index in range(120):
        side = first if rng.random() < 0.5 else second
        side[index] += f" unique{index:03d}word"
    ids = [f"p{index // 2}" for index in range(120)]
    assert c2st(ids, first, second, bootstrap=200).accuracy < 0.65


def test_whitespace_is_not_a_clue() -> None:
    human = sentences(120, 0)
    result = c2st(IDS, human, [f" {text.replace(' ', '  ')}\n" for text in sentences(120, 1)], bootstrap=200)
    assert abs(result.accuracy - 0.5) < 0.15
    assert one_spelling(" a\t b\n") == "a b"


def test_spelling_that_the_discriminator_does_not_read_is_no_clue_and_hides_no_copy() -> None:
    human = [f"{text} façade" for text in sentences(120, 0)]
    model = [f"{text} fac\u0327ade \ufffd\ufffd" for text in sentences(120, 1)]
    assert abs(c2st(IDS, human, model, bootstrap=200).accuracy - 0.5) < 0.15
    assert one_spelling(model[0]) == normalise(model[0], CanonicalConfig(), complete=False).text
    assert one_spelling("a\ufffdb") == "a\ufffdb"
    copied = [f"{text[:-6]}fac\u0327ade" for text in human]
    assert evaluation_monitors(IDS, copied, human, human)["copy_rate"] == 1.0


def test_copies_of_the_human_answers_are_at_chance_exactly() -> None:
    human = sentences(120, 0)
    result = c2st(IDS, human, human, bootstrap=200)
    assert result.accuracy == 0.5
    assert result.low <= 0.5 <= result.high


def test_human_floor_uses_disjoint_prompts_and_is_chance() -> None:
    result = human_floor(IDS, sentences(120, 3), bootstrap=300)
    assert result.prompts == 60
    assert result.low <= 0.5 <= result.high


def test_folds_are_balanced_and_wrong_input_is_named() -> None:
    assert sorted(np.bincount(assign_folds(23, 5, 0))) == [4, 4, 5, 5, 5]
    assert set(assign_folds(5, 5, 0)) == {0, 1}
    with pytest.raises(ValueError, match="4 prompts"):
        c2st(["a", "a", "b"], ["x"] * 3, ["y"] * 3)
    with pytest.raises(ValueError, match="equal counts"):
        c2st(IDS, ["x"], ["y"])
    with pytest.raises(ValueError, match="8 prompts"):
        human_floor(["a"] * 20, ["x"] * 20)


def test_interval_against_the_normal_approximation() -> None:
    """400 prompts with two independent answers each: the width of a mean of 400 prompt averages."""
    rng = np.random.default_rng(0)
    correct, prompts = rng.random(800) < 0.7, np.repeat(np.arange(400), 2)
    low, high = prompt_interval(correct, prompts, 4000, 0)
    per_prompt = correct.reshape(400, 2).mean(1)
    assert high - low == pytest.approx(2 * 1.96 * per_prompt.std() / math.sqrt(400), rel=0.1)
    # Answers that are always judged alike within a prompt count once: the width of a proportion of 400.
    low, high = prompt_interval(np.repeat(correct[:400], 2), prompts, 4000, 0)
    p = correct[:400].mean()
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt(p * (1 - p) / 400), rel=0.1)
    low, high = prompt_interval(np.ones(40, dtype=bool), np.arange(40), 4000, 0)
    assert 0.8 < low < 0.95
    assert high == 1.0


def test_text_measures_by_hand() -> None:
    # LCS of "the cat sat" and "the cat ran fast" is 2: P = 2/3, R = 2/4, F1 = 4/7.
    assert text_metrics.rouge_l(["The cat sat!"], ["the cat ran fast"]) == pytest.approx(4 / 7)
    assert text_metrics.rouge_l(["кот спит", "a"], ["кот спит", "b"]) == pytest.approx(0.5)
    assert text_metrics.chrf(["abc def"], ["abc def"]) == pytest.approx(100.0)
    # bigrams: a b, b a | a b, b c: three different of four.
    assert text_metrics.distinct(["a b a", "a b c"], 2) == pytest.approx(3 / 4)
    assert text_metrics.distinct(["a"], 2) == 0.0
    assert text_metrics.self_bleu(["one two three four five"] * 3) == pytest.approx(100.0)
    assert text_metrics.self_bleu(["a b c d", "e f g h"]) < 1e-6
    assert text_metrics.lengths(["a", "a b", "a b c", ""]) == pytest.approx(
        {"length_mean": 1.5, "length_p10": 0.3, "length_p50": 1.5, "length_p90": 2.7, "empty_rate": 0.25}
    )
    assert text_metrics.copy_rate(["x y", "z"], ["x y", "w"]) == 0.5
    # "a b c d e" has the 4-grams abcd (known) and bcde (new); the short text does not count.
    assert text_metrics.copy_ngram_rate(["a b c d e", "a b"], ["z a b c d"], 4) == 0.5


def test_chrf_by_hand() -> None:
    """ "ab" against "ac": 1-grams P = R = 1/2, 2-grams 0; chrF averages orders that exist: (1/2 + 0) / 2."""
    assert text_metrics.chrf(["ab"], ["ac"]) == pytest.approx(25.0)


def test_self_bleu_is_bounded_and_deterministic() -> None:
    texts = sentences(300, 0)
    assert text_metrics.self_bleu(texts, 20, 1) == text_metrics.self_bleu(texts, 20, 1)
    assert text_metrics.self_bleu(texts, 20, 1) != text_metrics.self_bleu(texts, 20, 2)
    with pytest.raises(ValueError, match="two texts"):
        text_metrics.self_bleu(["a"])


def test_coverage_by_hand_and_in_expectation() -> None:
    human = np.array([[0.0], [1.0], [3.0], [10.0]])
    # k = 1 radii: 1, 1, 2, 7; a point at 4.5 is within 2 of 3.0 and within 7 of 10.0.
    assert coverage(human, np.array([[4.5]]), 1) == 0.5
    n, k = 60, 5
    expected = 1 - math.prod((n - i) / (2 * n - i) for i in range(1, k + 1))
    rng = np.random.default_rng(0)
    values = [coverage(rng.normal(size=(n, 4)), rng.normal(size=(n, 4)), k) for _ in range(40)]
    assert np.mean(values) == pytest.approx(expected, abs=0.01)


def test_coverage_falls_when_half_of_the_modes_are_dropped() -> None:
    rng = np.random.default_rng(1)
    modes = np.repeat(np.eye(4) * 20, 50, axis=0)
    human, full = modes + rng.normal(size=modes.shape), modes + rng.normal(size=modes.shape)
    assert coverage(human, full) > 0.9
    assert coverage(human, full[:100]) == pytest.approx(0.5, abs=0.03)


def test_selection_prefers_indistinguishable_then_covering() -> None:
    assert selection_key({"c2st": 0.55, "coverage": 0.9}) > selection_key({"c2st": 0.8, "coverage": 0.9})
    assert selection_key({"c2st": 0.6, "coverage": 0.9}) > selection_key({"c2st": 0.6, "coverage": 0.4})
    assert selection_key({"c2st": 0.45, "coverage": 0.9}) == selection_key({"c2st": 0.5, "coverage": 0.9})
    assert selection_key({"c2st": 1.0, "coverage": 0.0, "reward": 99.0}) == -1.0


def test_rows_have_the_promised_numbers() -> None:
    human, train = sentences(120, 0), sentences(200, 9)
    model = [*train[:12], *sentences(108, 1)]
    row = evaluate_texts(IDS, model, human, train, 2.5, FAST)
    assert all(isinstance(row[key], float) for key in KEYS)
    assert row["c2st_low"] <= row["c2st"] <= row["c2st_high"]
    assert row["copy_rate"] == 0.1
    assert row["nll"] == 2.5
    assert row["c2st_embedding"] is None
    assert row["length_mean"] == pytest.approx(np.mean([len(text.split()) for text in model]))
    floor = human_row(IDS, human, train, 2.5, FAST)
    assert all(isinstance(floor[key], float) for key in KEYS)
    assert floor["copy_rate"] == 0.0
    assert floor["rouge_l"] < 0.5
    assert floor["distinct_2"] == text_metrics.distinct(human, 2)
    with pytest.raises(ValueError, match="one generated and one human"):
        evaluate_texts(IDS, model[:3], human, train, 2.5, FAST)


def test_several_samples_keep_the_sides_equal() -> None:
    """Two samples a prompt: diversity and C2ST read the first ones, lengths and overlap both."""
    human, one, two = sentences(120, 0), sentences(120, 1), ["word"] * 120
    single = evaluate_texts(IDS, one, human, [], 1.0, FAST)
    double = evaluate_texts(IDS * 2, one + two, human * 2, [], 1.0, FAST)
    for key in ("c2st", "distinct_2", "self_bleu", "coverage"):
        assert single[key] == double[key]
    assert double["length_mean"] == pytest.approx((single["length_mean"] + 1) / 2)
    assert (single["samples"], double["samples"]) == (120, 240)


def test_two_human_answers_to_a_prompt_do_not_count_the_model_twice() -> None:
    human, model = sentences(120, 0), sentences(120, 1)
    single = evaluate_texts(IDS, model, human, [], 1.0, FAST)
    both = evaluate_texts(IDS * 2, model * 2, human + sentences(120, 2), [], 1.0, FAST)
    for key in ("c2st", "distinct_2", "self_bleu", "coverage"):
        assert single[key] == both[key]


def test_embeddings_do_not_depend_on_the_batch(tiny_model: Path) -> None:
    texts = ["a short one", "a text that is quite a bit longer than the other one", "", "a short one"]
    embed = Embedder(str(tiny_model), batch_size=2)
    vectors = embed(texts, keep=True)
    assert vectors.shape == (4, embed.size)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx([1, 1, np.linalg.norm(vectors[2]), 1], abs=1e-5)
    assert np.array_equal(vectors[0], vectors[3])
    alone = Embedder(str(tiny_model), batch_size=1)(texts)
    assert np.abs(vectors - alone).max() < 1e-5
    assert np.array_equal(embed(texts), vectors)
    assert make_embedder("none", str(tiny_model)) is None


def test_embedding_is_the_mean_of_the_hidden_states(tiny_model: Path) -> None:
    import torch
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(tiny_model, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(tiny_model)("hello there", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        mean = model(input_ids=ids).last_hidden_state[0].mean(0)
    embed = make_embedder("", str(tiny_model))
    assert embed is not None
    assert embed(["hello there"])[0] == pytest.approx((mean / mean.norm()).numpy(), abs=1e-5)


def test_config_imports_no_torch() -> None:
    import subprocess
    import sys

    code = "import services.evaluation.config, sys; assert not {'torch', 'ray', 'vllm'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
