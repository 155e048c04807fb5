"""Measures that exist because the language is known. Pure functions of parsed sentences (None: not valid).

`against_expert` is what `known-modes.toml` names as `evaluation.extra_measures`; `against_base` is for the
null control, whose demonstrations come from the base distribution. A sentence that is not valid has no mode:
it counts in every denominator of `mode_frequencies`, so it raises `mode_tv` and can lose modes.
"""

from collections.abc import Sequence

import numpy as np

from examples.known_modes.language import (
    BASE,
    EXPERT,
    FAMILIES,
    FAMILY_SIZE,
    LENGTHS,
    MODES,
    Distribution,
    Sentence,
    natural_copy_rate,
    parse_text,
)
from services.evaluation.extra_measures import Answers

Parsed = Sequence[Sentence | None]


def against_expert(answers: Answers) -> dict[str, float]:
    """`measures` with the expert as the target."""
    return measures(answers, EXPERT)


def against_base(answers: Answers) -> dict[str, float]:
    """`measures` with the base distribution as the target."""
    return measures(answers, BASE)


def measures(answers: Answers, target: Distribution) -> dict[str, float]:
    """All measures of a set of answers; rates and distances in [0, 1], `nll_gap` in nats per sentence."""
    sentences = [parse_text(text) for text in answers.model]
    demonstrations = [parse_text(text) for text in answers.demonstrations]
    frequencies = mode_frequencies(sentences)
    return {
        "valid": valid_rate(sentences),
        "mode_tv": mode_tv(frequencies, target),
        "modes_kept": float(modes_kept(frequencies, target)),
        "slot_tv": slot_tv(sentences, target),
        "length_tv": length_tv(sentences, target),
        "trailing_rate": trailing_rate(sentences),
        "nll_gap": nll_gap(answers.nll, answers.human_tokens, target),
        "sentence_copy_rate": copy_rate(sentences, demonstrations),
        "natural_copy_rate": natural_copy_rate(demonstrations, target),
    }


def valid_rate(sentences: Parsed) -> float:
    """Share of answers that are sentences of the language."""
    return sum(sentence is not None for sentence in sentences) / len(sentences)


def mode_frequencies(sentences: Parsed) -> np.ndarray:
    """Share of all answers in each mode, [32]; the sum is the valid rate."""
    modes = np.array([sentence.mode for sentence in sentences if sentence is not None], dtype=np.int64)
    return np.bincount(modes, minlength=MODES) / len(sentences)


def mode_tv(frequencies: np.ndarray, target: Distribution) -> float:
    """Total variation ½ Σ |p − q| over the 32 modes and "not valid" as a further outcome."""
    return _total_variation([*frequencies, 1 - frequencies.sum()], [*target.modes, 0.0])


def modes_kept(frequencies: np.ndarray, target: Distribution) -> int:
    """Modes of the target that have at least half of their mass."""
    mass = np.asarray(target.modes)
    return int(((mass > 0) & (frequencies >= mass / 2)).sum())


def slot_tv(sentences: Parsed, target: Distribution) -> float:
    """Total variation over the values of slots, mean over the four families; a family without slots counts
    1.
    """
    counts = np.zeros((FAMILIES, FAMILY_SIZE))
    for sentence in sentences:
        for j, value in enumerate(sentence.slots if sentence is not None else ()):
            counts[j % FAMILIES, value] += 1
    distances = [_total_variation(row / row.sum(), target.slots) if row.sum() else 1.0 for row in counts]
    return float(np.mean(distances))


def length_tv(sentences: Parsed, target: Distribution) -> float:
    """Total variation over the number of slots of the valid sentences; 1 when there are none."""
    lengths = [len(sentence.slots) for sentence in sentences if sentence is not None]
    if not lengths:
        return 1.0
    shares = np.bincount(np.array(lengths) - LENGTHS[0], minlength=len(LENGTHS)) / len(lengths)
    return _total_variation(shares, target.lengths)


def trailing_rate(sentences: Parsed) -> float:
    """Share of the valid sentences with the trailing token (.1 in both distributions); 0 without any."""
    flags = [sentence.trailing for sentence in sentences if sentence is not None]
    return sum(flags) / len(flags) if flags else 0.0


def nll_gap(nll: float, tokens: float, target: Distribution) -> float:
    """Nats per sentence that the policy needs for held-out sentences above the least possible.

    `nll` nats per token, `tokens` mean tokens per sentence (the same mean that `nll` was taken over): their
    product is the cross-entropy per sentence, and its excess over the entropy is KL(target ‖ policy) but for
    the noise of the held-out sample, which can make it slightly negative. In the merged form the policy also
    pays for choosing the canonical spelling: see README.md.
    """
    return nll * tokens - target.entropy()


def copy_rate(sentences: Parsed, demonstrations: Parsed) -> float:
    """Share of answers that are one of the demonstrations; read it beside `natural_copy_rate`."""
    known = set(demonstrations) - {None}
    return sum(sentence in known for sentence in sentences) / len(sentences)


def _total_variation(p: Sequence[float] | np.ndarray, q: Sequence[float] | np.ndarray) -> float:
    return float(np.abs(np.asarray(p) - np.asarray(q)).sum() / 2)
