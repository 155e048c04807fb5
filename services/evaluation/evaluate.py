"""One row of the closing table: a policy's answers, or the humans' own, measured against the human answers.

Rows are comparable when they were measured on the same prompts. A row is flat and JSON-ready; the names in
`KEYS` are always there.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from sklearn.metrics import pairwise_distances

from services.evaluation import text_metrics
from services.evaluation.c2st import C2ST, Normalise, c2st, human_floor, one_spelling
from services.evaluation.config import EvaluationConfig
from services.evaluation.mauve import mauve

KEYS = ("c2st", "nll", "rouge_l", "chrf", "distinct_2", "self_bleu", "length_mean", "copy_rate")
"""What every row has, in the order of the closing table."""

Row = dict[str, Any]
Embed = Callable[..., np.ndarray]


def evaluate_texts(
    prompt_ids: Sequence[str],
    generated: Sequence[str],
    human: Sequence[str],
    train_responses: Sequence[str],
    nll: float,
    cfg: EvaluationConfig,
    embed: Embed | None = None,
    normalise: Normalise = one_spelling,
) -> Row:
    """Measure a policy: `generated[i]` and `human[i]` answer prompt `prompt_ids[i]`.

    A prompt may come several times, with further samples or further human answers. Overlap, length and
    copying average over all rows; classifier, coverage and diversity read the first row of a prompt, so that
    both sides count alike and no text counts twice. `nll`: mean negative log-likelihood of the human answers
    under the policy, nats per token. `embed(texts, keep=False)` -> [n, d] is an `Embedder` (None: n-gram
    classifier only; `c2st_embedding` and `mauve` are None).

    Returns `KEYS` and c2st_low, c2st_high, c2st_ngram, c2st_embedding, c2st_classifier, coverage, mauve,
    distinct_1, distinct_3, length_p10, length_p50, length_p90, empty_rate, copy_ngram_rate, prompts, samples.
    ROUGE-L, MAUVE, distinct-n and rates are in [0, 1], chrF and self-BLEU in [0, 100], lengths in words.
    """
    if not len(prompt_ids) == len(generated) == len(human):
        raise ValueError(
            f"evaluation needs one generated and one human text per prompt id, got {len(prompt_ids)} ids, "
            f"{len(generated)} generated, {len(human)} human"
        )
    model = [normalise(text) for text in generated]
    person = [normalise(text) for text in human]
    seen = [normalise(text) for text in train_responses]
    first = _first_rows(prompt_ids)
    ids, one, ref = [prompt_ids[i] for i in first], [model[i] for i in first], [person[i] for i in first]
    one_vectors = None if embed is None else embed(one)
    ref_vectors = None if embed is None else embed(ref, keep=True)
    test = c2st(
        ids,
        ref,
        one,
        first_embeddings=ref_vectors,
        second_embeddings=one_vectors,
        folds=cfg.folds,
        bootstrap=cfg.bootstrap,
        seed=cfg.seed,
        normalise=normalise,
    )
    return {
        **_test_columns(test),
        "nll": float(nll),
        "rouge_l": text_metrics.rouge_l(model, person),
        "chrf": text_metrics.chrf(model, person),
        **_text_columns(one, model, seen, cfg),
        "coverage": text_coverage(ref, one, ref_vectors, one_vectors, cfg.coverage_neighbours),
        "mauve": _mauve(ref_vectors, one_vectors, cfg.seed),
        "samples": len(model),
    }


def human_row(
    prompt_ids: Sequence[str],
    human: Sequence[str],
    train_responses: Sequence[str],
    nll: float,
    cfg: EvaluationConfig,
    embed: Embed | None = None,
    normalise: Normalise = one_spelling,
) -> Row:
    """The humans in the policy's place: what the same instruments say when there is nothing to find.

    * `c2st` is `human_floor`: half of the prompts' answers against the other half's.
    * `rouge_l`, `chrf`: each answer against the answer to *another* prompt. It is the level of a fluent text
      that ignores its prompt; a policy above it says something about its prompt.
    * `coverage`, `mauve`: two halves against each other.
    * `nll`: no policy stands behind this row. Give the smallest NLL among the policies of the table: a
      cross-entropy, hence an upper bound on the human answers' entropy, which no policy can pass.
    * diversity, length and copying are the human answers' own.
    """
    person = [normalise(text) for text in human]
    seen = [normalise(text) for text in train_responses]
    first = _first_rows(prompt_ids)
    ids, ref = [prompt_ids[i] for i in first], [person[i] for i in first]
    vectors = None if embed is None else embed(ref, keep=True)
    test = human_floor(
        ids,
        ref,
        embeddings=vectors,
        folds=cfg.folds,
        bootstrap=cfg.bootstrap,
        seed=cfg.seed,
        normalise=normalise,
    )
    order = np.random.default_rng(cfg.seed).permutation(len(ref))
    half = len(order) // 2
    a, b = order[:half], order[half : 2 * half]
    some, rest = (None, None) if vectors is None else (vectors[a], vectors[b])
    others = _answers_to_other_prompts(ids, ref, cfg.seed)
    return {
        **_test_columns(test),
        "nll": float(nll),
        "rouge_l": text_metrics.rouge_l(others, ref),
        "chrf": text_metrics.chrf(others, ref),
        **_text_columns(ref, ref, seen, cfg),
        "coverage": text_coverage(
            [ref[i] for i in a], [ref[i] for i in b], some, rest, cfg.coverage_neighbours
        ),
        "mauve": _mauve(some, rest, cfg.seed),
        "samples": len(ref),
    }


def coverage(
    human: np.ndarray, generated: np.ndarray, neighbours: int = 5, metric: str = "euclidean"
) -> float:
    """Share of human points with a generated point inside their k-nearest-neighbour ball among the humans.

    Naeem et al. 2020, "Reliable Fidelity and Diversity Metrics for Generative Models" (arXiv 2002.09797), eq.
    6. It falls when the policy leaves regions of human answers empty, however good the rest is. For N points
    of one distribution on both sides its expectation is 1 − Π_{i=1..k} (N−i)/(2N−i), about 1 − 2^−k. Inputs
    [n, d] and [m, d], dense or sparse. k is at most n − 1.
    """
    among = pairwise_distances(human, metric=metric)
    k = min(neighbours, among.shape[0] - 1)
    np.fill_diagonal(among, np.inf)
    radius = np.partition(among, k - 1, axis=1)[:, k - 1]
    nearest = pairwise_distances(human, generated, metric=metric).min(axis=1)
    return float((nearest <= radius + 1e-6).mean())  # equal texts must count as inside, whatever the rounding


def text_coverage(
    human: Sequence[str],
    generated: Sequence[str],
    human_vectors: np.ndarray | None,
    generated_vectors: np.ndarray | None,
    neighbours: int,
) -> float:
    """`coverage` on embeddings; where there are none, on TF-IDF of the human texts' character 2–4-grams."""
    if human_vectors is not None and generated_vectors is not None:
        return coverage(human_vectors, generated_vectors, neighbours)
    return coverage(*text_metrics.ngram_vectors(human, generated), neighbours, metric="cosine")


