"""A template is a program of the model's author: what it may see, and that nothing it does is a traceback."""

import json
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from discriminator.canonical import Canonicaliser
from discriminator.config import CanonicalConfig
from rollout.config import DataConfig, PolicyConfig
from rollout.data import SPLITS, DataError, DataSplits, ReadReport, load_data, read_demonstrations
from rollout.prompts import PromptSource
from rollout.rows import check_row
from rollout.templates import Renderer

DATED = (
    "{{ 'Today Date: ' + strftime_now('%d %b %Y') + '\n' }}"
    "{% for m in messages %}{{ m['content'] }}{% endfor %}"
)
CALLS = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% for call in m.tool_calls or [] %}"
    "{% for k, v in call.function.arguments|items %}{{ k }}={{ v }}{% endfor %}{% endfor %}{% endfor %}"
)


def renderer(model: Path, template: str | None = None, tokenizer: Any = None, **data: Any) -> Renderer:
    tokenizer = tokenizer or AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = template or tokenizer.chat_template
    return Renderer(tokenizer, DataConfig(**data), PolicyConfig(model=str(model)))


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def splits(model: Path, path: str, template: str | None = None, **settings: Any) -> DataSplits:
    data = DataConfig(demonstrations=path, **settings)
    return load_data(data, renderer(model, template, **settings))


def members(all_four: DataSplits) -> dict[str, list[str]]:
    return {name: getattr(all_four, name)["prompt_id"].to_pylist() for name in SPLITS}


def test_a_date_in_the_template_is_the_runs_and_moves_no_prompt(tiny_model: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": f"say {i}", "response": "r"} for i in range(104)])
    days = [date(2026, 11, 30), date(2026, 12, 1)]
    first, next_day = (splits(tiny_model, path, DATED, prompt_format="chat", today=day) for day in days)
    assert first.test["prompt_text"][0].as_py().startswith("Today Date: 30 Nov 2026\nsay ")
    assert next_day.test["prompt_text"][0].as_py().startswith("Today Date: 01 Dec 2026\nsay ")
    assert members(first) == members(next_day)
    begun = PromptSource(first.rollout_prompts(), lambda text: [1], 1, 0)
    begun.next(3, 0)
    PromptSource(next_day.rollout_prompts(), lambda text: [1], 1, 0).load_state(begun.state())


def test_a_prompt_has_one_split_under_every_template(tiny_model: Path, tmp_path: Path) -> None:
    words = [f"say {i}" for i in range(100)]
    text = write(tmp_path / "a.jsonl", [{"prompt": word, "response": "r"} for word in words])
    turns = [{"prompt": [{"content": word, "role": "user"}], "response": "r"} for word in words]
    chat = write(tmp_path / "b.jsonl", turns)
    expected = members(splits(tiny_model, text))
    for path, options in (
        (text, {"prompt_template": "Q: {prompt}"}),
        (text, {"prompt_format": "chat", "system_prompt": "Be brief."}),
        (text, {"prompt_format": "chat", "prompt_template": "Q: {prompt}"}),
        (chat, {"prompt_format": "chat"}),
    ):
        assert members(splits(tiny_model, path, **options)) == expected, options


def test_prompts_of_which_the_template_makes_one_text_share_a_split(tiny_model: Path, tmp_path: Path) -> None:
    prompts = [
        [{"role": "user", "content": f"{space}say {i}", "number": i}]
        for i in range(50)
        for space in ("", " ")
    ]
    path = write(tmp_path / "a.jsonl", [{"prompt": prompt, "response": "r"} for prompt in prompts])
    trimmed = "{{ messages[0].content | trim }}"
    found = splits(tiny_model, path, trimmed, prompt_format="chat")
    texts = [set(getattr(found, name)["prompt_text"].to_pylist()) for name in SPLITS]
    assert sum(map(len, texts)) == len(set().union(*texts)) == 50
    assert len({one for ids in members(found).values() for one in ids}) == 50
    data = DataConfig(demonstrations=path, prompts=path, prompt_format="chat")
    with_prompts = load_data(data, renderer(tiny_model, trimmed, prompt_format="chat"))
    assert set(with_prompts.rollout_prompts()["prompt_text"].to_pylist()) == texts[0]


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[0].content + 1 }}",
        "{{ 1 // 0 }}",
        "{{ messages[0].content.absent.more }}",
        "{{ [].pop() }}",
        "{{ raise_exception('a\nb') }}",
        "{% for %}",
        "{{ {}['x'].y }}",
        "{{ messages[0].content | tojson(indent='x', separators=3) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ strftime_now(3) }}",
        CALLS,
    ],
)
@pytest.mark.parametrize("today", [None, date(2026, 1, 1)])
def test_whatever_a_template_raises_is_one_sentence_with_the_row(
    tiny_model: Path, tmp_path: Path, template: str, today: date | None
) -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"arguments": '{"a": 1}'}}]}
    prompt = [{"role": "user", "content": "x"}, call, {"role": "tool", "content": "4"}]
    path = write(tmp_path / "a.jsonl", [{"prompt": prompt, "response": "r"}])
    data = DataConfig(prompt_format="chat", today=today)
    with pytest.raises(DataError) as caught:
        read_demonstrations(path, data, renderer(tiny_model, template, prompt_format="chat", today=today))
    assert str(caught.value).startswith(f"{path}:1: the chat template of")
    assert "\n" not in str(caught.value)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)
