"""The known-modes language: what a sentence is, and two distributions over sentences.

A sentence is first head, second head, 2 to 6 slots (slot j from family j mod 4), the first head again,
perhaps a trailing token, and the end token. Its mode is the pair of heads: 8 x 4 = 32 modes. Base and expert
share the grammar and differ in weights; the expert uses 8 of the modes. Everything about both is exact:
sampling, probability of a sentence, entropy, divergence.

Token ids: 0 end (and padding), 1 begin, 2–9 first heads, 10–13 second heads, 14–29 slots (four families of
four), 30 trailing, 31 unknown. As text every token is a word: `a3 b1 c0 d2 e1 a3`.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import numpy as np

END, BEGIN, FIRST, SECOND, SLOTS, TRAILING, UNKNOWN = 0, 1, 2, 10, 14, 30, 31
FIRST_HEADS, SECOND_HEADS, FAMILIES, FAMILY_SIZE = 8, 4, 4, 4
MODES = FIRST_HEADS * SECOND_HEADS
LENGTHS = (2, 3, 4, 5, 6)
"""Possible numbers of slots."""
VOCABULARY = 32
LONGEST = 14
"""No sentence has more tokens than this; the longest has 11, its end token included."""

WORDS = (
    "<end>",
    "<begin>",
    *(f"a{i}" for i in range(FIRST_HEADS)),
    *(f"b{i}" for i in range(SECOND_HEADS)),
    *(f"{family}{i}" for family in "cdef" for i in range(FAMILY_SIZE)),
    "z",
    "<unk>",
)
"""Word of every token id."""
_ID = {word: token for token, word in enumerate(WORDS)}


class Sentence(NamedTuple):
    """A sentence of the language: heads and slots counted from 0 within their own class or family."""

    first: int
    second: int
    slots: tuple[int, ...]
    trailing: bool

    @property
    def mode(self) -> int:
        """Number of the pair of heads, 0 to 31."""
        return SECOND_HEADS * self.first + self.second


def tokens_of(sentence: Sentence) -> list[int]:
    """Token ids of a sentence, end token included."""
    slots = [SLOTS + FAMILY_SIZE * (j % FAMILIES) + value for j, value in enumerate(sentence.slots)]
    head = FIRST + sentence.first
    return [head, SECOND + sentence.second, *slots, head, *[TRAILING] * sentence.trailing, END]


def text_of(sentence: Sentence) -> str:
    """A sentence as words; the end token has none."""
    return " ".join(WORDS[token] for token in tokens_of(sentence)[:-1])


def parse(tokens: Sequence[int]) -> Sentence | None:
    """The sentence that these token ids spell, or None: they are not valid. The end token must be there."""
    body = list(tokens)
    if not body or body.pop() != END:
        return None
    trailing = bool(body) and body[-1] == TRAILING
    if trailing:
        body.pop()
    slots = len(body) - 3
    if slots not in LENGTHS or body[0] != body[-1]:
        return None
    sentence = Sentence(
        body[0] - FIRST,
        body[1] - SECOND,
        tuple(token - SLOTS - FAMILY_SIZE * (j % FAMILIES) for j, token in enumerate(body[2:-1])),
        trailing,
    )
    inside = 0 <= sentence.first < FIRST_HEADS and 0 <= sentence.second < SECOND_HEADS
    inside = inside and all(0 <= value < FAMILY_SIZE for value in sentence.slots)
    return sentence if inside else None


def parse_text(text: str) -> Sentence | None:
    """The sentence that this text spells, or None. Blanks around and between words do not matter."""
    return parse([*(_ID.get(word, UNKNOWN) for word in text.split()), END])


@dataclass(frozen=True)
class Distribution:
    """Independent mode, number of slots, slots and trailing token."""

    modes: tuple[float, ...]
    """Probability of each mode, [32]."""
    lengths: tuple[float, ...]
    """Probability of each number of slots in `LENGTHS`, [5]."""
    slots: tuple[float, ...]
    """Probability of each value of a slot, alike in all families, [4]."""
    trailing: float
    """Probability of the trailing token."""

    def sample(self, count: int, rng: np.random.Generator) -> list[Sentence]:
        """`count` independent sentences."""
        modes = rng.choice(MODES, size=count, p=self.modes)
        lengths = rng.choice(LENGTHS, size=count, p=self.lengths)
        slots = rng.choice(FAMILY_SIZE, size=(count, LENGTHS[-1]), p=self.slots)
        trailing = rng.random(count) < self.trailing
        return [
            Sentence(*divmod(int(mode), SECOND_HEADS), tuple(map(int, row[:length])), bool(extra))
            for mode, length, row, extra in zip(modes, lengths, slots, trailing, strict=True)
        ]

    def probability(self, sentence: Sentence) -> float:
        """Exact probability of a sentence."""
        length = self.lengths[len(sentence.slots) - LENGTHS[0]]
        slots = math.prod(self.slots[value] for value in sentence.slots)
        return (
            self.modes[sentence.mode]
            * length
            * slots
            * (self.trailing if sentence.trailing else 1 - self.trailing)
        )

    @property
    def mean_length(self) -> float:
        """Expected number of slots."""
        return sum(n * p for n, p in zip(LENGTHS, self.lengths, strict=True))

    @property
    def mean_tokens(self) -> float:
        """Expected number of tokens of a sentence, end token included."""
        return 4 + self.mean_length + self.trailing

    def entropy(self) -> float:
        """Entropy of a sentence in nats: H(mode) + H(length) + E[length] H(slot) + H(trailing)."""
        return self.cross_entropy(self)

    def cross_entropy(self, other: "Distribution") -> float:
        """−E log q in nats, this distribution under `other` (inf where `other` has no mass)."""
        flag, other_flag = ((d.trailing, 1 - d.trailing) for d in (self, other))
        return (
            _cross(self.modes, other.modes)
            + _cross(self.lengths, other.lengths)
            + self.mean_length * _cross(self.slots, other.slots)
            + _cross(flag, other_flag)
        )


def _cross(p: Iterable[float], q: Iterable[float]) -> float:
    pairs = [(a, b) for a, b in zip(p, q, strict=True) if a > 0]
    return math.inf if any(b == 0 for _, b in pairs) else -sum(a * math.log(b) for a, b in pairs)


def _modes(weights: dict[int, float]) -> tuple[float, ...]:
    return tuple(weights.get(mode, 0.0) for mode in range(MODES))


BASE = Distribution((1 / MODES,) * MODES, (0.2,) * 5, (0.25,) * 4, 0.1)
EXPERT = Distribution(
    _modes({0: 0.3, 5: 0.2, 10: 0.15, 15: 0.1, 16: 0.1, 21: 0.05, 26: 0.05, 31: 0.05}),
    (0.05, 0.25, 0.4, 0.25, 0.05),
    (0.55, 0.25, 0.15, 0.05),
    0.1,
)
DISTRIBUTIONS = {"base": BASE, "expert": EXPERT}


def every_sentence() -> Iterable[Sentence]:
    """All 349,184 sentences of the language."""
    for mode, length, trailing in product(range(MODES), LENGTHS, (False, True)):
        for slots in product(range(FAMILY_SIZE), repeat=length):
            yield Sentence(*divmod(mode, SECOND_HEADS), slots, trailing)


def natural_copy_rate(demonstrations: Iterable[Sentence | None], distribution: Distribution) -> float:
    """Probability that a fresh sentence of `distribution` is one of the demonstrations (invalid: none)."""
    return sum(distribution.probability(sentence) for sentence in set(demonstrations) if sentence is not None)
