import random
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from transformers import AutoTokenizer

from discriminator.canonical import (
    Canonicaliser,
    _joins_backwards,
    _Memory,
    _Spelling,
    normalise,
    prepare_demonstrations,
    spread_to_sampled,
)
from discriminator.config import CanonicalConfig
from rollout.trajectory import text_and_token_ends

COLLAPSE = CanonicalConfig()


@pytest.fixture
def tokenizer(tiny_model: Path):
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture
def canonical(tokenizer) -> Canonicaliser:
    return Canonicaliser(tokenizer, COLLAPSE, context=256)


@pytest.mark.parametrize(
    ("raw", "collapsed", "outer"),
    [
        ("  the cat \n", "the cat", "the cat"),
        ("a\r\nb\rc", "a\nb\nc", "a\nb\nc"),
        ("a \t\u00a0 b", "a b", "a \t\u00a0 b"),
        ("a  \n  b\n\n\n\nc", "a\nb\n\nc", "a  \n  b\n\n\n\nc"),
        ("e\u0301\u1112\u1161\u11ab", "\u00e9\ud55c", "\u00e9\ud55c"),
        ("", "", ""),
        (" \n\t", "", ""),
    ],
)
def test_normalisation(raw: str, collapsed: str, outer: str) -> None:
    assert normalise(raw, COLLAPSE).text == collapsed
    assert normalise(raw, CanonicalConfig(whitespace="outer")).text == outer
    assert normalise(raw, CanonicalConfig(whitespace="off", unicode="off")).text == raw


def test_normalisation_is_idempotent_and_its_map_is_in_order() -> None:
    rng = random.Random(0)
    alphabet = "ab \n\t\r\u00a0e\u0301\u0323o\u0308\u1112\u1161\u11ab\u09c7\u09be\u212b\ufb01東"
    for _ in range(500):
        raw = "".join(rng.choice(alphabet) for _ in range(rng.randrange(20)))
        normal = normalise(raw, COLLAPSE)
        assert normalise(normal.text, COLLAPSE).text == normal.text
        plain = normalise(raw, CanonicalConfig(whitespace="off"))
        assert plain.text == unicodedata.normalize("NFC", raw)
        assert normal.ends == sorted(normal.ends)
        assert all(
            0 <= begin < end <= len(raw) for begin, end in zip(normal.starts, normal.ends, strict=True)
        )
        for char, begin, end in zip(normal.text, normal.starts, normal.ends, strict=True):
            if not char.isspace():
                assert char in unicodedata.normalize("NFC", raw[begin:end])


def test_pieces_of_composition_know_every_composing_character() -> None:
    for code in range(0x110000):
        decomposed = unicodedata.decomposition(chr(code))
        if decomposed and "<" not in decomposed and len(parts := decomposed.split()) == 2:
            assert _joins_backwards(chr(int(parts[1], 16))), hex(code)


def test_end_token_marks_complete_responses_only(canonical: Canonicaliser) -> None:
    whole = canonical.encode("say: ", "the cat", complete=True)
    cut = canonical.encode("say: ", "the cat", complete=False)
    assert whole.response_ids == [*cut.response_ids, canonical.eos_id]
    assert whole.spans == [*cut.spans, (7, 7)]
    assert (whole.complete, cut.complete) == (True, False)
    assert canonical.encode("say: ", " ", complete=False).response_ids == [canonical.eos_id]


def test_bytes_of_a_split_character_are_no_text(canonical: Canonicaliser) -> None:
    assert (
        canonical.encode("", "the c\ufffd", complete=False).response_ids
        == canonical.encode("", "the c", complete=False).response_ids
    )


def test_spelling_of_special_tokens_in_a_response_is_text(canonical: Canonicaliser) -> None:
    assert canonical.encode("", "a<|end|>b", complete=False).response_ids.count(canonical.eos_id) == 0
    assert canonical.encode_prompt("<|user|>a")[0] == canonical.tokenizer.convert_tokens_to_ids("<|user|>")


