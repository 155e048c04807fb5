"""Where every response is: `submitted == trained + dropped + failed + in flight`, always.

Counts are in responses. `in_flight` is kept as its own set of groups, not derived from the other numbers, so
that a lost or doubly counted group shows as a broken balance.
"""

from dataclasses import dataclass, field


class LedgerError(AssertionError):
    """A group was counted twice, or settled without having been submitted."""


@dataclass
class Ledger:
    """Accounts of all responses of a run; `dropped` and `failed` are by reason."""

    submitted: int = 0
    trained: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    failed: dict[str, int] = field(default_factory=dict)
    in_flight: dict[str, int] = field(default_factory=dict)

    def submit(self, group_id: str, responses: int) -> None:
        """`responses` of a group were asked for."""
        if group_id in self.in_flight:
            raise LedgerError(f"group {group_id} was submitted twice")
        self.in_flight[group_id] = responses
        self.submitted += responses

    def train(self, group_id: str) -> None:
        """The group went into a learner step."""
        self.trained += self._settle(group_id)

    def drop(self, group_id: str, reason: str) -> None:
        """The group came back and was not used."""
        self.dropped[reason] = self.dropped.get(reason, 0) + self._settle(group_id)

    def fail(self, group_id: str, reason: str) -> None:
        """The group never came back."""
        self.failed[reason] = self.failed.get(reason, 0) + self._settle(group_id)

    def _settle(self, group_id: str) -> int:
        if group_id not in self.in_flight:
            raise LedgerError(f"group {group_id} is not in flight")
        return self.in_flight.pop(group_id)

    def check(self) -> dict[str, int]:
        """The balance, as numbers for the metrics.

        Raises:
            LedgerError: it does not add up.
        """
        totals = {
            "submitted": self.submitted,
            "trained": self.trained,
            "dropped": sum(self.dropped.values()),
            "failed": sum(self.failed.values()),
            "in_flight": sum(self.in_flight.values()),
        }
        if totals["submitted"] != sum(totals.values()) - totals["submitted"]:
            raise LedgerError(f"responses do not add up: {totals}")
        return totals

    def state(self) -> dict[str, object]:
        """For the checkpoint. Groups in flight are asked for again after a resume: they count as never
        submitted.
        """
        return {
            "submitted": self.submitted - sum(self.in_flight.values()),
            "trained": self.trained,
            "dropped": dict(self.dropped),
            "failed": dict(self.failed),
        }
