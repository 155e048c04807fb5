"""Classifier two-sample test: how well can a fresh classifier tell two sets of texts apart?

Lopez-Paz & Oquab, "Revisiting Classifier Two-Sample Tests" (arXiv 1610.06545). Accuracy 0.5 means it cannot.

Invariants:
* classes are balanced, and balanced inside each fold: every prompt brings as many texts of one side as of the
  other;
* every prompt lies in one fold; vectorisers, scalers and weights are fitted without that fold;
* each text is judged once, by a classifier that never saw its prompt;
* both sides pass through the same `normalise` before anything else looks at them.

Two classifiers look at the texts: logistic regression on character and word n-grams, and on frozen
embeddings. The higher accuracy is the headline. Taking the higher of two is itself a small advantage for the
classifier, so that intervals are simultaneous (Bonferroni over the classifiers); `human_floor` pays the same
price, which is why the headline is to be read beside it.
"""

import math
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import sparse
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

Normalise = Callable[[str], str]

START, END = "\x02", "\x03"


def one_spelling(text: str) -> str:
    """What is left of a text where spelling counts for nothing: composed (NFC), without the replacement
    characters at its end (bytes of a character that a length limit split), outer whitespace stripped and
    every other run of it one space. The discriminator cannot teach what this removes.
    """
    return " ".join(unicodedata.normalize("NFC", text).rstrip("\ufffd").split())


@dataclass(frozen=True)
class C2ST:
    """Outcome of one test; accuracies in [0, 1]."""

    accuracy: float
    """The headline: the better classifier's out-of-fold accuracy."""
    low: float
    high: float
    """95 % interval of the headline, by bootstrap over prompts."""
    classifier: str
    """Which classifier won: "ngram" or "embedding"."""
    accuracies: dict[str, float]
    """Accuracy of every classifier that ran."""
    prompts: int
    """Number of prompts (the units that were split and resampled)."""


def c2st(
    prompt_ids: Sequence[str],
    first: Sequence[str],
    second: Sequence[str],
    *,
    first_embeddings: np.ndarray | None = None,
    second_embeddings: np.ndarray | None = None,
    folds: int = 5,
    bootstrap: int = 1000,
    seed: int = 0,
    normalise: Normalise = one_spelling,
) -> C2ST:
    """Test `first[i]` against `second[i]`, two answers to prompt `prompt_ids[i]`; embeddings are [n, d].

    Raises ValueError on unequal lengths, on embeddings of one side only, and on fewer than 4 prompts.
    """
    if not len(prompt_ids) == len(first) == len(second):
        raise ValueError(
            f"c2st needs equal counts, got {len(prompt_ids)} ids, {len(first)} and {len(second)} texts"
        )
    if (first_embeddings is None) != (second_embeddings is None):
        raise ValueError("c2st needs embeddings of both sides or of neither")
    names = sorted(set(prompt_ids))
    if len(names) < 4:
        raise ValueError(f"c2st needs at least 4 prompts, got {len(names)}")
    position = {name: index for index, name in enumerate(names)}
    prompts = np.array([position[name] for name in prompt_ids] * 2)
    labels = np.repeat([0, 1], len(first))
    fold_of = assign_folds(len(names), folds, seed)[prompts]
    texts = [START + normalise(text) + END for text in (*first, *second)]

    correct = {"ngram": _out_of_fold(_NgramFeatures, texts, labels, fold_of)}
    if first_embeddings is not None and second_embeddings is not None:
        vectors = np.concatenate([first_embeddings, second_embeddings])
        if vectors.shape[0] != len(texts):
            raise ValueError(f"c2st got {vectors.shape[0]} embeddings for {len(texts)} texts")
        correct["embedding"] = _out_of_fold(_EmbeddingFeatures, vectors, labels, fold_of)

    accuracies = {name: float(hits.mean()) for name, hits in correct.items()}
    winner = max(accuracies, key=lambda name: accuracies[name])
    low, high = prompt_interval(correct[winner], prompts, bootstrap, seed, alpha=0.05 / len(correct))
    return C2ST(accuracies[winner], low, high, winner, accuracies, len(names))


def human_floor(
    prompt_ids: Sequence[str],
    human: Sequence[str],
    *,
    embeddings: np.ndarray | None = None,
    folds: int = 5,
    bootstrap: int = 1000,
    seed: int = 0,
    normalise: Normalise = one_spelling,
) -> C2ST:
    """The same test with human answers on both sides: half of the prompts against the other half.

    No prompt is on both sides, and both halves come from one distribution, so the truth is 0.5. What is
    measured above it is noise and the gain of taking the better of two classifiers: a policy at the floor
    cannot be told from the humans by this instrument. Each side has half as many texts as in the test of a
    policy, so the interval is wider. The first answer of every prompt is used. Raises ValueError on fewer
    than 8 prompts.
    """
    rows = list({name: row for row, name in reversed(list(enumerate(prompt_ids)))}.values())
    if len(rows) < 8:
        raise ValueError(f"the human floor needs at least 8 prompts, got {len(rows)}")
    order = np.random.default_rng(seed).permutation(sorted(rows))
    half = len(order) // 2
    one, two = order[:half], order[half : 2 * half]
    return c2st(
        [f"pair-{index}" for index in range(half)],
        [human[row] for row in one],
        [human[row] for row in two],
        first_embeddings=None if embeddings is None else embeddings[one],
        second_embeddings=None if embeddings is None else embeddings[two],
        folds=folds,
        bootstrap=bootstrap,
        seed=seed,
        normalise=normalise,
    )


