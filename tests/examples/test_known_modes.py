"""The known-modes language against enumeration; its tokenizers, measures and demonstrations."""

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from examples.known_modes import measures
from examples.known_modes.language import (
    BASE,
    EXPERT,
    LONGEST,
    VOCABULARY,
    WORDS,
    Sentence,
    every_sentence,
    natural_copy_rate,
    parse,
    parse_text,
    text_of,
    tokens_of,
)
from examples.known_modes.make import CONFIG, write_demonstrations
from examples.known_modes.tokenizer import build_tokenizer, spell, vocabulary_size
from rollout.config import PolicyConfig
from rollout.data import load_data
from rollout.templates import Renderer
from services.config import load
from services.evaluation.extra_measures import Answers, load_extra_measures, with_extra_measures

ROOT = Path(__file__).parents[2]
ONE = Sentence(3, 1, (0, 2, 1), False)


def test_entropy_and_divergence_by_enumeration() -> None:
    mass = entropy = cross = base_mass = 0.0
    count = 0
    for sentence in every_sentence():
        p, q = EXPERT.probability(sentence), BASE.probability(sentence)
        count += 1
        mass, base_mass = mass + p, base_mass + q
        if p > 0:
            entropy -= p * math.log(p)
            cross -= p * math.log(q)
    assert count == 349_184
    assert mass == pytest.approx(1.0)
    assert base_mass == pytest.approx(1.0)
    assert EXPERT.entropy() == pytest.approx(entropy)
    assert round(EXPERT.entropy(), 3) == 8.001
    assert EXPERT.cross_entropy(BASE) == pytest.approx(cross)
    assert BASE.cross_entropy(EXPERT) == math.inf


def test_samples_have_the_exact_frequencies() -> None:
    """Chi-square per category group, with the bound at about five standard deviations."""
    n = 20_000
    sentences = EXPERT.sample(n, np.random.default_rng(0))
    groups = [
        (Counter(s.mode for s in sentences), dict(enumerate(EXPERT.modes)), n),
        (Counter(len(s.slots) for s in sentences), dict(zip(range(2, 7), EXPERT.lengths, strict=True)), n),
    ]
    values = Counter(value for s in sentences for value in s.slots)
    groups.append((values, dict(enumerate(EXPERT.slots)), values.total()))
    for counts, weights, total in groups:
        expected = {key: weight * total for key, weight in weights.items() if weight > 0}
        assert set(counts) == set(expected)
        chi = sum((counts[key] - e) ** 2 / e for key, e in expected.items())
        freedom = len(expected) - 1
        assert chi < freedom + 5 * math.sqrt(2 * freedom)
    assert np.mean([s.trailing for s in sentences]) == pytest.approx(0.1, abs=0.011)
    assert EXPERT.sample(5, np.random.default_rng(3)) == EXPERT.sample(5, np.random.default_rng(3))
    tokens = np.mean([len(tokens_of(s)) for s in sentences])
    assert tokens == pytest.approx(EXPERT.mean_tokens, abs=0.05)


def test_tokens_and_words_by_hand() -> None:
    assert tokens_of(ONE) == [5, 11, 14, 20, 23, 5, 0]
    assert tokens_of(Sentence(7, 3, (3,) * 5, True)) == [9, 13, 17, 21, 25, 29, 17, 9, 30, 0]
    assert text_of(ONE) == "a3 b1 c0 d2 e1 a3"
    assert ONE.mode == 13
    assert len(WORDS) == VOCABULARY == len(set(WORDS))
    assert max(len(tokens_of(s)) for s in BASE.sample(500, np.random.default_rng(0))) <= 11 <= LONGEST


def test_parser_undoes_and_refuses() -> None:
    for sentence in BASE.sample(300, np.random.default_rng(1)):
        assert parse(tokens_of(sentence)) == sentence
        assert parse_text(text_of(sentence)) == sentence
    good = "a3 b1 c0 d2 e1 a3"
    assert parse_text(f"  {good}\n z ") == ONE._replace(trailing=True)
    for text in (
        "",
        "a3",
        "a3 a3",
        "a3 b1 a3",  # no slots
        "a3 b1 c0 a3",  # one slot
        "a3 b1 c0 d2 e1 a4",  # another head at the end
        "a3 b1 c0 e2 e1 a3",  # a family out of turn
        "b1 a3 c0 d2 e1 b1",  # heads exchanged
        "a3 b1 c0 d2 e1 f0 c1 d1 e0 a3",  # seven slots
        f"{good} z z",
        f"z {good}",
        f"{good} a3",
        "a3 b1 c0 d2 nonsense a3",
        "a3 b1 c0 d9 e1 a3",
    ):
        assert parse_text(text) is None, text
    assert parse([5, 11, 14, 20, 23, 5]) is None  # never ended
    assert parse([]) is None


