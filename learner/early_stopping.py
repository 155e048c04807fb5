"""When to stop training by a held-out measure: after so many looks without improvement."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class EarlyStopping:
    """Follows a measure of which more is better (of a loss, give the negative).

    stopping = EarlyStopping(patience=5)
    if stopping.observe(step, accuracy):
        ...                                 # the best so far: keep these weights
    if stopping.exhausted:
        ...                                 # stop and restore them

    A tie is no improvement, and neither is a value that is no number.
    """

    patience: int
    best: float = float("-inf")
    best_step: int | None = None
    """Step of the best value; None before the first improvement."""
    looks: int = field(default=0, init=False)
    """Looks since the best one."""

    def observe(self, step: int, value: float) -> bool:
        """Record one look; True when it is the best so far."""
        if value > self.best:
            self.best, self.best_step, self.looks = value, step, 0
            return True
        self.looks += 1
        return False

    @property
    def exhausted(self) -> bool:
        """Whether `patience` looks in a row brought nothing better."""
        return self.looks >= self.patience

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        best = None if self.best_step is None else self.best
        return {"best": best, "best_step": self.best_step, "looks": self.looks}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.best = float("-inf") if state["best"] is None else state["best"]
        self.best_step, self.looks = state["best_step"], state["looks"]
