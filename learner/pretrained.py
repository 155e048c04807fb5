"""Pretrained models: loaded ready for packed rows or as a bare body, and judged without an engine."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from learner.attention import attention_implementation
from learner.batching import make_batches
from learner.config import LearnerConfig
from learner.engine import resolve_device, resolve_dtype
from learner.logprobs import ScoredModel
from learner.samples import Samples
from rollout.config import PolicyConfig

_TALKATIVE = ("modeling_utils", "distributed.tensor_parallel")


def load_causal_lm(
    name: str, *, dtype: torch.dtype, device: torch.device, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Load a causal LM by hub name or folder, ready for packed rows and without dropout: what is trained is
    the likelihood that samples were drawn with. ValueError as `load_body`.
    """
    config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    empty = skeleton(config, causal=True, trust_remote_code=trust_remote_code)
    implementation = attention_implementation(device, empty)
    model = _load(AutoModelForCausalLM, name, dtype, implementation, trust_remote_code)
    _set_dropout_to_zero(list(model.modules()))
    return model.to(device)  # type: ignore[arg-type]


def load_body(
    name: str, *, dtype: torch.dtype, implementation: str | None = None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Load a transformer, causal or encoder, without its language-model head, on the CPU. It has the dropout
    of its configuration but in its attention, where flex_attention allows none.

    implementation: of attention (None: the model's own choice). Raises ValueError when weights are missing,
    which would be random without a word.
    """
    model = _load(AutoModel, name, dtype, implementation, trust_remote_code)
    for module in model.modules():
        if "Attention" in type(module).__name__:
            inner = [child for part, child in module.named_children() if "resid" not in part]
            _set_dropout_to_zero([module, *(child for child in inner if isinstance(child, nn.Dropout))])
    return model


def skeleton(config: PreTrainedConfig, *, causal: bool, trust_remote_code: bool = False) -> PreTrainedModel:
    """The causal language model, or the body, of a configuration on torch's `meta` device: all its modules in
    a moment and no weights."""
    kind = AutoModelForCausalLM if causal else AutoModel
    with _quiet(), torch.device("meta"):
        return kind.from_config(config, trust_remote_code=trust_remote_code)


def longest_input(model: PreTrainedModel) -> int | None:
    """Most tokens that a model reads; None when its configuration knows no limit.

    RoBERTa and its kin number positions from behind the padding index, within the same table.
    """
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return int(module.weight.shape[0]) - module.padding_idx - 1  # type: ignore[operator, union-attr]
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def _set_dropout_to_zero(modules: list[nn.Module]) -> None:
    for module in modules:
        for attribute, value in vars(module).items():
            if isinstance(value, float) and ("drop" in attribute or isinstance(module, nn.Dropout)):
                setattr(module, attribute, 0.0)


def _load(
    kind: Any, name: str, dtype: torch.dtype, implementation: str | None, trust_remote_code: bool
) -> PreTrainedModel:
    with _quiet():
        model, found = kind.from_pretrained(
            name,
            dtype=dtype,
            attn_implementation=implementation,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    # Nothing here reads a pooler.
    missing = sorted(weight for weight in found["missing_keys"] if not weight.startswith("pooler."))
    if missing:
        raise ValueError(
            f"{name} lacks {len(missing)} of the model's weights, e.g. {missing[0]}: it is no checkpoint of "
            f"{type(model).__name__}, or not a whole one"
        )
    loaded: PreTrainedModel = model
    return loaded


@contextmanager
def _quiet() -> Iterator[None]:
    """Without reports on unused weights, such as a body's head, and on a tensor-parallel plan that nobody
    asked for, and without a progress bar."""
    logs = [logging.getLogger(f"transformers.{name}") for name in _TALKATIVE]
    levels, bar = [log.level for log in logs], transformers_logging.is_progress_bar_enabled()
    for log in logs:
        log.setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)
        if bar:
            transformers_logging.enable_progress_bar()


@torch.no_grad()
def mean_nll(policy: PolicyConfig, cfg: LearnerConfig, table: pa.Table, *, temperature: float = 1.0) -> float:
    """Mean negative log-likelihood, nats per token, of a table's responses under a model, without an engine.

    Reads `prompt_ids`, `response_ids` and, if there, `group_id`. Raises ValueError without response tokens.
    """
    samples = Samples.from_table(table)
    if samples.tokens == 0:
        raise ValueError("the table has no response token to judge")
    device = resolve_device(cfg.device)
    network = load_causal_lm(
        policy.model,
        dtype=resolve_dtype(cfg.compute_dtype, policy.dtype, device),
        device=device,
        trust_remote_code=policy.trust_remote_code,
    )
    model = ScoredModel(network, temperature=temperature, chunk=cfg.logits_chunk, packing=cfg.packing).eval()
    total = sum(
        float(model(batch.to(device))[0].double().sum()) for batch in make_batches(samples.groups, cfg)
    )
    return -total / samples.tokens
