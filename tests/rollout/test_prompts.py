import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from transformers import AutoTokenizer

from rollout.config import DataConfig, PolicyConfig
from rollout.data import PROMPT_SCHEMA, DataError, prompt_id
from rollout.prompts import PromptSource, evaluation_requests, request_seed
from rollout.templates import Renderer, end_of_response_id, load_tokenizer
from rollout.trajectory import REQUEST_SCHEMA


def prompts(count: int) -> pa.Table:
    texts = [f"prompt {i}" for i in range(count)]
    return pa.table(
        {"prompt_id": [prompt_id(t) for t in texts], "prompt": texts, "prompt_text": texts},
        schema=PROMPT_SCHEMA,
    )


def source(table: pa.Table, seed: int = 0) -> PromptSource:
    return PromptSource(table, lambda text: list(text.encode()), group_size=4, seed=seed)


def ids(table: pa.Table) -> list[str]:
    return table["prompt_id"].to_pylist()


def test_requests_have_the_schema_and_their_own_ids_and_seeds() -> None:
    table = source(prompts(10)).next(3, step=7)
    assert table.schema == REQUEST_SCHEMA
    rows = table.to_pylist()
    assert [row["group_id"] for row in rows] == ["000007-00000", "000007-00001", "000007-00002"]
    for index, row in enumerate(rows):
        assert row["prompt_id"] == prompt_id(row["prompt_text"])
        assert bytes(row["prompt_ids"]).decode() == row["prompt_text"]
        assert row["seed"] == request_seed(0, 7, row["prompt_id"], index)
        assert row["n"] == 4
    assert len({row["seed"] for row in rows}) == 3
    assert all(0 <= request_seed(0, step, "x", 0) < 2**62 for step in range(1000))


def test_every_epoch_is_another_permutation_whatever_the_file_order() -> None:
    table = prompts(10)
    one, two = source(table), source(table.take(list(reversed(range(10)))))
    first, second = ids(one.next(10, 0)), ids(one.next(10, 1))
    assert sorted(first) == sorted(second) == sorted(ids(table))
    assert first != second
    assert ids(two.next(4, 0)) + ids(two.next(11, 1)) == first + second[:5]
    assert two.epoch == 1
    assert ids(source(table, seed=1).next(10, 0)) != first


def some_demonstrated(count: int, known: int) -> pa.Table:
    """Prompts of which `known`, anywhere among them by id, have a demonstration."""
    return prompts(count).append_column("demonstrated", pa.array([i < known for i in range(count)]))


def test_prompts_that_all_have_a_demonstration_keep_their_plain_shuffled_order() -> None:
    table = prompts(50).sort_by("prompt_id")
    drawn = source(table, seed=3)
    for epoch in range(3):
        plain = np.random.Generator(np.random.PCG64([3, epoch])).permutation(50)
        assert ids(drawn.next(50, epoch)) == ids(table.take(plain))
    marked = source(some_demonstrated(50, 50), seed=3)
    assert marked.state() == source(table, seed=3).state()
    assert ids(marked.next(60, 0)) == ids(source(table, seed=3).next(60, 0))


@pytest.mark.parametrize(("count", "known", "per_step"), [(40, 5, 16), (41, 3, 28), (9, 8, 3), (30, 1, 60)])
def test_every_step_has_a_prompt_with_a_demonstration_where_two_are_to_be_expected(
    count: int, known: int, per_step: int
) -> None:
    table = some_demonstrated(count, known)
    own = set(ids(table)[:known])
    for seed in range(20):
        drawn = source(table, seed=seed)
        passes = [ids(drawn.next(count, 0)) for _ in range(8)]
        assert all(sorted(one) == sorted(ids(table)) for one in passes)
        assert passes[0] != passes[1]
        row = [name in own for one in passes for name in one]
        windows = [sum(row[at : at + per_step]) for at in range(len(row) - per_step)]
        assert min(windows) >= 1
        inside = [sum(row[at : at + per_step]) for at in range(count - per_step)]
        assert not inside or max(inside) - min(inside) <= 2


def test_a_cursor_is_refused_when_another_prompt_has_lost_its_demonstration() -> None:
    state = source(some_demonstrated(10, 4)).state()
    with pytest.raises(DataError, match="training prompts"):
        source(some_demonstrated(10, 5)).load_state(state)


@pytest.mark.parametrize("taken", [0, 3, 10, 13])  # 10: exactly the end of an epoch
def test_a_resumed_cursor_continues_where_it_was(taken: int) -> None:
    unbroken = source(prompts(10))
    unbroken.next(taken, 0)
    resumed = source(prompts(10))
    resumed.load_state(json.loads(json.dumps(unbroken.state())))
    for step in range(1, 5):
        assert resumed.next(6, step).equals(unbroken.next(6, step))


def test_cursor_of_other_prompts_or_seed_is_refused() -> None:
    state = source(prompts(10)).state()
    with pytest.raises(DataError, match="training prompts"):
        source(prompts(11)).load_state(state)
    with pytest.raises(DataError, match="seed"):
        source(prompts(10), seed=1).load_state(state)
    with pytest.raises(DataError, match="no prompts"):
        source(prompts(0))


