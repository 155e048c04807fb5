"""What the rollouts' side of a discriminator step is made of besides rollouts, and how lengths are balanced.

Everything here is a function of its arguments; randomness comes in as a generator seeded by (seed, step).
"""

import re
from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

_SEPARATED = re.compile(r"(\s+)")


def _shuffled(parts: list[str], rng: np.random.Generator) -> str:
    words = parts[::2]
    order = rng.permutation(len(words))
    out = list(parts)
    out[::2] = [words[i] for i in order]
    return "".join(out)


def _cut(parts: list[str], rng: np.random.Generator) -> str:
    kept = int(rng.integers(1, (len(parts) + 1) // 2))
    return "".join(parts[: 2 * kept - 1])


def _dropped(parts: list[str], rng: np.random.Generator) -> str:
    """One word in five goes (at least one, never all)."""
    words = (len(parts) + 1) // 2
    gone = set(rng.choice(words, size=max(1, words // 5), replace=False).tolist())
    kept = [i for i in range(words) if i not in gone]
    return parts[2 * kept[0]] + "".join(parts[2 * i - 1] + parts[2 * i] for i in kept[1:])


KINDS: tuple[Callable[[list[str], np.random.Generator], str], ...] = (_shuffled, _cut, _dropped)


def perturb(text: str, kind: int, rng: np.random.Generator) -> str | None:
    """`text` with its words shuffled (kind 0), cut at a random word (1) or with a fifth of its words dropped
    (2); None for a text of fewer than two words. Where shuffling changes nothing, the next kind is taken."""
    parts = _SEPARATED.split(text.strip())
    if len(parts) < 3:
        return None
    for turn in range(len(KINDS)):
        changed = KINDS[(kind + turn) % len(KINDS)](parts, rng)
        if changed != "".join(parts):
            return changed
    raise AssertionError("a text without its last words is another text")


def perturbed(demonstrations: pa.Table, count: int, rng: np.random.Generator) -> pa.Table:
    """`count` perturbed demonstrations with the demonstrations' columns, as negatives (R-AIRL, arXiv
    2510.01857): right words, wrong answer. They end like the originals, so that only the text tells.

    Demonstrations are taken in random order, again from the start where they are fewer than `count`, the
    kinds in turn. Those of a single word cannot be perturbed; with no others the result is empty.
    """
    texts = demonstrations["response_text"].to_pylist()
    usable = np.array([row for row, text in enumerate(texts) if len(text.split()) > 1], dtype=np.int64)
    if not len(usable):
        return demonstrations.slice(0, 0)
    rows = np.resize(rng.permutation(usable), count)
    changed = [perturb(texts[row], turn % len(KINDS), rng) for turn, row in enumerate(rows)]
    out = demonstrations.take(pa.array(rows))
    at = out.column_names.index("response_text")
    return out.set_column(at, "response_text", pa.array(changed, pa.string()))


def length_matched_weights(
    lengths: Sequence[int], is_demonstration: NDArray[np.bool_], bins: int
) -> tuple[NDArray[np.float64], float]:
    """Weights, 1/2 a side, under which both sides spread alike over length bins; and the overlap.

    Bins are quantiles of all lengths. With p_b and q_b the sides' shares of bin b, both get the shares
    min(p_b, q_b) / o, o = sum_b min(p_b, q_b) the overlap (matching weights; Li, Greene 2013): bins that
    one side lacks weigh nothing, and no response weighs more than 1 / o times its plain share.

    Returns:
        [R] weights and o in [0, 1]. With o = 0 there is nothing to match and the weights are the plain ones.

    Raises:
        ValueError: a side is empty.
    """
    length = np.asarray(lengths, dtype=np.float64)
    if is_demonstration.all() or not is_demonstration.any():
        raise ValueError("lengths can be matched between two sides only, and one of them is empty")
    edges = np.unique(np.quantile(length, np.arange(1, bins) / bins))
    bin_of = np.searchsorted(edges, length, side="left")
    counts = np.stack([np.bincount(bin_of[s], minlength=bins) for s in (is_demonstration, ~is_demonstration)])
    totals = counts.sum(1, keepdims=True)
    shares = counts / totals
    common = shares.min(0)
    overlap = float(common.sum())
    side = np.where(is_demonstration, 0, 1)
    plain = 0.5 / totals[side, 0]
    if overlap == 0:
        return plain, 0.0
    return plain * common[bin_of] / shares[side, bin_of] / overlap, overlap
