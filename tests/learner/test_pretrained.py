"""Models as they are loaded for training."""

import pytest
import torch
from transformers import AttentionInterface, AutoModel, GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

from learner.attention import ON_CPU
from learner.pretrained import load_body, load_causal_lm


@pytest.mark.parametrize(
    "model",
    [
        GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=32, n_embd=16, n_layer=2, n_head=2)),
        OPTForCausalLM(
            OPTConfig(
                vocab_size=50,
                hidden_size=16,
                ffn_dim=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=32,
                word_embed_proj_dim=16,
                layerdrop=0.5,
            )
        ),
    ],
    ids=["gpt2", "opt"],
)
def test_what_is_trained_is_what_samples_were_drawn_with(tmp_path, model):
    """Without the dropout of the base's configuration, which stays as it was for whoever trains it next."""
    model.save_pretrained(tmp_path)
    ids = torch.arange(2, 14)[None]
    loaded = load_causal_lm(str(tmp_path), dtype=torch.float32, device=torch.device("cpu"))
    with torch.no_grad():
        expected, *trained = loaded.eval()(ids).logits, *(loaded.train()(ids).logits for _ in range(4))
    for logits in trained:
        assert torch.equal(logits, expected)
    name = "resid_pdrop" if hasattr(model.config, "resid_pdrop") else "dropout"
    assert getattr(loaded.config, name) == getattr(model.config, name) == 0.1


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(vocab_size=50, n_positions=32, n_embd=16, n_layer=1, n_head=2),
        OPTConfig(
            vocab_size=50,
            hidden_size=16,
            ffn_dim=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            word_embed_proj_dim=16,
            attention_dropout=0.1,
        ),
    ],
    ids=["gpt2", "opt"],
)
def test_a_body_keeps_its_dropout_but_in_its_attention(tmp_path, monkeypatch, config):
    """flex_attention refuses any in training."""
    AutoModel.from_config(config).save_pretrained(tmp_path)
    body = load_body(str(tmp_path), dtype=torch.float32, implementation=ON_CPU).train()
    told = []
    plain = AttentionInterface()[ON_CPU]
    monkeypatch.setitem(
        AttentionInterface._global_mapping,
        ON_CPU,
        lambda *words, **options: told.append(options.get("dropout", 0.0)) or plain(*words, **options),
    )
    ids = torch.arange(2, 14)[None]
    assert not torch.equal(body(ids)[0], body(ids)[0]), "dropout elsewhere goes on"
    assert told == [0.0, 0.0]
