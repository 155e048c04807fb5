"""The accounts balance, and a wrong entry is an error instead of a wrong number."""

import numpy as np
import pytest

from services.ledger import Ledger, LedgerError


def test_every_way_out_of_flight():
    ledger = Ledger()
    for i in range(4):
        ledger.submit(f"g{i}", 8)
    ledger.train("g0")
    ledger.drop("g1", "policy_lag")
    ledger.fail("g2", "generation failed")
    assert ledger.check() == {"submitted": 32, "trained": 8, "dropped": 8, "failed": 8, "in_flight": 8}
    assert (ledger.dropped, ledger.failed) == ({"policy_lag": 8}, {"generation failed": 8})


@pytest.mark.parametrize("settle", ["train", "drop", "fail"])
def test_a_group_is_settled_once(settle):
    ledger = Ledger()
    ledger.submit("g", 4)
    ledger.train("g")
    with pytest.raises(LedgerError, match="group g is not in flight"):
        getattr(ledger, settle)(*(["g"] if settle == "train" else ["g", "why"]))
    assert ledger.check()["trained"] == 4


def test_a_group_cannot_be_submitted_twice_while_in_flight():
    ledger = Ledger()
    ledger.submit("g", 4)
    with pytest.raises(LedgerError, match="submitted twice"):
        ledger.submit("g", 4)


def test_a_broken_balance_is_loud():
    ledger = Ledger()
    ledger.submit("g", 4)
    del ledger.in_flight["g"]  # a group that went missing without a word
    with pytest.raises(LedgerError, match="do not add up"):
        ledger.check()


def test_balance_under_random_histories_and_across_a_checkpoint():
    rng = np.random.default_rng(0)
    ledger, asked, flight = Ledger(), 0, {}
    settled = {"train": 0, "drop": 0, "fail": 0}
    for i in range(500):
        if rng.random() < 0.5 or not flight:
            flight[f"g{i}"] = int(rng.integers(1, 9))
            ledger.submit(f"g{i}", flight[f"g{i}"])
            asked += flight[f"g{i}"]
        else:
            group = str(rng.choice(list(flight)))
            how = str(rng.choice(list(settled)))
            getattr(ledger, how)(*([group] if how == "train" else [group, "why"]))
            settled[how] += flight.pop(group)
        totals = ledger.check()
        assert totals["submitted"] == asked
        assert totals["in_flight"] == sum(flight.values())
        assert [totals[k] for k in ("trained", "dropped", "failed")] == list(settled.values())
    resumed = Ledger(**ledger.state())
    assert resumed.check()["in_flight"] == 0
    assert resumed.check()["submitted"] == asked - sum(flight.values()) == sum(settled.values())
    for group, responses in flight.items():
        resumed.submit(group, responses)
    assert resumed.check() == ledger.check()
