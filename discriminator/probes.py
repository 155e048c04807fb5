"""Probes: classifiers so narrow that each sees one kind of cue, and no content.

Invariants: a prompt lies in one fold, a response is judged by a classifier that never saw its prompt, and
both sides pass through the same probe. A probe of spelling looks at complete responses only where a cut
response would show the cut instead of the cue (last token, end token, tokenisation), so that each cue is
found under its own name.
"""

import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from scipy.stats import t as student
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from discriminator.canonical import Canonicaliser, normalise

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LEAST_PROMPTS = 4
"""A side with fewer prompts cannot be split into folds: the probe then says nothing."""


@dataclass(frozen=True)
class Response:
    """What a probe may know of one response. The end token counts in `ended` only."""

    prompt_id: str
    text: str
    tokens: int
    last_token: str
    ended: bool
    """The ids close with the end token."""
    complete: bool
    """It was not cut by a length limit."""
    respelled: bool
    """The ids are not those that the tokenizer gives for the text."""


def raw_responses(table: pa.Table, tokenizer: "PreTrainedTokenizerBase", end_id: int) -> list[Response]:
    """A side as it came, without canonicalisation.

    Args:
        table: prompt_id and response_text; `response_ids` where ids exist (rollouts: the sampled ones), else
            the text is encoded and closed with the end token; `finish_reason` where it is known.
        tokenizer: the policy's.
        end_id: the token that ends a response.
    """
    texts = table["response_text"].to_pylist()
    encoded = _encode(tokenizer, texts)
    names = table.column_names
    special = _special_ids(tokenizer)
    complete = (
        [reason == "stop" for reason in table["finish_reason"].to_pylist()]
        if "finish_reason" in names
        else [True] * len(texts)
    )
    ids = (
        table["response_ids"].to_pylist()
        if "response_ids" in names
        else [row + [end_id] * whole for row, whole in zip(encoded, complete, strict=True)]
    )
    return [
        _response(prompt, text, row, again, whole, tokenizer, end_id, special)
        for prompt, text, row, again, whole in zip(
            table["prompt_id"].to_pylist(), texts, ids, encoded, complete, strict=True
        )
    ]


def canonical_responses(table: pa.Table, canonical: Canonicaliser) -> list[Response]:
    """A side as the discriminator reads it; `table` has `JUDGED_COLUMNS`."""
    encoded = canonical.encode_table(table)
    texts = [
        normalise(
            raw if row.complete else raw[: row.spans[-1][1]], canonical.config, complete=row.complete
        ).text
        for raw, row in zip(table["response_text"].to_pylist(), encoded, strict=True)
    ]
    tokenizer, end_id = canonical.tokenizer, canonical.eos_id
    special = _special_ids(tokenizer)
    return [
        _response(prompt, text, row.response_ids, again, row.complete, tokenizer, end_id, special)
        for prompt, text, row, again in zip(
            table["prompt_id"].to_pylist(), texts, encoded, _encode(tokenizer, texts), strict=True
        )
    ]


def _encode(tokenizer: "PreTrainedTokenizerBase", texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]


def _special_ids(tokenizer: "PreTrainedTokenizerBase") -> frozenset[int]:
    """Ids that decode to no text, so that re-encoding cannot bring them back."""
    added = (number for number, token in tokenizer.added_tokens_decoder.items() if token.special)
    return frozenset([*added, *tokenizer.all_special_ids])


def _response(
    prompt: str,
    text: str,
    ids: Sequence[int],
    encoded: Sequence[int],
    complete: bool,
    tokenizer: "PreTrainedTokenizerBase",
    end_id: int,
    special: frozenset[int],
) -> Response:
    ended = bool(ids) and ids[-1] == end_id
    body = list(ids[:-1] if ended else ids)
    return Response(
        prompt_id=prompt,
        text=text,
        tokens=len(body),
        last_token=str(tokenizer.convert_ids_to_tokens(body[-1])) if body else "",
        ended=ended,
        complete=complete,
        respelled=[i for i in body if i not in special] != list(encoded),
    )


@dataclass(frozen=True)
class Probe:
    """One kind of cue. `see` says in words what it sees in a response; without `features` that is all it
    sees, and the classifier is a table of these values."""

    cue: str
    see: Callable[[Response], str]
    features: Callable[[Response], list[float]] | None = None
    """Numbers for a logistic regression."""
    complete_only: bool = False
    reachable: bool = False
    """Any policy can learn to produce it: part of the task, never refused."""
    remedy: str = "take it out of the demonstrations"
    """What to do where the policy cannot produce it."""


def _length(response: Response) -> list[float]:
    sizes = np.log1p([response.tokens, len(response.text.split()), len(response.text.strip())])
    return [*sizes, *sizes**2]