def assign_folds(prompts: int, folds: int, seed: int) -> np.ndarray:
    """Fold of each prompt, [prompts] ints, in sizes that differ by at most one; at least 2 prompts a fold."""
    count = max(2, min(folds, prompts // 2))
    fold_of = np.arange(prompts) % count
    return np.random.default_rng(seed).permutation(fold_of)


def prompt_interval(
    correct: np.ndarray, prompts: np.ndarray, resamples: int, seed: int, alpha: float = 0.05
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of `correct` [n], resampling whole prompts `prompts` [n].

    Answers to one prompt are judged alike, so prompts are the independent units. A plain bootstrap has no
    width when all prompts agree (accuracy 1 on 40 prompts is not certainty); two prompts judged right and two
    judged wrong are therefore added to the pool, as Agresti & Coull (1998) do for a proportion. The result
    contains the mean. Classifiers of different folds share training texts; that dependence is not part of the
    interval (Bengio & Grandvalet 2004: no unbiased estimate of it exists).
    """
    units, index = np.unique(prompts, return_inverse=True)
    sizes = np.bincount(index, minlength=len(units)).astype(float)
    hits = np.bincount(index, weights=correct.astype(float), minlength=len(units))
    size = sizes.mean()
    sizes = np.append(sizes, [size] * 4)
    hits = np.append(hits, [size, size, 0.0, 0.0])
    count = len(sizes)
    draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples)
    means = (draws @ hits) / (draws @ sizes)
    low, high = np.quantile(means, [alpha / 2, 1 - alpha / 2])
    accuracy = float(correct.mean())
    return min(float(low), accuracy), max(float(high), accuracy)


class _NgramFeatures:
    """Character 1–4-grams, word 1–2-grams and two length columns, fitted on the training folds.

    Texts carry start and end marks, so first words and closing punctuation are features. TF-IDF rows have
    unit length and forget how long the text was; the two columns give that back.
    """

    regularisation = 10.0

    def __init__(self, texts: Sequence[str]) -> None:
        self._char = TfidfVectorizer(
            analyzer="char", ngram_range=(1, 4), lowercase=False, sublinear_tf=True, max_features=50_000
        ).fit(texts)
        self._word = TfidfVectorizer(
            ngram_range=(1, 2),
            lowercase=False,
            sublinear_tf=True,
            token_pattern=r"\w+|[^\w\s]",
            max_features=50_000,
        ).fit(texts)
        self._scale = StandardScaler().fit(self._lengths(texts))

    @staticmethod
    def _lengths(texts: Sequence[str]) -> np.ndarray:
        return np.array([[math.log(len(text)), math.log1p(len(text.split()))] for text in texts])

    def __call__(self, texts: Sequence[str]) -> sparse.csr_matrix:
        lengths = sparse.csr_matrix(self._scale.transform(self._lengths(texts)))
        return sparse.hstack(
            [self._char.transform(texts), self._word.transform(texts), lengths], format="csr"
        )


class _EmbeddingFeatures:
    """Embeddings, standardised with the training folds' mean and deviation."""

    regularisation = 0.01

    def __init__(self, vectors: np.ndarray) -> None:
        self._scale = StandardScaler().fit(vectors)

    def __call__(self, vectors: np.ndarray) -> np.ndarray:
        return self._scale.transform(vectors)


def _out_of_fold(
    features: type[_NgramFeatures] | type[_EmbeddingFeatures],
    inputs: Sequence[str] | np.ndarray,
    labels: np.ndarray,
    fold_of: np.ndarray,
) -> np.ndarray:
    """Whether each input was classified rightly by the classifier that did not see its fold, [n] bools."""
    correct = np.zeros(len(labels), dtype=bool)

    def rows(index: np.ndarray) -> Sequence[str] | np.ndarray:
        return inputs[index] if isinstance(inputs, np.ndarray) else [inputs[row] for row in index]

    for fold in np.unique(fold_of):
        train, test = np.flatnonzero(fold_of != fold), np.flatnonzero(fold_of == fold)
        encode = features(rows(train))  # type: ignore[arg-type]
        model = LogisticRegression(C=features.regularisation, solver="liblinear", random_state=0)
        model.fit(encode(rows(train)), labels[train])  # type: ignore[arg-type]
        correct[test] = model.predict(encode(rows(test))) == labels[test]  # type: ignore[arg-type]
    return correct
