"""The discriminator as judge of soft samples: the scorer's scores for hard ones, gradients into the policy
and not into itself, and nothing but the version it was told to hold."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from judging import small

from discriminator.model import load_discriminator
from discriminator.scorer import Scorer
from discriminator.soft import SoftJudge
from discriminator.versions import ChecksumMismatch, UnknownVersion, VersionStore, state_checksum
from learner.config import LearnerConfig
from learner.drawing import draw_responses
from learner.packing import Group
from learner.policy import PolicyLearner
from learner.samples import Samples
from rollout.config import PolicyConfig
from rollout.engine import decoder
from rollout.templates import load_tokenizer

PROMPTS = ["say cat: ", "a much longer prompt about the news of the day: "]
RESPONSES = [
    [("the cat sat on the mat", True), ("the dog by", False), ("", True), ("naïve façade", True)],
    [("she sells sea shells", False), ("the cat sat on the mat", True)],
]
GUMBEL = {"weight": 1.0, "policy_gradient_weight": 0.0, "samples": 24, "max_tokens": 3, "tau_steps": 10}


def store_of(config, model, versions=1):
    """A store of versions whose heads are far from zero, so that scores differ."""
    store = VersionStore()
    for version in range(versions):
        module = load_discriminator(config, str(model), device="cpu", dtype=torch.float32, seed=version)
        torch.manual_seed(version)
        torch.nn.init.normal_(module.head.weight, std=0.05)
        state = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
        store.publish(version, state_checksum(state), state)
    return store


def judge_of(config, model, store, **policy):
    return SoftJudge(config, str(model), PolicyConfig(model=str(model), **policy), store.fetch)


def groups_of(judge, tokenizer, end_id):
    """`RESPONSES` as a policy would have sampled them: their tokens and, where complete, an end token."""
    groups, start, row = [], 0, 0
    for prompt, answers in zip(PROMPTS, RESPONSES, strict=True):
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text, _ in answers]
        ids = [[*i, end_id] if ended else i for i, (_, ended) in zip(ids, answers, strict=True)]
        read = [judge.prompt_of(prompt, i, ended=e) for i, (_, e) in zip(ids, answers, strict=True)]
        assert read[0] is not None
        assert all(prompt_ids == read[0] for prompt_ids in read)
        lengths = [len(i) for i in ids]
        starts = start + np.cumsum([0, *lengths[:-1]])
        rows = np.arange(row, row + len(ids))
        groups.append(Group(np.array(read[0]), [np.array(i) for i in ids], starts, rows))
        start, row = start + sum(lengths), row + len(ids)
    return groups, start


@pytest.mark.parametrize("settings", [{}, {"packing": False}, {"level": "token", "pack_length": 64}])
@pytest.mark.parametrize("end_of_response", ["", "\n"])
def test_hard_rows_score_like_the_text_that_they_are(tiny_model: Path, settings, end_of_response) -> None:
    """Also when another token than EOS ends a response: it then stands for the discriminator's EOS."""
    config = small(**settings)
    store = store_of(config, tiny_model)
    scorer = Scorer(config, str(tiny_model))
    scorer.ensure(0, store.fetch)
    judge = judge_of(config, tiny_model, store, end_of_response=end_of_response)
    judge.hold(0)
    tokenizer = judge.canonical.tokenizer
    end_id = tokenizer(end_of_response)["input_ids"][0] if end_of_response else tokenizer.eos_token_id
    assert judge.end_ids == {tokenizer.eos_token_id, end_id}
    groups, tokens = groups_of(judge, tokenizer, end_id)
    batch = judge.batch(groups)
    ids = torch.from_numpy(np.concatenate([r for group in groups for r in group.responses]))
    rows = torch.nn.functional.one_hot(ids[batch.flat], judge.vocabulary).to(judge.table().dtype)
    soft = torch.zeros(tokens)
    batch.scatter(judge.scores(batch, rows @ judge.table()), soft)
    expected = np.concatenate([r.scores for group in scorer.score(0, PROMPTS, RESPONSES) for r in group])
    np.testing.assert_allclose(soft.numpy(), expected, atol=1e-4)
    assert expected.std() > 0.05


def test_end_tokens_are_the_judges_end_of_response(tiny_model: Path) -> None:
    config = small()
    judge = judge_of(config, tiny_model, store_of(config, tiny_model), end_of_response="\n")
    judge.hold(0)
    table, tokenizer = judge.table(), judge.canonical.tokenizer
    newline = tokenizer("\n")["input_ids"][0]
    assert torch.equal(table[newline], table[tokenizer.eos_token_id])
    body = judge.module.body.get_input_embeddings().weight
    others = [i for i in range(judge.vocabulary) if i != newline]
    assert torch.equal(table[others], body[others])
    assert not torch.equal(table[newline], body[newline])


def test_an_end_token_that_stays_in_the_text_is_refused(tiny_model: Path) -> None:
    """Rollouts keep it too, and show it to the discriminator as text before the EOS."""
    config = small()
    judge = judge_of(config, tiny_model, store_of(config, tiny_model), end_of_response="~")
    ids = judge.canonical.tokenizer("the dog~", add_special_tokens=False)["input_ids"]
    assert ids[-1] in judge.end_ids
    assert judge.prompt_of(PROMPTS[0], ids, ended=True) is None


