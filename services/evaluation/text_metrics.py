"""Measures of texts that need no model: overlap with the human answer, diversity, length, copying.

Diversity depends on how many texts there are (distinct-n falls, self-BLEU rises with the count): compare only
equal counts. Texts are expected canonical (one whitespace normalisation on both sides).
"""

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
from sacrebleu.metrics import BLEU, CHRF
from sacrebleu.metrics.helpers import extract_all_word_ngrams
from scipy.sparse import csr_matrix
from sklearn.feature_extraction.text import TfidfVectorizer

_TOKEN = re.compile(r"\w+|[^\w\s]")
_WORD = re.compile(r"\w+")


def tokens(text: str) -> list[str]:
    """Lower-case words and single punctuation marks."""
    return _TOKEN.findall(text.lower())


def rouge_l(generated: Sequence[str], human: Sequence[str]) -> float:
    """Mean ROUGE-L F1 in [0, 1] (Lin 2004) over lower-case words of any script, without stemming."""
    pairs = [
        (_WORD.findall(g.lower()), _WORD.findall(h.lower())) for g, h in zip(generated, human, strict=True)
    ]
    # F1 of LCS / |g| and LCS / |h|
    return float(np.mean([2 * common_subsequence(g, h) / max(len(g) + len(h), 1) for g, h in pairs]))


def common_subsequence(one: Sequence[str], two: Sequence[str]) -> int:
    """Length of the longest common subsequence, by one addition of |one|-bit integers a word of `two` (Hyyrö
    2004, "Bit-parallel LCS-length computation revisited"). Bit i of `flat` is 0 where the LCS grows.
    """
    places: dict[str, int] = {}
    for i, word in enumerate(one):
        places[word] = places.get(word, 0) | 1 << i
    every = flat = (1 << len(one)) - 1
    for word in two:
        grown = flat & places.get(word, 0)
        flat = (flat + grown | flat - grown) & every
    return len(one) - flat.bit_count()


def chrf(generated: Sequence[str], human: Sequence[str]) -> float:
    """Corpus chrF2 in [0, 100] (Popović 2015), sacrebleu's defaults."""
    if len(generated) != len(human):
        raise ValueError(f"chrF needs equal counts, got {len(generated)} and {len(human)}")
    return float(CHRF().corpus_score(list(generated), [list(human)]).score)


def _ngrams(words: Sequence[str], n: int) -> Iterator[tuple[str, ...]]:
    return (tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def distinct(texts: Sequence[str], n: int) -> float:
    """Different n-grams divided by all n-grams of the whole sample (Li et al. 2016); 0 without any."""
    grams = [gram for text in texts for gram in _ngrams(tokens(text), n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def self_bleu(texts: Sequence[str], most: int = 100, seed: int = 0) -> float:
    """Mean BLEU of each text against all the others, in [0, 100] (Zhu et al. 2018): high means repetitive.

    At most `most` texts are compared, drawn by `seed` alone, so two samples of equal count lose the same
    rows. Sentence BLEU with sacrebleu's effective order. Raises ValueError on fewer than two texts.
    """
    if len(texts) < 2:
        raise ValueError("self-BLEU needs at least two texts")
    rows = np.sort(np.random.default_rng(seed).permutation(len(texts))[:most])
    return _self_bleu(tuple(texts[row] for row in rows))


@lru_cache(maxsize=4)
def _self_bleu(texts: tuple[str, ...]) -> float:
    """Remembered: rows and monitors ask for the same samples, and at every evaluation for the humans'.

    An n-gram counts up to the most that one other text has of it. That is the first of all texts, or the
    second for the text that is the first, so each text is read once and not once for each of the others.
    """
    tokenize = BLEU().tokenizer
    grams, sizes = zip(
        *(extract_all_word_ngrams(tokenize(text.rstrip()), 1, 4) for text in texts), strict=True
    )
    most: dict[tuple[str, ...], tuple[int, int, int]] = {}
    """Of each n-gram: the most that a text has, that text, and the most that another has."""
    for owner, counts in enumerate(grams):
        for gram, count in counts.items():
            first, who, second = most.get(gram, (0, -1, 0))
            most[gram] = (count, owner, first) if count > first else (first, who, max(second, count))
    scores = []
    for owner, counts in enumerate(grams):
        correct, total = [0] * 4, [0] * 4
        for gram, count in counts.items():
            first, who, second = most[gram]
            total[len(gram) - 1] += count
            correct[len(gram) - 1] += min(count, second if who == owner else first)
        others = (*sizes[:owner], *sizes[owner + 1 :])
        closest = min(others, key=lambda size: (abs(size - sizes[owner]), size))
        bleu = BLEU.compute_bleu(correct, total, sizes[owner], closest, "exp", effective_order=True)
        scores.append(bleu.score)
    return float(np.mean(scores))


def lengths(texts: Sequence[str]) -> dict[str, float]:
    """Length in whitespace-separated words (mean and percentiles), and the share of empty texts."""
    words = np.array([len(text.split()) for text in texts])
    p10, p50, p90 = np.quantile(words, [0.1, 0.5, 0.9])
    return {
        "length_mean": float(words.mean()),
        "length_p10": float(p10),
        "length_p50": float(p50),
        "length_p90": float(p90),
        "empty_rate": float((words == 0).mean()),
    }


def copy_rate(texts: Sequence[str], demonstrations: Sequence[str]) -> float:
    """Share of texts that are, letter by letter, one of the demonstrations."""
    known = set(demonstrations)
    return float(np.mean([text in known for text in texts]))


def copy_ngram_rate(texts: Sequence[str], demonstrations: Sequence[str], n: int = 4) -> float:
    """Mean share of a text's n-grams that some demonstration has; texts shorter than n are left out.

    0 when no text is long enough. Humans have a natural rate too: read it beside the human row.
    """
    known = {gram for text in demonstrations for gram in _ngrams(tokens(text), n)}
    shares = []
    for text in texts:
        grams = list(_ngrams(tokens(text), n))
        if grams:
            shares.append(sum(gram in known for gram in grams) / len(grams))
    return float(np.mean(shares)) if shares else 0.0


def ngram_vectors(human: Sequence[str], generated: Sequence[str]) -> tuple[csr_matrix, csr_matrix]:
    """TF-IDF of character 2–4-grams that the human texts have, for both sides: vectors where there are no
    embeddings. A text of fewer than two characters has no 2-gram; it gets marks at its end.
    """
    tfidf = TfidfVectorizer(analyzer="char", ngram_range=(2, 4), sublinear_tf=True, max_features=50_000)
    one, two = ([text.ljust(2, "\x03") for text in texts] for texts in (human, generated))
    return tfidf.fit_transform(one), tfidf.transform(two)
