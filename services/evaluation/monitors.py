"""Signs that a policy collapses, repeats itself, copies, or that the discriminator goes in circles.

Pure functions of texts, labels, vectors and score arrays; `services.watching.alarms` judges what they return
(under "monitor/..."). Numbers are finite whatever comes in; those that depend on how many texts there are
compare equal counts of human and model answers.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest, rankdata
from sklearn.cluster import KMeans

from services.evaluation import text_metrics
from services.evaluation.c2st import Normalise, one_spelling


def evaluation_monitors(
    prompt_ids: Sequence[str],
    generated: Sequence[str],
    human: Sequence[str],
    train_responses: Sequence[str],
    embed: Callable[..., NDArray] | None = None,
    *,
    seed: int = 0,
    normalise: Normalise = one_spelling,
) -> dict[str, float]:
    """`text_monitors` of an evaluation, given as to `evaluate_texts`: a prompt counts with its first row."""
    first: dict[str, int] = {}
    for row, name in enumerate(prompt_ids):
        first.setdefault(name, row)
    model, person = ([normalise(texts[row]) for row in first.values()] for texts in (generated, human))
    return text_monitors(
        model,
        person,
        [normalise(text) for text in train_responses],
        None if embed is None else embed(model),
        None if embed is None else embed(person, keep=True),
        seed=seed,
    )


def text_monitors(
    generated: Sequence[str],
    human: Sequence[str],
    demonstrations: Sequence[str],
    generated_vectors: NDArray | None = None,
    human_vectors: NDArray | None = None,
    *,
    clusters: int = 16,
    seed: int = 0,
) -> dict[str, float]:
    """All monitors of one evaluation; `generated[i]` and `human[i]` answer the same prompt.

    Args:
        generated, human: normalised texts, equally many, one row a prompt.
        demonstrations: the training demonstrations, normalised alike.
        generated_vectors, human_vectors: embeddings [n, d] (None: TF-IDF of character 2–4-grams).
        clusters: most modes that are looked for.
        seed: of the clustering, and of the texts that self-BLEU draws.

    Returns mode_share, modes_lost, distinct_2_share, self_bleu_room, repetition, repetition_human,
    length_ratio, copy_rate, copy_natural, copy_excess. ValueError on unequal counts.
    """
    if len(generated) != len(human):
        raise ValueError(
            f"monitors compare equal counts, got {len(generated)} generated and {len(human)} human"
        )
    if generated_vectors is None or human_vectors is None:
        human_vectors, generated_vectors = text_metrics.ngram_vectors(human, generated)
    of_human, of_model = cluster_modes(human_vectors, generated_vectors, clusters, seed)
    words = [np.mean([len(text.split()) for text in texts]) for texts in (generated, human)]
    return {
        **mode_monitors(of_human, of_model),
        "distinct_2_share": _share(text_metrics.distinct(generated, 2), text_metrics.distinct(human, 2)),
        "self_bleu_room": _share(_self_bleu_room(generated, seed), _self_bleu_room(human, seed)),
        "repetition": repetition_rate(generated),
        "repetition_human": repetition_rate(human),
        "length_ratio": _share(float(words[0]), float(words[1])),
        **copying(generated, human, demonstrations),
    }


def mode_monitors(human: Sequence[Hashable], generated: Sequence[Hashable]) -> dict[str, float]:
    """`mode_share` and `modes_lost` of labels: clusters, or modes that are known."""
    return {"mode_share": mode_share(human, generated), "modes_lost": modes_lost(human, generated)}


def cluster_modes(
    human: NDArray, generated: NDArray, clusters: int = 16, seed: int = 0
) -> tuple[list[int], list[int]]:
    """Labels of human [n, d] and generated [m, d] vectors under k-means fitted on both.

    Fitted on both, a policy that writes unlike any human has modes of its own and is not taken for
    collapsed. A cluster has ten texts on average at least.
    """
    stack = _stack(human, generated)
    count = max(1, min(clusters, stack.shape[0] // 10))
    labels = KMeans(count, n_init=4, random_state=seed).fit_predict(stack).tolist()
    return labels[: human.shape[0]], labels[human.shape[0] :]


def mode_entropy(labels: Sequence[Hashable]) -> float:
    """Shannon entropy of the labels' frequencies, nats (plug-in; its bias is equal for equal counts)."""
    shares = np.array(list(Counter(labels).values())) / len(labels)
    return float(-(shares * np.log(shares)).sum())


def mode_share(human: Sequence[Hashable], generated: Sequence[Hashable]) -> float:
    """Effective number of modes exp(H) (Hill number of order 1) of the policy, divided by the humans'."""
    return float(np.exp(mode_entropy(generated) - mode_entropy(human)))