def _classes(response: Response) -> list[float]:
    """Shares of upper-case, lower-case, digits and punctuation among the characters that are not blank."""
    chars = [char for char in response.text if not char.isspace()]
    kinds = Counter(
        "upper"
        if char.isupper()
        else "lower"
        if char.islower()
        else "digit"
        if char.isdigit()
        else "punctuation"
        if unicodedata.category(char)[0] in "PS"
        else "other"
        for char in chars
    )
    return [kinds[kind] / max(len(chars), 1) for kind in ("upper", "lower", "digit", "punctuation")]


def _see_classes(response: Response) -> str:
    upper, lower, digit, punctuation = _classes(response)
    return f"upper {upper:.0%}, lower {lower:.0%}, digits {digit:.0%}, punctuation {punctuation:.0%}"


def _outer(response: Response) -> str:
    text = response.text
    if not text.strip():
        return f"blank {text!r}"
    left, right = text[: len(text) - len(text.lstrip())], text[len(text.rstrip()) :]
    sides = [f"leading {left!r}"] * bool(left) + [f"trailing {right!r}"] * bool(right)
    return " and ".join(sides) or "none"


def _inner(response: Response) -> str:
    text = response.text.strip()
    seen = {
        "runs of blanks": "  " in text,
        "empty lines": "\n\n" in text,
        "newlines": "\n" in text,
        "blanks beside newlines": " \n" in text or "\n " in text,
        "tabs": "\t" in text,
        "other blanks": any(char.isspace() and char not in " \n\t" for char in text),
    }
    return ", ".join(name for name, there in seen.items() if there) or "single blanks"


_WHITESPACE = 'set discriminator.canonical.whitespace = "collapse", or take it out of the demonstrations'

PROBES = (
    Probe(
        "length",
        lambda r: f"{r.tokens} tokens, {len(r.text.split())} words, {len(r.text.strip())} characters",
        features=_length,
        reachable=True,
    ),
    Probe("character classes", _see_classes, features=_classes, reachable=True),
    Probe("first character", lambda r: repr(r.text.strip()[:1])),
    Probe("last character", lambda r: repr(r.text.strip()[-1:]), complete_only=True),
    Probe("last token", lambda r: repr(r.last_token), complete_only=True),
    Probe(
        "end token",
        lambda r: "ends with the end token" if r.ended else "ends without an end token",
        complete_only=True,
        remedy="set policy.end_of_response to the token that ends the base model's responses",
    ),
    Probe("outer whitespace", _outer, remedy=_WHITESPACE),
    Probe("inner whitespace", _inner, remedy=_WHITESPACE),
    Probe(
        "unicode form",
        lambda r: "composed" if unicodedata.is_normalized("NFC", r.text) else "decomposed",
        remedy='set discriminator.canonical.unicode = "nfc"',
    ),
    Probe(
        "truncation",
        lambda r: "complete" if r.complete else "cut by the length limit",
        remedy="raise sampling.max_tokens, or set policy.end_of_response to a token that the base model uses",
    ),
    Probe(
        "tokenisation",
        lambda r: "ids differ from the re-encoded text" if r.respelled else "ids of the re-encoded text",
        complete_only=True,
        remedy="give the demonstrations as text, so that they are encoded like everything else",
    ),
)
"""Every cue that is looked for."""


@dataclass(frozen=True)
class Separation:
    """How well one probe tells the sides apart."""

    accuracy: float
    """Balanced accuracy out of fold; one half is chance."""
    low: float
    high: float
    """Interval of the accuracy."""
    demonstrations: tuple[str, ...]
    rollouts: tuple[str, ...]
    """What was seen on either side, the commonest (of numbers: typical ones) first."""
    absent: str | None
    """The demonstrations' commonest value among those that no rollout shows (None: there is none, or the
    probe sees numbers)."""
    absent_share: float
    """Of the demonstrations, 0 where `absent` is None."""
    judged_rollouts: int
    """Rollouts that the probe looked at."""


def separate(
    probe: Probe,
    demonstrations: Sequence[Response],
    rollouts: Sequence[Response],
    *,
    alpha: float = 0.05,
    folds: int = 5,
    seed: int = 0,
) -> Separation | None:
    """Cross-validate one probe; None where a side has fewer than `LEAST_PROMPTS` prompts it can look at."""
    sides = [
        [response for response in side if response.complete or not probe.complete_only]
        for side in (demonstrations, rollouts)
    ]
    names = [{response.prompt_id for response in side} for side in sides]
    if min(map(len, names)) < LEAST_PROMPTS:
        return None
    both = [*sides[0], *sides[1]]
    labels = np.repeat([1, 0], [len(sides[0]), len(sides[1])])
    order = _fold_order(names[0], names[1], seed)
    prompts = np.array([order[response.prompt_id] for response in both])
    fold_of = prompts % min(folds, min(map(len, names)))
    if probe.features is None:
        seen = [probe.see(response) for response in both]
        hits = _table_hits(seen, labels, fold_of)
        counts = Counter(seen[: len(sides[0])])
        others = Counter(seen[len(sides[0]) :])
        absent, times = next(((v, n) for v, n in counts.most_common() if v not in others), (None, 0))
        share = times / len(sides[0])
        examples = [_commonest(counts), _commonest(others)]
    else:
        numbers = np.array([probe.features(response) for response in both])
        hits = _logistic_hits(numbers, labels, fold_of)
        absent, share = None, 0.0
        split = len(sides[0])
        halves = zip(sides, (numbers[:split, 0], numbers[split:, 0]), strict=True)
        examples = [_typical([probe.see(response) for response in side], first) for side, first in halves]
    accuracy, low, high = balanced_accuracy(hits, labels, prompts, alpha)
    return Separation(accuracy, low, high, examples[0], examples[1], absent, share, len(sides[1]))


