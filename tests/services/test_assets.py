import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from services.assets.catalogue import ASSETS, Asset, AssetError, fetch
from services.assets.debian import synopsis_pairs
from services.assets.models import write_glassllm
from services.assets.registry import Say, unpack_wheel


def quiet(line: str) -> None:
    """Say nothing."""


def test_bundled_demonstrations_are_what_the_notice_says(tmp_path: Path) -> None:
    path = fetch("wordnet-examples", tmp_path, quiet)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 4640
    assert len({row["prompt"] for row in rows}) == 4640
    for row in rows:
        assert set(row) == {"prompt", "response"}
        assert len(row["prompt"].split()) == 2
        assert row["response"].startswith(" ")  # prompt + response is the sentence, letter for letter
        assert 3 <= len(row["response"].split()) <= 10
    notice = (Path(__file__).parents[2] / "NOTICE").read_text()
    assert "WordNet 3.0 Copyright 2006 by Princeton University" in notice


def test_an_asset_is_made_once_and_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    fetch("wordnet-examples", tmp_path, said.append)
    fetch("wordnet-examples", tmp_path, said.append)
    assert "already there" in said[-1]

    def breaks(target: Path, say: Say) -> None:
        target.write_text("half")
        raise AssetError("cut off")

    monkeypatch.setitem(ASSETS, "broken", Asset("breaks half-way", "broken.jsonl", breaks))
    with pytest.raises(AssetError, match="cut off"):
        fetch("broken", tmp_path, quiet)
    assert [path.name for path in tmp_path.iterdir()] == ["wordnet-examples.jsonl"]
    with pytest.raises(AssetError, match="no asset 'nope'; there are glassllm"):
        fetch("nope", tmp_path)


def test_an_unreachable_hub_is_named_and_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def local(target: Path, say: Say) -> None:
        target.mkdir()

    said: list[str] = []
    monkeypatch.setitem(ASSETS, "model", Asset("a model", "model", local, hub="nobody/nothing"))
    assert fetch("model", tmp_path, said.append).is_dir()
    assert said[0] == "trying the model hub: nobody/nothing"
    assert "not from the hub" in said[1]


def test_pip_failure_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(AssetError, match=r"could not download glassllm==0\.1\.0.*\ncheck that"):
        unpack_wheel("glassllm", "0.1.0", "glassllm/", tmp_path / "out", quiet)


PACKAGES = """Package: alpha
Source: one (1.0)

Package: beta
Source: one

Package: gamma
"""
LONG = " ".join(f"word{i}" for i in range(20))
TRANSLATIONS = f"""Package: beta
Description-en: second synopsis of source
 {LONG}

Package: alpha
Description-en: reads mail very quickly
 {LONG}
 over two lines
 .
 Another paragraph.

Package: gamma
Description-en: transitional package for gamma
 {LONG}

Package: delta
Description-en: too short a text
 Few words.
"""


def test_synopsis_pairs() -> None:
    row = {"prompt": f"{LONG} over two lines", "response": "reads mail very quickly", "package": "alpha"}
    assert synopsis_pairs(PACKAGES, TRANSLATIONS) == [row]


def reference_logits(
    weights: dict[str, np.ndarray], shape: dict[str, int | float], ids: list[int]
) -> np.ndarray:
    """glassllm's forward pass as published: rotary pairs are neighbours, RMS norm, SwiGLU, tied output."""
    heads, kv_heads = int(shape["n_heads"]), int(shape["n_kv_heads"])
    head = int(shape["d_model"]) // heads
    t = len(ids)

    def norm(x: np.ndarray, gamma: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + shape["eps"]) * gamma

    def rotate(x: np.ndarray) -> np.ndarray:  # [t, heads, head]
        angle = np.arange(t)[:, None] * shape["rope_base"] ** (-np.arange(0, head, 2) / head)
        turn = np.exp(1j * angle)[:, None]
        z = (x[..., 0::2] + 1j * x[..., 1::2]) * turn
        return np.stack([z.real, z.imag], -1).reshape(x.shape)

    x = weights["E"][ids]
    for i in range(int(shape["n_layers"])):
        w = {k.removeprefix(f"blocks.{i}."): v for k, v in weights.items() if k.startswith(f"blocks.{i}.")}
        h = norm(x, w["norm1.gamma"])
        q = rotate((h @ w["attn.W_Q"]).reshape(t, heads, head))
        k = rotate((h @ w["attn.W_K"]).reshape(t, kv_heads, head)).repeat(heads // kv_heads, 1)
        v = (h @ w["attn.W_V"]).reshape(t, kv_heads, head).repeat(heads // kv_heads, 1)
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(head)
        scores = np.where(np.tril(np.ones((t, t))), scores, -np.inf)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        scores /= scores.sum(-1, keepdims=True)
        x = x + np.einsum("hqk,khd->qhd", scores, v).reshape(t, -1) @ w["attn.W_O"]
        h = norm(x, w["norm2.gamma"])
        gate = h @ w["ffn.W1"]
        x = x + (gate / (1 + np.exp(-gate)) * (h @ w["ffn.W3"])) @ w["ffn.W2"]
    return norm(x, weights["norm_f.gamma"]) @ weights["E"].T


def test_glassllm_layout_conversion_matches_a_numpy_forward_pass(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    vocabulary = {"alphabet": ["a", "b", "\n", "▁"], "merges": [["a", "b"], ["▁", "ab"]]}
    shape = {"d_model": 16, "n_heads": 4, "n_kv_heads": 2, "n_layers": 2, "vocab_size": 10}
    shape |= {"max_len": 32, "eps": 1e-6, "rope_base": 10000.0}
    rng = np.random.default_rng(0)
    weights = {"E": rng.normal(size=(10, 16)), "norm_f.gamma": rng.normal(size=16)}
    sizes = {"attn.W_Q": (16, 16), "attn.W_K": (16, 8), "attn.W_V": (16, 8), "attn.W_O": (16, 16)}
    sizes |= {
        "ffn.W1": (16, 40),
        "ffn.W3": (16, 40),
        "ffn.W2": (40, 16),
        "norm1.gamma": (16,),
        "norm2.gamma": (16,),
    }
    for i in range(2):
        weights |= {f"blocks.{i}.{k}": rng.normal(size=s) * 0.3 for k, s in sizes.items()}
    weights = {k: v.astype(np.float32) for k, v in weights.items()}
    write_glassllm(weights, shape, vocabulary, tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    text = "ab ab\nba  ab"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["ab", "▁ab", "\n", "b", "a", "▁", "▁ab"]
    assert tokenizer.decode(ids) == text
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].numpy()
    assert model.config.intermediate_size == 64
    np.testing.assert_allclose(logits, reference_logits(weights, shape, ids), atol=1e-4)


@pytest.mark.slow
def test_glassllm_from_the_registry(tmp_path: Path) -> None:
    """Mean log-loss on the book's first sentence, equal to the package's own NumPy forward pass."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = fetch("glassllm", tmp_path, quiet)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "Alice was beginning to get very tired of sitting by her sister on the bank,\n"
    text += "and of having nothing to do: “Oh dear!” "
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    assert ids.shape == (1, 39)
    assert float(model(ids, labels=ids).loss) == pytest.approx(3.60069, abs=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("apt-get") is None, reason="needs apt")
def test_debian_synopses_from_the_archive(tmp_path: Path) -> None:
    rows = [json.loads(line) for line in fetch("debian-synopses", tmp_path, quiet).read_text().splitlines()]
    assert len(rows) > 20_000
    assert all(3 <= len(row["response"].split()) <= 14 for row in rows)