def test_evaluation_requests_hold_each_prompt_once() -> None:
    table = pa.concat_tables([prompts(5), prompts(5)])
    requests = evaluation_requests(table, lambda text: [1], samples=2, step=3, seed=0)
    assert ids(requests) == sorted(ids(prompts(5)))
    assert requests.schema == REQUEST_SCHEMA


def renderer(model: Path, tokenizer: Any = None, end: str = "", **data: Any) -> Renderer:
    policy = PolicyConfig(model=str(model), end_of_response=end)
    return Renderer(tokenizer or load_tokenizer(policy), DataConfig(**data), policy)


def test_text_prompts_use_the_template_and_the_tokenizers_own_prefix(tiny_model: Path) -> None:
    plain = renderer(tiny_model, prompt_template="Q: {prompt}\n{{A}}:")
    text = plain.render("why {x}?")
    assert text == "Q: why {x}?\n{A}:"
    assert plain.tokenizer.decode(plain.encode(text)) == text
    with_bos = AutoTokenizer.from_pretrained(tiny_model)
    from tokenizers.processors import TemplateProcessing

    eos = with_bos.eos_token_id
    with_bos.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|system|> $A <|end|>",
        special_tokens=[("<|system|>", with_bos.convert_tokens_to_ids("<|system|>")), ("<|end|>", eos)],
    )
    assert with_bos("cat")["input_ids"][-1] == eos
    marked = renderer(tiny_model, with_bos)
    assert marked.encode("cat") == [with_bos.convert_tokens_to_ids("<|system|>"), *plain.encode("cat")]
    assert renderer(tiny_model, with_bos, prompt_format="chat").encode("cat") == plain.encode("cat")


def test_chat_prompts_use_the_chat_template(tiny_model: Path) -> None:
    chat = renderer(
        tiny_model, prompt_format="chat", system_prompt="Be brief.", prompt_template="Say {prompt}"
    )
    assert chat.render(json.dumps("hi")) == "<|system|>Be brief.\n<|user|>Say hi\n<|assistant|>"
    own = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    assert chat.render(json.dumps(own)) == "<|system|>S\n<|user|>U\n<|assistant|>"


def test_length_complaints(tiny_model: Path) -> None:
    short = renderer(tiny_model, max_prompt_tokens=5)
    texts = ["cat", "", "the dog lay by the door and the cat sat on the mat"]
    tokens = len(short.encode(texts[2]))
    fine, empty, long = short.check_lengths(texts)
    assert fine is None
    assert "empty" in str(empty)
    assert f"{tokens} tokens" in str(long)
    assert short.check_lengths([]) == []


def test_end_of_response(tiny_model: Path) -> None:
    policy = PolicyConfig(model=str(tiny_model))
    tokenizer = load_tokenizer(policy)
    assert end_of_response_id(tokenizer, policy) == tokenizer.eos_token_id
    newline = end_of_response_id(tokenizer, policy.model_copy(update={"end_of_response": "\n"}))
    assert tokenizer.decode([newline]) == "\n"
    named = end_of_response_id(tokenizer, policy.model_copy(update={"end_of_response": "<|user|>"}))
    assert tokenizer.convert_ids_to_tokens(named) == "<|user|>"
    with pytest.raises(DataError, match=r"must be exactly one, such as '<\|end\|>' or '\\n'"):
        end_of_response_id(tokenizer, policy.model_copy(update={"end_of_response": "\n\n\n\n"}))
    tokenizer.eos_token = None
    with pytest.raises(DataError, match=r"no EOS token; set policy\.end_of_response"):
        end_of_response_id(tokenizer, policy)


def test_what_the_renderer_refuses(tiny_model: Path) -> None:
    without = AutoTokenizer.from_pretrained(tiny_model)
    without.chat_template = None
    with pytest.raises(DataError, match="has no chat template; use"):
        renderer(tiny_model, without, prompt_format="chat")
    for template in ("no field", "{prompt} {other}", "{prompt", "{}"):
        with pytest.raises(DataError, match="prompt_template"):
            renderer(tiny_model, prompt_template=template)
    with pytest.raises(DataError, match="system_prompt"):
        renderer(tiny_model, system_prompt="x")


def test_unknown_models(tmp_path: Path) -> None:
    (tmp_path / "hollow").mkdir()
    for name, message in (
        ("", "not set"),
        ("./absent", "no such folder"),
        (str(tmp_path / "hollow"), "config.json"),
    ):
        with pytest.raises(DataError, match=message):
            load_tokenizer(PolicyConfig(model=name))
    with pytest.raises(DataError, match=r"nobody/nothing.*not cached"):
        load_tokenizer(PolicyConfig(model="nobody/nothing"))  # conftest sets HF_HUB_OFFLINE


def test_samples_show_the_users_words_without_the_template(tiny_model):
    policy = PolicyConfig(model=str(tiny_model))
    tokenizer = load_tokenizer(policy)
    text = Renderer(tokenizer, DataConfig(demonstrations="d", prompt_template="Sum up: {prompt}"), policy)
    assert text.shown("a cat") == "a cat"
    chat = DataConfig(demonstrations="d", prompt_format="chat")
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "a cat"}]
    assert Renderer(tokenizer, chat, policy).shown(json.dumps(turns)) == "a cat"
    assert Renderer(tokenizer, chat, policy).shown(json.dumps("a dog")) == "a dog"
