"""What an evaluation says of the human answers' likelihood."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from discriminator.canonical import Canonicaliser
from discriminator.config import CanonicalConfig
from rollout.config import DataConfig, PolicyConfig
from rollout.templates import Renderer, load_tokenizer
from services.answers import HumanNLL, human_answers


def test_the_tail_is_the_tenth_that_is_least_likely() -> None:
    nats = np.array([1.0, 40.0, *[2.0] * 17, 20.0])
    answers = pa.table({"response_ids": [[7] * (1 + row % 2) for row in range(20)]})
    assert HumanNLL.of(nats, answers) == HumanNLL(per_token=pytest.approx(95 / 30), tail=30.0)


def test_few_answers_have_a_tail_of_one() -> None:
    answers = pa.table({"response_ids": [[1], [2, 3]]})
    assert HumanNLL.of(np.array([1.0, 5.0]), answers) == HumanNLL(per_token=2.0, tail=5.0)


def test_a_special_token_spelled_in_an_answer_is_letters_to_likelihood_sft_and_discriminator(
    tiny_model: Path,
) -> None:
    policy = PolicyConfig(model=str(tiny_model))
    tokenizer = load_tokenizer(policy)
    text = "press <|end|> or <|user|> for cat"
    split = pa.table({"prompt_id": ["a"], "prompt_text": ["say: "], "response": [text]})
    renderer = Renderer(tokenizer, DataConfig(), policy)
    (ids,) = human_answers(split, renderer, 64, CanonicalConfig())["response_ids"].to_pylist()
    judged = Canonicaliser(tokenizer, CanonicalConfig(), context=256).encode("say: ", text, complete=True)
    assert ids == judged.response_ids
    assert ids.count(tokenizer.eos_token_id) == 1
    assert tokenizer.convert_tokens_to_ids("<|user|>") not in ids
    assert tokenizer.decode(ids[:-1]) == text