def test_parser_accepts_exactly_the_language() -> None:
    """Random single changes of valid sentences are valid exactly when enumeration knows the result."""
    known = {tuple(tokens_of(s)) for s in every_sentence()}
    rng = np.random.default_rng(2)
    accepted = 0
    for sentence in BASE.sample(3000, rng):
        tokens = tokens_of(sentence)
        tokens[rng.integers(len(tokens))] = int(rng.integers(VOCABULARY))
        assert (parse(tokens) is not None) == (tuple(tokens) in known)
        accepted += tuple(tokens) in known
    assert 100 < accepted < 2900


def test_natural_copy_rate_is_the_mass_of_the_distinct_demonstrations() -> None:
    rng = np.random.default_rng(0)
    demonstrations = EXPERT.sample(512, rng)
    exact = natural_copy_rate([*demonstrations, *demonstrations, None], EXPERT)
    known, fresh = set(demonstrations), EXPERT.sample(40_000, rng)
    assert exact == pytest.approx(np.mean([s in known for s in fresh]), abs=0.01)
    assert natural_copy_rate([], EXPERT) == 0.0


@pytest.mark.parametrize("form", ["plain", "merged"])
def test_tokenizer_agrees_with_spelling_and_hides_prompts(form, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    build_tokenizer(form).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == vocabulary_size(form)
    rng = np.random.default_rng(0)
    different = 0
    for sentence in BASE.sample(400, rng):
        canonical, sampled = spell(sentence, form), spell(sentence, form, rng)
        assert [*tokenizer(text_of(sentence), add_special_tokens=False)["input_ids"], 0] == canonical
        for ids in (canonical, sampled):
            assert tokenizer.decode(ids, skip_special_tokens=True) == text_of(sentence)
        different += sampled != canonical
    # A sentence of 2–5 slots has one pair, of 6 two: .8 / 2 + .2 * 3/4 = .55 keep less than the canonical.
    assert different / 400 == pytest.approx(0.55 if form == "merged" else 0.0, abs=0.13)
    data = load(CONFIG).data
    renderer = Renderer(tokenizer, data, PolicyConfig(model=str(tmp_path)))
    assert renderer.encode(renderer.render("#0")) == renderer.encode(renderer.render("#987")) == [1]
    assert renderer.check_lengths(["#0", "#12345"]) == [None, None]
    assert renderer.end_id == 0


def test_discriminator_reads_no_prompt_and_one_spelling(tmp_path: Path) -> None:
    from discriminator.canonical import Canonicaliser
    from discriminator.config import CanonicalConfig

    canonical = Canonicaliser(build_tokenizer("merged"), CanonicalConfig(), context=64)
    one, other = (canonical.encode(prompt, text_of(ONE), complete=True) for prompt in ("#1", "#22"))
    assert one.prompt_ids == other.prompt_ids == [1]
    assert one.response_ids == other.response_ids == spell(ONE, "merged")
    assert one.spans == [(0, 2), (2, 5), (5, 11), (11, 14), (14, 17), (17, 17)]


def answers(model: list[str], nll: float = 1.0) -> Answers:
    return Answers(
        prompts=["#0"] * len(model),
        human=[text_of(ONE)] * len(model),
        model=model,
        demonstrations=[text_of(ONE)],
        nll=nll,
        human_tokens=8.5,
    )


def test_measures_by_hand() -> None:
    """Three sentences of mode 0, one of mode 1 (which the expert lacks), and one that is none."""
    zero, one = Sentence(0, 0, (0, 0), False), Sentence(0, 1, (1, 0, 2), True)
    found = measures.against_expert(answers([text_of(zero)] * 3 + [text_of(one), "a0 a0"], nll=1.25))
    assert found["valid"] == pytest.approx(0.8)
    # ½ (|.6 − .3| + |.2 − 0| + the seven lost modes .7 + the invalid .2)
    assert found["mode_tv"] == pytest.approx(0.7)
    assert found["modes_kept"] == 1.0
    # Families: c (.75, .25, 0, 0), d (1, 0, 0, 0), e (0, 0, 1, 0), f never seen.
    c, d, e = 0.2, 0.45, 0.85
    assert found["slot_tv"] == pytest.approx((c + d + e + 1.0) / 4)
    # Lengths (.75, .25, 0, 0, 0) against (.05, .25, .4, .25, .05).
    assert found["length_tv"] == pytest.approx(0.7)
    assert found["trailing_rate"] == 0.25
    assert found["nll_gap"] == pytest.approx(1.25 * 8.5 - 8.0008, abs=1e-4)
    assert found["sentence_copy_rate"] == 0.0
    assert found["natural_copy_rate"] == EXPERT.probability(ONE) == 0.0
    assert measures.against_base(answers([text_of(ONE)]))["natural_copy_rate"] == BASE.probability(ONE) > 0
    assert measures.against_base(answers([text_of(ONE), "x"]))["sentence_copy_rate"] == 0.5


def test_measures_of_expert_and_base_samples() -> None:
    expert = [text_of(s) for s in EXPERT.sample(8000, np.random.default_rng(0))]
    base = [text_of(s) for s in BASE.sample(8000, np.random.default_rng(1))]
    good, start = measures.against_expert(answers(expert)), measures.against_expert(answers(base))
    assert good["valid"] == start["valid"] == 1.0
    assert good["modes_kept"] == 8.0
    assert max(good["mode_tv"], good["slot_tv"], good["length_tv"]) < 0.03
    assert start["mode_tv"] == pytest.approx(0.75, abs=0.02)
    assert start["modes_kept"] == 3.0
    assert start["slot_tv"] == pytest.approx(0.30, abs=0.02)  # ½ (.30 + 0 + .10 + .20)
    assert start["length_tv"] == pytest.approx(0.30, abs=0.02)  # ½ (.15 + .05 + .20 + .05 + .15)
    nothing = measures.against_expert(answers(["", "z"]))
    assert (nothing["valid"], nothing["mode_tv"], nothing["modes_kept"]) == (0.0, 1.0, 0.0)
    assert (nothing["slot_tv"], nothing["length_tv"], nothing["trailing_rate"]) == (1.0, 1.0, 0.0)


def test_modes_kept_counts_half_of_the_mass() -> None:
    frequencies = np.array(EXPERT.modes) / 2
    assert measures.modes_kept(frequencies, EXPERT) == 8
    frequencies[0] -= 1e-6
    assert measures.modes_kept(frequencies, EXPERT) == 7


def test_demonstrations_fill_the_splits_of_the_run(tmp_path: Path) -> None:
    config = load(CONFIG)
    build_tokenizer("plain").save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    sizes = {"train": 64, "heldout": 16, "selection": 24, "test": 40}
    files = {}
    for train in (64, 16):
        files[train] = tmp_path / f"{train}.jsonl"
        write_demonstrations(files[train], {**sizes, "train": train}, "expert", 5, config.data)
    policy = PolicyConfig(model=str(tmp_path))
    splits = {}
    for train, path in files.items():
        data = config.data.model_copy(update={"demonstrations": str(path)})
        splits[train] = load_data(data, Renderer(build_tokenizer("plain"), data, policy))
    for name, size in sizes.items():
        assert getattr(splits[64], name).num_rows == size
    assert splits[16].train["response"].to_pylist() == splits[64].train["response"].to_pylist()[:16]
    for name in ("heldout", "selection", "test"):
        assert getattr(splits[16], name).equals(getattr(splits[64], name))
    rows = [json.loads(line) for line in files[64].read_text().splitlines()]
    assert len({row["prompt"] for row in rows}) == 144
    assert all(EXPERT.probability(parse_text(row["response"])) > 0 for row in rows)
    again = tmp_path / "again.jsonl"
    write_demonstrations(again, sizes, "expert", 5, config.data)
    assert again.read_bytes() == files[64].read_bytes()
    write_demonstrations(again, sizes, "expert", 6, config.data)
    assert again.read_bytes() != files[64].read_bytes()


def test_the_example_configuration_names_the_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = load(CONFIG)
    assert config.run.prompts_per_step * config.sampling.group_size == 256
    function = load_extra_measures(config.evaluation.extra_measures)
    assert function is not None
    row = with_extra_measures({"c2st": 0.5, "nll": 1.0}, function, answers([text_of(ONE)]))
    assert {"valid", "mode_tv", "modes_kept", "nll_gap", "c2st"} <= row.keys()


def test_base_model_learns_and_validation_knows_the_exact_gap() -> None:
    """Uniform guesses have the NLL they must have; training lowers the loss and repeats itself."""
    torch = pytest.importorskip("torch")
    from examples.known_modes.base_model import (
        BaseTraining,
        new_model,
        sample_tokens,
        sentence_nll,
        train_base,
        validate,
    )

    model = new_model("plain", 0)
    with torch.no_grad():
        model.model.norm.weight.zero_()  # all logits 0: every token has probability 1/32
    sentences = EXPERT.sample(200, np.random.default_rng(0))
    tokens = np.mean([len(tokens_of(s)) for s in sentences])
    assert sentence_nll(model, sentences, "plain") == pytest.approx(tokens * math.log(32), rel=1e-5)
    measured = validate(model, "plain", count=512)
    exact = EXPERT.mean_tokens * math.log(32) - EXPERT.entropy()
    assert measured["expert_nll_gap"] == pytest.approx(exact, abs=0.5)  # about five standard errors
    assert (measured["valid"], measured["expert_mode_tv"], measured["expert_modes_kept"]) == (0.0, 1.0, 0.0)
    rows = sample_tokens(model, 64, 0)
    assert rows == sample_tokens(model, 64, 0) != sample_tokens(model, 64, 1)
    assert all(0 not in row[:-1] and len(row) <= LONGEST for row in rows)
    options = BaseTraining(form="merged", steps=12, batch=32)
    trained, loss = train_base(options, lambda line: None)
    assert loss < train_base(replace(options, steps=1), lambda line: None)[1]
    again, same = train_base(options, lambda line: None)
    assert loss == same
    assert torch.equal(trained.lm_head.weight, again.lm_head.weight)