def test_limits_hold_for_any_length(tokenizer) -> None:
    canonical = Canonicaliser(tokenizer, CanonicalConfig(max_response_tokens=5), context=16)
    coded = canonical.encode("x y z " * 50, "q w r t y u i o p", complete=True)
    assert len(coded.response_ids) == 5
    assert not coded.complete
    assert len(coded.prompt_ids) == 11
    assert coded.prompt_ids == canonical.encode_prompt("x y z " * 99)
    assert len(canonical.encode_prompt("")) >= 1


def test_text_beyond_the_limits_is_cut_before_it_is_read(tokenizer, canonical: Canonicaliser) -> None:
    words = "the cat sat on the mat " * 50
    longest = max(map(len, tokenizer.get_vocab()))
    read: list[int] = []

    class Counting:
        def __getattr__(self, name: str):
            return getattr(tokenizer, name)

        def __call__(self, text: str, **options):
            read.append(len(text))
            return tokenizer(text, **options)

    canonical.tokenizer = Counting()
    coded = canonical.encode(words * 1000, words * 1000, complete=True)
    assert max(read) <= (canonical.max_prompt + 1) * longest
    assert coded.prompt_ids == tokenizer(words)["input_ids"][-canonical.max_prompt :]
    assert coded.response_ids == tokenizer(words)["input_ids"][: canonical.max_response]
    assert not coded.complete
    blank = canonical.encode("", "a" + " " * 100_000, complete=True)
    assert not blank.complete, "what follows the blanks was not read"


def test_threads_encode_at_once_as_one_does(canonical: Canonicaliser) -> None:
    texts = [f"<|user|>a{i}<|end|>b" for i in range(200)]
    alone = [(canonical.encode_prompt(text), canonical.encode("", text, complete=True)) for text in texts]
    fresh = Canonicaliser(canonical.tokenizer, COLLAPSE, context=256)
    with ThreadPoolExecutor(2) as pool:
        prompts = pool.map(fresh.encode_prompt, texts)
        responses = pool.map(lambda text: fresh.encode("", text, complete=True), texts)
        assert list(zip(prompts, responses, strict=True)) == alone


def test_both_sides_of_one_text_have_one_encoding(canonical: Canonicaliser, tokenizer) -> None:
    rollout = "  na\u0131\u0308ve\tfac\u0327ade \n"
    table = pa.table({"prompt_id": ["p"], "prompt_text": ["say: "], "response_text": [rollout]})
    [demonstration] = canonical.encode_table(
        prepare_demonstrations(table, tokenizer, COLLAPSE, max_tokens=64)
    )
    sampled = canonical.encode("say: ", rollout, complete=True)
    assert demonstration.prompt_ids == sampled.prompt_ids
    assert demonstration.response_ids == sampled.response_ids


def test_demonstrations_are_cut_where_the_policy_would_be(canonical: Canonicaliser, tokenizer) -> None:
    text = "the dog lay by the door 東京"
    ids = tokenizer(text)["input_ids"]
    table = pa.table({"prompt_id": ["p"], "prompt_text": ["say: "], "response_text": [text]})
    for limit in range(1, len(ids) + 2):
        [coded] = canonical.encode_table(prepare_demonstrations(table, tokenizer, COLLAPSE, max_tokens=limit))
        complete = limit > len(ids)
        sampled_text, _ = text_and_token_ends(
            ids[:limit], lambda i: tokenizer.decode(i, skip_special_tokens=True)
        )
        rollout = canonical.encode("say: ", sampled_text, complete=complete)
        assert coded.response_ids == rollout.response_ids
        assert coded.complete == rollout.complete


def test_empty_demonstration_is_refused_by_name(tokenizer) -> None:
    table = pa.table({"prompt_id": ["p7"], "prompt_text": ["a"], "response_text": [" \n"]})
    with pytest.raises(ValueError, match="p7"):
        prepare_demonstrations(table, tokenizer, COLLAPSE, max_tokens=8)


