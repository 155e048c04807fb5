"""What each step's own samples say about modes: cheaper than an evaluation, and at every step."""

from collections import deque
from collections.abc import Sequence

import numpy as np

from examples.known_modes.language import MODES, Distribution, Sentence, parse_text
from examples.known_modes.measures import mode_frequencies, mode_tv
from services.evaluation.monitors import mode_monitors

WINDOW = 8
"""Steps that its frequency is taken over."""
GONE = 0.05
"""A mode is gone when it has less than this share of its mass."""


class ModeWindow:
    """Frequencies of modes over the responses of the last `steps` steps."""

    def __init__(self, target: Distribution, steps: int = WINDOW) -> None:
        self.target = target
        self._recent: deque[np.ndarray] = deque(maxlen=steps)

    def add(self, texts: Sequence[str]) -> None:
        """Take in one step's responses."""
        self._recent.append(mode_frequencies([parse_text(text) for text in texts]))

    def numbers(self) -> dict[str, float]:
        """`valid`, `mode_tv` (0 is the target) and `gone`, the number of the target's modes that are gone."""
        frequencies = np.mean(self._recent, axis=0)
        mass = np.asarray(self.target.modes)
        return {
            "valid": float(frequencies.sum()),
            "mode_tv": mode_tv(frequencies, self.target),
            "gone": float(((mass > 0) & (frequencies < GONE * mass)).sum()),
        }


def known_mode_monitors(human: Sequence[str], generated: Sequence[str]) -> dict[str, float]:
    """`services.evaluation.monitors.mode_monitors` on the modes themselves in place of clusters; what is not
    valid is one mode more."""
    return mode_monitors(*([_mode(parse_text(text)) for text in texts] for texts in (human, generated)))


def _mode(sentence: Sentence | None) -> int:
    return MODES if sentence is None else sentence.mode
