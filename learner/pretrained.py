"""Pretrained causal language models: loaded ready for packed rows, and judged without an engine."""

import pyarrow as pa
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from learner.attention import attention_implementation
from learner.batching import make_batches
from learner.config import LearnerConfig
from learner.engine import resolve_device, resolve_dtype
from learner.logprobs import ScoredModel
from learner.samples import Samples
from rollout.config import PolicyConfig


def load_causal_lm(
    name: str, *, dtype: torch.dtype, device: torch.device, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Load a causal LM by hub name or folder, ready for packed rows."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        name,
        dtype=dtype,
        attn_implementation=attention_implementation(device),
        trust_remote_code=trust_remote_code,
    )
    return model.to(device)  # type: ignore[arg-type]


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
