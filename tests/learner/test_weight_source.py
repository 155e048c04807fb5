"""What goes over the wire and into an export is what a checkpoint holds. vLLM reads names and shapes of
checkpoints; transformers keeps some weights under other names, or a layer's experts as one parameter.
"""

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from learner.config import LearnerConfig
from learner.policy import PolicyLearner
from learner.weight_source import ModuleWeights
from rollout.wire import CHECKSUM_PREFIX, checksum

SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 48}
EXPERTS = SIZES | {"num_key_value_heads": 2, "intermediate_size": 48, "num_experts_per_tok": 2}
CONFIGS = [
    transformers.LlamaConfig(**SIZES, intermediate_size=48, tie_word_embeddings=True),
    transformers.GPTNeoXConfig(**SIZES, intermediate_size=48),
    transformers.MixtralConfig(**EXPERTS, num_local_experts=3),
    transformers.Qwen3MoeConfig(**EXPERTS, head_dim=16, num_experts=3, moe_intermediate_size=24),
    transformers.GraniteMoeConfig(**EXPERTS, num_local_experts=3),
    transformers.Glm4MoeConfig(  # whose router has a buffer
        **EXPERTS, head_dim=16, n_routed_experts=3, moe_intermediate_size=24, first_k_dense_replace=0
    ),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model_type)
def test_wire_and_export_carry_the_names_shapes_and_values_of_a_checkpoint(
    config: transformers.PreTrainedConfig, tmp_path: Path
) -> None:
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    source = ModuleWeights(AutoModelForCausalLM.from_pretrained(tmp_path), gather_bytes=1 << 12)
    sent = dict(source)
    promised = {meta.name: (meta.dtype, meta.shape) for meta in source.metadata()}
    assert list(promised) == list(sent)
    assert promised == {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in sent.items()}
    stored = load_file(tmp_path / "model.safetensors")
    assert sent.keys() == stored.keys() | {CHECKSUM_PREFIX + name for name in stored}
    for name, tensor in stored.items():
        assert torch.equal(sent[name], tensor)
        assert torch.equal(sent[CHECKSUM_PREFIX + name], checksum(tensor))

    PolicyLearner(str(tmp_path), LearnerConfig(), model_dtype="float32").export(tmp_path / "exported")
    exported = load_file(tmp_path / "exported/model.safetensors")
    assert exported.keys() == stored.keys()
    assert all(torch.equal(exported[name], tensor) for name, tensor in stored.items())


def test_a_checkpoint_that_makes_one_tensor_of_several_is_refused() -> None:
    config = transformers.HrmTextConfig(**SIZES, intermediate_size=48)
    with pytest.raises(ValueError, match=r"policy\.model of type 'hrm_text': a checkpoint keeps several"):
        ModuleWeights(AutoModelForCausalLM.from_config(config))
