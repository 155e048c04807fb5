"""Too little data is named before anything starts, by the setting that the method reads."""

from types import SimpleNamespace

import pyarrow as pa
import pytest

from rollout.data import DataError
from services.config import load
from services.input_checks import check_data


def splits(**rows: int) -> SimpleNamespace:
    counts = {
        "train": 64,
        "heldout": 8,
        "selection": 8,
        "test": 8,
        "preferences": 64,
        "heldout_preferences": 8,
    }
    return SimpleNamespace(**{name: pa.table({"x": [0] * n}) for name, n in (counts | rows).items()})


@pytest.mark.parametrize(
    ("words", "rows", "message"),
    [
        ([], {"train": 63}, r"training demonstrations: 63 rows.*discriminator\.batch_size"),
        (["--run.method=sft"], {"train": 63}, r"training demonstrations: 63 rows.*learner\.sft\.batch_size"),
        ([], {"selection": 7}, r"selection split: 7 rows.*data\.selection_fraction"),
        (
            ["--run.method=rlhf", "--data.preferences=p"],
            {"preferences": 9},
            r"preference pairs: 9 rows, at least 64.*discriminator\.batch_size",
        ),
        (
            ["--run.method=rlhf", "--data.preferences=p"],
            {"heldout_preferences": 7},
            r"held-out preference pairs: 7 rows.*data\.heldout_fraction",
        ),
    ],
)
def test_too_few_rows_are_refused(words, rows, message):
    config = load(None, ["--policy.model=m", "--data.demonstrations=d", *words])
    with pytest.raises(DataError, match=message):
        check_data(config, splits(**rows))
    check_data(config, splits())