def test_spread_follows_the_sampled_spelling(tokenizer, canonical: Canonicaliser) -> None:
    """'the' is one canonical token; sampled as t, h, e its reward stands on the e."""
    single = tokenizer("the")["input_ids"]
    letters = [tokenizer(c)["input_ids"][0] for c in "the"]
    assert len(single) == 1
    sampled = [*letters, canonical.eos_id]
    text, ends = text_and_token_ends(sampled, lambda i: tokenizer.decode(i, skip_special_tokens=True))
    coded = canonical.encode("say: ", text, complete=True)
    assert coded.response_ids == [*single, canonical.eos_id] != sampled
    assert ends == [1, 2, 3, 3]
    np.testing.assert_array_equal(spread_to_sampled([2.0, 5.0], coded.spans, ends), [0, 0, 2.0, 5.0])


def test_spread_waits_for_the_last_byte_of_a_character(tokenizer, canonical: Canonicaliser) -> None:
    """A snowman is three byte tokens on both sides: all its rewards stand on the third."""
    ids = [*tokenizer("a☃b")["input_ids"], canonical.eos_id]
    text, ends = text_and_token_ends(ids, lambda i: tokenizer.decode(i, skip_special_tokens=True))
    assert len(ids) == 6
    assert ends == [1, 1, 1, 2, 3, 3]
    coded = canonical.encode("", text, complete=True)
    assert coded.response_ids == ids
    np.testing.assert_array_equal(
        spread_to_sampled([1, 2, 4, 8, 16, 32], coded.spans, ends), [1, 0, 0, 14, 16, 32]
    )


def test_spread_preserves_the_sum_for_any_spelling(tokenizer, canonical: Canonicaliser) -> None:
    rng = np.random.default_rng(0)
    for _ in range(100):
        ids = rng.integers(5, len(tokenizer), size=rng.integers(1, 12)).tolist()
        text, ends = text_and_token_ends(ids, lambda i: tokenizer.decode(i, skip_special_tokens=True))
        complete = bool(rng.integers(2))
        coded = canonical.encode("say: ", text, complete=complete)
        values = rng.normal(size=len(coded.response_ids))
        spread = spread_to_sampled(values, coded.spans, ends)
        assert len(spread) == len(ids)
        assert spread.sum() == pytest.approx(values.sum())
        for span in coded.spans:
            assert 0 <= span[0] <= span[1] <= len(text)


def test_spread_refuses_what_cannot_be_spread() -> None:
    with pytest.raises(ValueError, match="1 values for 2 spans"):
        spread_to_sampled([1.0], [(0, 1), (1, 2)], [1])
    with pytest.raises(ValueError, match="without sampled tokens"):
        spread_to_sampled([1.0], [(0, 0)], [])


def test_encoder_prompts_are_fenced(tiny_encoder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder)
    canonical = Canonicaliser(tokenizer, COLLAPSE, context=64, encoder=True)
    coded = canonical.encode("ab", "c", complete=True)
    assert tokenizer.convert_ids_to_tokens(coded.prompt_ids) == ["[CLS]", "a", "##b", "[SEP]"]
    assert tokenizer.convert_ids_to_tokens(coded.response_ids) == ["c", "[SEP]"]


def test_spellings_are_made_once_and_the_least_used_make_place():
    asked: list[str] = []
    memory = _Memory(room=5)

    def made(text: str) -> _Spelling:
        asked.append(text)
        return _Spelling([0] * len(text), [], True)

    def spelling(text: str) -> _Spelling:
        return memory.get(text, True, lambda: made(text))

    for text in ("aa", "bb", "aa", "cc", "aa", "bb"):  # cc puts bb out, which comes back for cc
        assert len(spelling(text).ids) == 2
    assert asked == ["aa", "bb", "cc", "bb"]
    assert len(spelling("too long for it").ids) == 15
    assert spelling("aa").ids == [0, 0]


def test_an_answer_read_again_is_spelled_alike_whatever_its_prompt(canonical):
    first = canonical.encode("one", "a  cat", complete=True)
    again = canonical.encode("two", "a  cat", complete=True)
    cut = canonical.encode("one", "a  cat", complete=False)
    assert (again.response_ids, again.spans) == (first.response_ids, first.spans)
    assert again.prompt_ids == canonical.encode_prompt("two") != first.prompt_ids
    assert cut.response_ids == first.response_ids[:-1]
    assert not cut.complete