def modes_lost(
    human: Sequence[Hashable], generated: Sequence[Hashable], fraction: float = 0.25, least: int = 8
) -> float:
    """Share of human answers in modes where the policy has less than `fraction` of the humans' frequency.

    Modes with fewer than `least` human answers do not count: chance alone empties them.
    """
    people, model = Counter(human), Counter(generated)
    scale = fraction * len(generated) / len(human)
    return sum(n for mode, n in people.items() if n >= least and model[mode] < scale * n) / len(human)


def repetition_rate(texts: Sequence[str], n: int = 3) -> float:
    """Mean share of a response's tokens (words and marks) inside an n-gram that it has more than once."""
    shares = []
    for text in texts:
        words = text_metrics.tokens(text)
        grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        times = Counter(grams)
        inside = {start + k for start, gram in enumerate(grams) if times[gram] > 1 for k in range(n)}
        shares.append(len(inside) / len(words) if words else 0.0)
    return float(np.mean(shares)) if shares else 0.0


def spearman(x: Sequence[float] | NDArray, y: Sequence[float] | NDArray) -> float:
    """Rank correlation with mid-ranks for ties; 0 where one side is constant or has fewer than two values."""
    a, b = rankdata(x), rankdata(y)
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])


def copying(
    generated: Sequence[str], human: Sequence[str], demonstrations: Sequence[str], alpha: float = 0.05
) -> dict[str, float]:
    """Share of responses found verbatim among the demonstrations, against what held-out human answers score.

    Returns copy_rate, copy_natural and copy_excess: the lower limit of the two-sided interval of their
    difference (Newcombe 1998, "Interval estimation for the difference between independent proportions",
    method 10), at least −1; above 0 the policy copies more than humans who never saw the demonstrations.
    """
    rate = text_metrics.copy_rate(generated, demonstrations)
    natural = text_metrics.copy_rate(human, demonstrations)
    below = rate - _wilson(rate, len(generated), alpha).low
    above = _wilson(natural, len(human), alpha).high - natural
    excess = rate - natural - float(np.hypot(below, above))
    return {"copy_rate": rate, "copy_natural": natural, "copy_excess": excess}


def rank_agreement(scores: NDArray, sides: Sequence[Hashable] | None = None) -> NDArray[np.float64]:
    """Rank correlations [versions, versions] of scores [versions, probes].

    With `sides` (one label a probe) ranks are taken within each side and the correlations averaged: that
    demonstrations score above rollouts in every version is then no agreement.
    """
    groups = [np.arange(scores.shape[1])] if sides is None else _groups(sides)
    count = len(scores)
    return np.array(
        [
            [np.mean([spearman(scores[a][g], scores[b][g]) for g in groups]) for b in range(count)]
            for a in range(count)
        ]
    ).reshape(count, count)


def cycling(scores: NDArray, sides: Sequence[Hashable] | None = None) -> dict[str, float]:
    """Whether the live discriminator (last row of `scores` [versions, probes]) returns to an earlier one.

    `disagreement`: 1 − its rank correlation with the version before; `disagreement_first`: with the first
    one. `recurrence`: max over a < b < live of ρ(live, a) − ρ(live, b), at least 0. While judgements drift
    one way an older version agrees less, and this stays near 0; in a cycle it approaches 1. All are 0 where
    there are too few versions.
    """
    with_live = rank_agreement(scores, sides)[-1][:-1]
    if not len(with_live):
        return {"disagreement": 0.0, "disagreement_first": 0.0, "recurrence": 0.0}
    best_before = np.maximum.accumulate(with_live)
    return {
        "disagreement": float(1 - with_live[-1]),
        "disagreement_first": float(1 - with_live[0]),
        "recurrence": float(np.max(best_before - with_live)),
    }


def _self_bleu_room(texts: Sequence[str], seed: int) -> float:
    """What self-BLEU leaves to 100, the value of texts that are all alike: a ratio of it, unlike one of
    self-BLEU, means the same whether the humans' is 10 or 70. One text resembles no other."""
    alike = text_metrics.self_bleu(texts, seed=seed) if len(texts) > 1 else 0.0
    return round(100.0 - alike, 6)  # BLEU of equal texts is 100 up to rounding, and this is divided by


def _wilson(share: float, count: int, alpha: float) -> Any:
    return binomtest(round(share * count), count).proportion_ci(1 - alpha, method="wilson")


def _groups(sides: Sequence[Hashable]) -> list[NDArray[np.int_]]:
    rows: dict[Hashable, list[int]] = {}
    for index, side in enumerate(sides):
        rows.setdefault(side, []).append(index)
    return [np.array(group) for group in rows.values()]


def _share(part: float, whole: float) -> float:
    """part / whole; 1 where the whole is 0, since nothing is missing from it."""
    return part / whole if whole else 1.0


def _stack(human: NDArray, generated: NDArray) -> Any:
    from scipy import sparse

    return sparse.vstack([human, generated]) if sparse.issparse(human) else np.concatenate([human, generated])