def _fold_order(first: set[str], second: set[str], seed: int) -> dict[str, int]:
    """Number the prompts at random, shared ones first: taken modulo k, either side reaches two folds at
    least."""
    rng = np.random.default_rng(seed)
    order: dict[str, int] = {}
    for group in (first & second, first - second, second - first):
        names = sorted(group)
        for index in rng.permutation(len(names)):
            order[names[index]] = len(order)
    return order


def _table_hits(seen: Sequence[str], labels: NDArray[np.int_], fold_of: NDArray[np.int_]) -> NDArray:
    """Out of fold: a value belongs to the side that shows it more often; a tie, or a new value, is half
    right."""
    kinds = {value: number for number, value in enumerate(dict.fromkeys(seen))}
    index = np.array([kinds[value] for value in seen])
    hits = np.zeros(len(labels))
    for fold in np.unique(fold_of):
        train, test = fold_of != fold, fold_of == fold
        rate = [
            np.bincount(index[train & (labels == side)], minlength=len(kinds))
            / (train & (labels == side)).sum()
            for side in (0, 1)
        ]
        lean = np.sign(rate[1] - rate[0])[index[test]]
        hits[test] = 0.5 + 0.5 * lean * np.where(labels[test] == 1, 1, -1)
    return hits


def _logistic_hits(numbers: NDArray, labels: NDArray[np.int_], fold_of: NDArray[np.int_]) -> NDArray:
    hits = np.zeros(len(labels))
    for fold in np.unique(fold_of):
        train, test = fold_of != fold, fold_of == fold
        scale = StandardScaler().fit(numbers[train])
        model = LogisticRegression(class_weight="balanced", max_iter=200)
        model.fit(scale.transform(numbers[train]), labels[train])
        hits[test] = model.predict(scale.transform(numbers[test])) == labels[test]
    return hits


def balanced_accuracy(
    hits: NDArray, labels: NDArray[np.int_], prompts: NDArray[np.int_], alpha: float = 0.05
) -> tuple[float, float, float]:
    """Mean of the two sides' recalls, and its interval (accuracy, low, high).

    The variance is cluster-robust over prompts (Liang & Zeger 1986): with e_p = Σ_{i in p} (hit_i −
    recall_side(i)) / (2 n_side(i)) it is Σ_p e_p². Each side gets two prompts judged right and two judged
    wrong on top (Agresti & Coull 1998), so that an accuracy of 1 is not taken for certain. Student's
    quantile, because prompts may be few.

    Args:
        hits: [n] in [0, 1], whether each response was told rightly.
        labels: [n] 1 for demonstrations, 0 for rollouts.
        prompts: [n] prompt of each response.
        alpha: error of the two-sided interval.
    """
    accuracy = float(np.mean([hits[labels == side].mean() for side in (0, 1)]))
    centre, squares, residuals = 0.0, 0.0, np.zeros(int(prompts.max()) + 1)
    for side in (0, 1):
        rows = labels == side
        size = rows.sum() / len(np.unique(prompts[rows]))
        total = rows.sum() + 4 * size
        recall = (hits[rows].sum() + 2 * size) / total
        centre += recall / 2
        np.add.at(residuals, prompts[rows], (hits[rows] - recall) / (2 * total))
        squares += 2 * (size / (2 * total)) ** 2 * ((1 - recall) ** 2 + recall**2)
    width = student.ppf(1 - alpha / 2, len(np.unique(prompts)) - 1) * np.sqrt(squares + (residuals**2).sum())
    return accuracy, max(0.0, min(centre - width, accuracy)), min(1.0, max(centre + width, accuracy))


def _commonest(counts: Counter[str]) -> tuple[str, ...]:
    total = counts.total()
    return tuple(f"{value} ({times / total:.0%})" for value, times in counts.most_common(3))


def _typical(seen: Sequence[str], first: NDArray) -> tuple[str, ...]:
    """What is seen at the median, the 10th and the 90th percentile of the probe's first number."""
    order = np.argsort(first, kind="stable")
    return tuple(seen[order[round(q * (len(order) - 1))]] for q in (0.5, 0.1, 0.9))
