"""What an evaluation says of the human answers' likelihood."""

import numpy as np
import pyarrow as pa
import pytest

from services.answers import HumanNLL


def test_the_tail_is_the_tenth_that_is_least_likely() -> None:
    nats = np.array([1.0, 40.0, *[2.0] * 17, 20.0])
    answers = pa.table({"response_ids": [[7] * (1 + row % 2) for row in range(20)]})
    assert HumanNLL.of(nats, answers) == HumanNLL(per_token=pytest.approx(95 / 30), tail=30.0)


def test_few_answers_have_a_tail_of_one() -> None:
    answers = pa.table({"response_ids": [[1], [2, 3]]})
    assert HumanNLL.of(np.array([1.0, 5.0]), answers) == HumanNLL(per_token=2.0, tail=5.0)