def test_responses_with_another_spelling_are_refused(tiny_model: Path) -> None:
    config = small(canonical={"max_response_tokens": 5})
    judge = judge_of(config, tiny_model, store_of(config, tiny_model))
    tokenizer = judge.canonical.tokenizer
    eos = tokenizer.eos_token_id

    def ids(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    letters = [i for letter in "the" for i in ids(letter)]
    assert len(letters) == 3 > len(ids("the"))
    assert judge.prompt_of(PROMPTS[0], [*ids("the"), eos], ended=True) is not None
    assert judge.prompt_of(PROMPTS[0], ids("the"), ended=False) is not None
    refused = {
        "another tokenisation": ([*letters, eos], True),
        "a leading space": ([*ids(" the"), eos], True),
        "trailing blanks": (ids("the "), False),
        "a special token inside": ([*ids("the"), tokenizer.pad_token_id, eos], True),
        "half a character": (ids("東")[:1], False),
        "longer than is read": ([*ids("a b c d e f g h"), eos], True),
    }
    for reason, (response, ended) in refused.items():
        assert judge.prompt_of(PROMPTS[0], response, ended=ended) is None, reason


def test_only_the_version_asked_for_judges(tiny_model: Path) -> None:
    config = small()
    store = store_of(config, tiny_model, versions=2)
    judge = judge_of(config, tiny_model, store)
    groups, _ = groups_of(judge, judge.canonical.tokenizer, judge.canonical.eos_id)
    batch, found = judge.batch(groups), []
    for version in (0, 1, 0):
        judge.hold(version)
        assert judge.scorer.versions() == [version]
        found.append(judge.scores(batch, judge.table()[batch.target]))
    assert torch.equal(found[0], found[2])
    assert float((found[0] - found[1]).abs().max()) > 0.05
    with pytest.raises(UnknownVersion):
        judge.hold(7)
    store._held[1] = ("0" * 64, store.fetch(1)[1])
    with pytest.raises(ChecksumMismatch, match="version 1 arrived"):
        judge.hold(1)


def test_another_vocabulary_is_refused(tiny_model: Path, tiny_encoder: Path) -> None:
    config = small()
    store = store_of(config, tiny_model)
    with pytest.raises(ValueError, match="different tokenizers"):
        SoftJudge(config, str(tiny_encoder), PolicyConfig(model=str(tiny_model)), store.fetch)
    own = judge_of(config, tiny_encoder, store_of(config, tiny_encoder), end_of_response="[SEP]")
    with pytest.raises(ValueError, match="bidirectional"):
        own.hold(0)


@pytest.fixture
def judged_table(tiny_model: Path) -> pa.Table:
    """One response to each of four prompts, scored by version 0."""
    tokenizer = load_tokenizer(PolicyConfig(model=str(tiny_model)))
    texts = [*PROMPTS, "say dog 12: ", "read the mail and print: "]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    rows = len(texts)
    return pa.table(
        {
            "group_id": pa.array([str(row) for row in range(rows)]),
            "prompt_text": pa.array(texts),
            "prompt_ids": pa.array(ids, pa.list_(pa.int32())),
            "response_ids": pa.array([[40, 41]] * rows, pa.list_(pa.int32())),
            "response_logprobs": pa.array([[-6.0, -6.0]] * rows, pa.list_(pa.float32())),
            "token_rewards": pa.array([[0.0, 1.0]] * rows, pa.list_(pa.float32())),
            "disc_version": pa.array([0] * rows, pa.int32()),
        }
    )


@pytest.mark.parametrize("level", ["sequence", "token"])
def test_the_policy_climbs_the_discriminators_score(tiny_model: Path, judged_table: pa.Table, level) -> None:
    """The reported score is the scorer's mean over the texts that were kept; it rises, and the discriminator
    stays what it was."""
    config = small(level=level)
    store = store_of(config, tiny_model)
    judge = judge_of(config, tiny_model, store)
    settings = {"device": "cpu", "kl_coef": 0.0, "lr": 3e-3, "gumbel": GUMBEL}
    learner = PolicyLearner(str(tiny_model), LearnerConfig(**settings), model_dtype="float32", judge=judge)
    drawn = draw_responses(
        learner.trainable.module,
        [(number, group.prompt) for number, group in enumerate(Samples.from_table(judged_table).groups)],
        samples=GUMBEL["samples"],
        max_tokens=GUMBEL["max_tokens"],
        end_ids=judge.end_ids,
        seed=(0, 0),
        budget=10**6,
    )
    first = learner.train_step(judged_table, 0)
    scorer = Scorer(config, str(tiny_model))
    scorer.ensure(0, store.fetch)
    decode = decoder(judge.canonical.tokenizer)
    texts = judged_table["prompt_text"].to_pylist()
    scores = [
        scorer.score(0, [text], [[(decode(response.ids.tolist()), response.ended)]])[0][0].scores[-1]
        for text, several in zip(texts, drawn, strict=True)
        for response in several
        if judge.prompt_of(text, response.ids.tolist(), ended=response.ended) is not None
    ]
    assert 4 < len(scores) < 96
    assert first["gumbel_score"] == pytest.approx(np.mean(scores), abs=1e-4)
    assert first["gumbel_masked"] == pytest.approx(1 - len(scores) / 96)
    before = {name: p.detach().clone() for name, p in judge.module.named_parameters()}
    later = [learner.train_step(judged_table, step)["gumbel_score"] for step in range(1, 16)]
    assert np.mean(later[-3:]) > first["gumbel_score"] + 2 * np.std(scores) / np.sqrt(len(scores))
    for name, parameter in judge.module.named_parameters():
        assert parameter.grad is None
        assert torch.equal(parameter, before[name])
