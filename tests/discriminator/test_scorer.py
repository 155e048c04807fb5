"""Scores through the real model: the same whatever they are computed with, and only by the version that is
named."""

import itertools
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from judging import small
from safetensors.torch import load_file, save_file

from discriminator.config import DiscriminatorConfig
from discriminator.model import load_discriminator
from discriminator.scorer import Scorer
from discriminator.versions import ChecksumMismatch, UnknownVersion, VersionStore, state_checksum

PROMPTS = ["say cat: ", "say dog 12: ", "a much longer prompt about the news of the day: "]
RESPONSES = [
    [("the cat sat on the mat", True), ("the c", False), ("", True), ("naïve façade", True)],
    [("the dog", True)],
    [("she sells sea shells", False), ("the cat sat on the mat", True)],
]


def published(config: DiscriminatorConfig, model: Path, seed: int) -> dict[str, torch.Tensor]:
    """Weights with a head that is far from zero, so that scores differ."""
    module = load_discriminator(config, str(model), device="cpu", dtype=torch.float32, seed=seed)
    torch.manual_seed(seed)
    torch.nn.init.normal_(module.head.weight, std=0.05)
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def holding(config: DiscriminatorConfig, model: Path, versions: int = 1) -> tuple[Scorer, VersionStore]:
    store = VersionStore()
    scorer = Scorer(config, str(model))
    for version in range(versions):
        state = published(config, model, seed=version)
        store.publish(version, state_checksum(state), state)
        scorer.ensure(version, store.fetch)
    return scorer, store


@pytest.mark.parametrize("kind", ["causal", "encoder"])
def test_scores_do_not_depend_on_batch_padding_packing_or_replica(kind, tiny_model, tiny_encoder) -> None:
    model = tiny_model if kind == "causal" else tiny_encoder
    scorer, _ = holding(small(), model)
    together = scorer.score(0, PROMPTS, RESPONSES)
    others = {
        "unpacked": small(packing=False),
        "long rows": small(pack_length=400),
        "one row a batch": small(scoring={"max_batch_tokens": 1}),
    }
    for config in others.values():
        replica, _ = holding(config, model)
        alone = [
            [replica.score(0, [prompt], [[answer]])[0][0] for answer in answers]
            for prompt, answers in zip(PROMPTS, RESPONSES, strict=True)
        ]
        again = replica.score(0, PROMPTS[::-1], RESPONSES[::-1])[::-1]
        for want, one, two in zip(*(itertools.chain(*x) for x in (together, alone, again)), strict=True):
            np.testing.assert_allclose(one.scores, want.scores, atol=1e-4)
            np.testing.assert_allclose(two.scores, want.scores, atol=1e-4)
            assert one.spans == two.spans == want.spans
    spread = [r.scores[-1] for r in itertools.chain(*together)]
    assert np.std(spread) > 0.05, "scores that are all equal would make this test empty"


def test_causal_scores_equal_a_plain_forward_pass(tiny_model: Path) -> None:
    from transformers import AutoModel

    config = small()
    state = published(config, tiny_model, seed=0)
    scorer, _ = holding(config, tiny_model)
    coded = scorer.canonical.encode(PROMPTS[1], "the dog lay", complete=True)
    body = AutoModel.from_pretrained(tiny_model, dtype=torch.float32)
    with torch.no_grad():
        hidden = body(torch.tensor([coded.prompt_ids + coded.response_ids])).last_hidden_state[0]
    normed = hidden / (hidden.pow(2).mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()
    slow = config.head_gain * (normed @ state["head.weight"][0] + state["head.bias"])
    [[fast]] = scorer.score(0, [PROMPTS[1]], [[("the dog lay", True)]])
    np.testing.assert_allclose(fast.scores, slow[len(coded.prompt_ids) :].numpy(), atol=1e-4)


def test_prefix_scores_do_not_see_the_future(tiny_model: Path) -> None:
    scorer, _ = holding(small(level="token"), tiny_model)
    [[short, long]] = scorer.score(
        0, ["say cat: "], [[("the cat", False), ("the cat sat on the mat", False)]]
    )
    np.testing.assert_allclose(long.scores[: len(short.scores)], short.scores, atol=1e-4)


def test_identical_text_has_an_identical_score(tiny_model: Path) -> None:
    scorer, _ = holding(small(), tiny_model)
    [[one, two]] = scorer.score(0, ["say: "], [[("the  cat\r\n", True), (" the cat", True)]])
    np.testing.assert_allclose(one.scores, two.scores, atol=1e-4)
    assert len(one.scores) == len(two.scores)


def test_each_request_is_answered_by_the_version_it_names(tiny_model: Path) -> None:
    scorer, store = holding(small(), tiny_model, versions=3)
    assert scorer.versions() == [1, 2]
    request = (PROMPTS[:1], [[("the cat", True)]])
    with pytest.raises(UnknownVersion, match=r"version 0 is not held; held: \[1, 2\]"):
        scorer.score(0, *request)
    fresh = Scorer(small(), str(tiny_model))
    for version in (1, 2):
        fresh.ensure(version, store.fetch)
        [[want]] = fresh.score(version, *request)
        [[got]] = scorer.score(version, *request)
        np.testing.assert_allclose(got.scores, want.scores, atol=1e-4)
    [[first]], [[second]] = scorer.score(1, *request), scorer.score(2, *request)
    assert abs(first.scores[-1] - second.scores[-1]) > 1e-3


def test_texts_are_encoded_while_another_request_is_in_the_forward_pass(tiny_model: Path) -> None:
    scorer, store = holding(small(), tiny_model)
    began, go_on = threading.Event(), threading.Event()

    def slow_fetch(version: int):
        began.set()
        assert go_on.wait(30)
        return store.fetch(0)

    with ThreadPoolExecutor(2) as pool:
        busy = pool.submit(scorer.ensure, 1, slow_fetch)
        assert began.wait(30)
        encoded = pool.submit(scorer.encode, PROMPTS[0], RESPONSES[0]).result(timeout=30)
        assert not busy.done()
        go_on.set()
        busy.result(timeout=30)
    [scored] = scorer.score_encoded(0, [encoded])
    [expected] = scorer.score(0, PROMPTS[:1], RESPONSES[:1])
    for one, two in zip(scored, expected, strict=True):
        np.testing.assert_allclose(one.scores, two.scores, atol=1e-5)


def test_damaged_weights_are_refused_and_the_held_version_stays(tiny_model: Path) -> None:
    scorer, store = holding(small(), tiny_model)
    checksum, state = store.fetch(0)
    damaged = {name: tensor.clone() for name, tensor in state.items()}
    damaged["head.weight"][0, 0] += 1e-3
    with pytest.raises(ChecksumMismatch, match="version 1"):
        scorer.ensure(1, lambda _: (checksum, damaged))
    foreign = {name: tensor for name, tensor in state.items() if name != "head.bias"}
    with pytest.raises(ValueError, match=r"head\.bias"):
        scorer.ensure(1, lambda _: (state_checksum(foreign), foreign))
    assert scorer.versions() == [0]


def test_encoders_refuse_the_token_level(tiny_encoder: Path) -> None:
    with pytest.raises(ValueError, match="bidirectional"):
        load_discriminator(small(level="token"), str(tiny_encoder), device="cpu", dtype=torch.float32)


def test_a_body_without_all_its_weights_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "torn"))
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 of the model's weights.*layers\.1\.mlp\.up_proj"):
        load_discriminator(small(), str(folder), device="cpu", dtype=torch.float32)