def selection_key(row: Mapping[str, Any]) -> float:
    """Worth of a checkpoint, higher is better: coverage − 2·(C2ST − ½), in [−1, 1]; never a reward.

    Both terms run over [0, 1]. A classifier below chance is noise, so C2ST counts from ½ up. C2ST alone would
    accept a policy that repeats the commonest human answers; coverage alone one that adds nonsense beside
    them.
    """
    return float(row["coverage"]) - 2.0 * max(float(row["c2st"]) - 0.5, 0.0)


def _mauve(human: np.ndarray | None, generated: np.ndarray | None, seed: int) -> float | None:
    return None if human is None or generated is None else mauve(human, generated, seed)


def _first_rows(prompt_ids: Sequence[str]) -> list[int]:
    """Index of the first row of every prompt: no human answer and no sample is then counted twice."""
    rows: dict[str, int] = {}
    for index, name in enumerate(prompt_ids):
        rows.setdefault(name, index)
    return list(rows.values())


def _answers_to_other_prompts(prompt_ids: Sequence[str], human: Sequence[str], seed: int) -> list[str]:
    """For each row the answer to another prompt: prompts in random order, each takes its successor's."""
    answers: dict[str, str] = {}
    for name, text in zip(prompt_ids, human, strict=True):
        answers.setdefault(name, text)
    names = sorted(answers)
    order = [names[i] for i in np.random.default_rng(seed).permutation(len(names))]
    following = dict(zip(order, order[1:] + order[:1], strict=True))
    return [answers[following[name]] for name in prompt_ids]


def _test_columns(test: C2ST) -> Row:
    return {
        "c2st": test.accuracy,
        "c2st_low": test.low,
        "c2st_high": test.high,
        "c2st_ngram": test.accuracies["ngram"],
        "c2st_embedding": test.accuracies.get("embedding"),
        "c2st_classifier": test.classifier,
        "prompts": test.prompts,
    }


def _text_columns(first: list[str], texts: list[str], train: list[str], cfg: EvaluationConfig) -> Row:
    return {
        **{f"distinct_{n}": text_metrics.distinct(first, n) for n in (1, 2, 3)},
        "self_bleu": text_metrics.self_bleu(first, cfg.self_bleu_texts, cfg.seed),
        **text_metrics.lengths(texts),
        "copy_rate": text_metrics.copy_rate(texts, train),
        "copy_ngram_rate": text_metrics.copy_ngram_rate(texts, train),
    }
