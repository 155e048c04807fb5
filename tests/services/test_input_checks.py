"""Too little data is named before anything starts, by the setting that the method reads."""

import pyarrow as pa
import pytest

from rollout.data import PROMPT_SCHEMA, DataError, DataSplits
from services.config import load
from services.input_checks import check_data


def splits(**rows: int) -> DataSplits:
    counts = {
        "train": 64,
        "heldout": 8,
        "selection": 8,
        "test": 8,
        "preferences": 64,
        "heldout_preferences": 8,
        "extra_prompts": 0,
    }
    names = {name: [f"{name} {i}" for i in range(n)] for name, n in (counts | rows).items()}
    return DataSplits(**{name: pa.table([ids] * 3, schema=PROMPT_SCHEMA) for name, ids in names.items()})


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
        (
            ["--run.prompts_per_step=8"],
            {"extra_prompts": 193},
            r"data\.prompts: 64 of 257 .*run\.prompts_per_step = 8 .*to 9, or .*no more than 192 prompts",
        ),
    ],
)
def test_too_few_rows_are_refused(words, rows, message):
    config = load(None, ["--policy.model=m", "--data.demonstrations=d", *words])
    with pytest.raises(DataError, match=message):
        check_data(config, splits(**rows))
    check_data(config, splits())


@pytest.mark.parametrize("home", ["train", "test"])
def test_one_prompt_for_all_rows_has_advice_that_helps(home):
    config = load(None, ["--policy.model=m", "--data.demonstrations=d"])
    one = pa.table([["one"] * 400] * 3, schema=PROMPT_SCHEMA)
    every = splits(train=0, heldout=0, selection=0, test=0)
    setattr(every, home, one)
    with pytest.raises(DataError, match=r"400 rows have 1 different prompt\(s\).*first words of each answer"):
        check_data(config, every)


@pytest.mark.parametrize(
    ("words", "further"),
    [
        (["--run.prompts_per_step=8"], 192),
        (["--run.prompts_per_step=1"], 0),
        (["--run.prompts_per_step=8", "--run.method=sft"], 9999),
        (["--run.prompts_per_step=8", "--run.method=rlhf"], 9999),
    ],
)
def test_further_prompts_are_limited_only_where_a_discriminator_learns_along(words, further):
    config = load(None, ["--policy.model=m", "--data.demonstrations=d", *words])
    check_data(config, splits(extra_prompts=further))