CALL = st.fixed_dictionaries({"function": st.fixed_dictionaries({"arguments": st.text(max_size=5) | VALUES})})
ROLES = st.sampled_from(["system", "user", "assistant", "tool"])
CHAT = st.fixed_dictionaries(
    {"role": ROLES, "content": st.text(max_size=20)},
    optional={"tool_calls": st.lists(CALL, max_size=2) | VALUES, "name": VALUES},
)
ODD = st.fixed_dictionaries(
    {"role": ROLES | VALUES}, optional={"content": VALUES, "tool_calls": st.lists(CALL)}
)
PROMPT = st.lists(CHAT, max_size=4) | st.lists(CHAT | ODD | VALUES, max_size=4) | VALUES


@pytest.mark.parametrize("cases", [150, pytest.param(10_000, marks=pytest.mark.slow)])
def test_any_messages_are_rendered_or_refused_by_any_template(tiny_model: Path, cases: int) -> None:
    """As a file's row: checked, rendered and shown."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    templates = [
        tokenizer.chat_template,
        DATED,
        CALLS,
        "{{ messages | tojson }}",
        "{{ messages[1].content }}",
    ]
    made = [
        renderer(tiny_model, template, AutoTokenizer.from_pretrained(tiny_model), prompt_format="chat")
        for template in templates
    ]

    @settings(max_examples=cases, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(made), PROMPT)
    def holds(one: Renderer, prompt: object) -> None:
        record = {"prompt": prompt, "response": "r"}
        row = check_row("a:1", record, "prompt", ["response"], "chat", ReadReport("a", stop=False))
        if row is None:
            return
        try:
            text = one.render(row.prompt)
        except DataError as error:
            assert "\n" not in str(error)  # noqa: PT017
            return
        one.encode(text)
        one.check_lengths([text])
        assert isinstance(one.shown(row.prompt), str)

    holds()


def test_template_variables_reach_the_template(tiny_model: Path) -> None:
    thinking = "{% if enable_thinking is defined and not enable_thinking %}<off>{% endif %}{{ tools }}"
    chat = renderer(
        tiny_model, thinking, prompt_format="chat", template_variables={"enable_thinking": False, "tools": []}
    )
    assert chat.render(json.dumps("x")) == "<off>[]"
    for name in ("tokenize", "add_generation_prompt", "messages", "conversation", "strftime_now"):
        with pytest.raises(DataError, match=f"data.template_variables: {name} is set by rlgaf itself"):
            renderer(tiny_model, prompt_format="chat", template_variables={name: 1})
    with pytest.raises(DataError, match=r"data\.template_variables needs data\.prompt_format"):
        renderer(tiny_model, template_variables={"enable_thinking": False})


@pytest.mark.parametrize(
    "field", ["{prompt:d}", "{prompt!r}", "{prompt.real}", "{prompt[0]}", "{prompt:{prompt}}"]
)
def test_a_prompt_stands_in_its_template_as_it_is(tiny_model: Path, field: str) -> None:
    with pytest.raises(DataError, match=r"must use \{prompt\}, as it stands, and no other field"):
        renderer(tiny_model, prompt_template=field)


def test_a_template_that_spells_bos_gives_one_bos_on_both_sides(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.bos_token = "<|system|>"
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|system|> $A", special_tokens=[("<|system|>", bos)]
    )
    spelled = renderer(tiny_model, None, tokenizer, prompt_template="<|system|>say {prompt}")
    bare = renderer(tiny_model, None, tokenizer, prompt_template="say {prompt}")
    ids = spelled.encode(spelled.render("cat"))
    assert ids.count(bos) == 1
    assert ids == bare.encode(bare.render("cat"))
    judged = Canonicaliser(tokenizer, CanonicalConfig(), context=256).encode_prompt(spelled.render("cat"))
    assert judged == ids
    exact = renderer(
        tiny_model, None, tokenizer, max_prompt_tokens=len(ids), prompt_template="<|system|>{prompt}"
    )
    assert exact.check_lengths([spelled.render("cat")]) == [None]
