"""MAUVE: how far two sets of texts are apart, from either side, on clusters of their embeddings.

Pillutla et al. 2021, "MAUVE: Measuring the Gap Between Neural Text and Human Text using Divergence Frontiers"
(arXiv 2102.01454). 1: the same histogram; near 0: nothing in common. Two samples of one distribution score
below 1 because they are samples, the more so the fewer they are: read it beside the human row.
"""

import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.preprocessing import normalize

SCALE = 5.0
"""c of the paper: what a divergence costs."""
VARIANCE = 0.9
"""Share of the variance that the clustered components keep."""
TEXTS_PER_CLUSTER = 10
MIXTURES = 100


def mauve(first: NDArray[np.float32], second: NDArray[np.float32], seed: int) -> float:
    """MAUVE in [0, 1] of embeddings [n, d] and [m, d]: unit length, principal components, k-means with a
    tenth as many clusters as the smaller side has texts (at least two).

    Raises:
        ValueError: a side has fewer than two texts.
    """
    if min(len(first), len(second)) < 2:
        raise ValueError("MAUVE needs two texts on each side")
    points = normalize(np.concatenate([first, second]).astype(np.float64))
    if len(np.unique(points, axis=0)) == 1:
        return 1.0
    points = PCA(n_components=VARIANCE, svd_solver="full").fit_transform(points)
    clusters = max(2, min(len(first), len(second)) // TEXTS_PER_CLUSTER)
    label = KMeans(clusters, n_init=5, random_state=seed).fit_predict(points)
    p = np.bincount(label[: len(first)], minlength=clusters) / len(first)
    q = np.bincount(label[len(first) :], minlength=clusters) / len(second)
    return frontier_area(p, q)


def frontier_area(p: NDArray[np.float64], q: NDArray[np.float64], scale: float = SCALE) -> float:
    """Area under the divergence curve of two histograms [k]: all points
    (exp(−c·KL(q‖r)), exp(−c·KL(p‖r))) with r = λp + (1−λ)q, 0 < λ < 1 (eq. 1 of the paper), closed by the
    corners (1, 0) and (0, 1).
    """
    weights = np.linspace(1e-6, 1 - 1e-6, MIXTURES)[:, None]
    mixed = weights * p + (1 - weights) * q
    x = np.concatenate([[1.0], np.exp(-scale * _divergence(q, mixed))[::-1], [0.0]])
    y = np.concatenate([[0.0], np.exp(-scale * _divergence(p, mixed))[::-1], [1.0]])
    order = np.lexsort((-y, x))
    return float(np.trapezoid(y[order], x[order]))


def _divergence(of: NDArray[np.float64], mixed: NDArray[np.float64]) -> NDArray[np.float64]:
    """KL(of‖row) in nats for each row of mixed [m, k]; 0·log 0 = 0."""
    seen = of > 0
    return (of[seen] * np.log(of[seen] / mixed[:, seen])).sum(1)
