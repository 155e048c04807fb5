"""What is checked of a run's models before anything is started: configurations, tokenizers, and the modules
that their classes make on torch's `meta` device. No weights are read.

Each refusal is a DataError of one sentence: the field, what is wrong, and a remedy.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from discriminator.config import DiscriminatorConfig
from learner.config import LoraConfig
from rollout.config import PolicyConfig
from rollout.data import DataError
from rollout.hub import hub_problem
from rollout.templates import load_tokenizer
from services.config import Config

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

Use = Literal["generate", "evaluate", "train"]
LONGEST = "data.max_prompt_tokens + sampling.max_tokens"
"""What bounds the policy's sequences."""


def check_policy(config: Config, tokenizer: Any, use: Use = "train") -> None:
    """The policy is a causal language model that can be sampled; to "evaluate" it the learner must compute
    what rollout workers do, and to "train" it, its adapters must fold into its weights.

    Raises:
        DataError: names the field.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES  # seconds to import

    from learner.logprobs import linear_head
    from learner.pretrained import skeleton

    policy, learner = config.policy, config.learner
    with _refusals("policy.model", policy.model):
        shape = _shape(policy)
        kind = shape.get_text_config().model_type
        if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not policy.trust_remote_code:
            raise DataError(f"{kind!r} is not a causal language model; name one that is")
        model = skeleton(shape, causal=True, trust_remote_code=policy.trust_remote_code)
        _check_vocabulary(model, tokenizer)
        _check_context(config, model, tokenizer)
        if use != "generate":
            longest = config.data.max_prompt_tokens + config.sampling.max_tokens
            _check_attention(model, model.get_decoder(), learner.packing, "learner", longest, LONGEST)
            linear_head(model)
    if use == "train":
        _check_adapters("learner", learner.lora, model)


def check_other_models(config: Config) -> None:
    """The models that judge can be found and have a fast tokenizer, like the policy, and the discriminator's
    body can judge at its level, reads the longest answer, and takes its adapters.

    Raises:
        DataError: names the field.
    """
    if config.run.method != "sft":
        if config.discriminator.model:
            _tokenizer_of(config, "discriminator.model", config.discriminator.model)
        _check_body(config.discriminator, config.discriminator.model or config.policy.model)
    check_embedding_model(config)


def check_embedding_model(config: Config) -> None:
    """The model behind the embedding classifier can be found, and has a fast tokenizer."""
    name = config.evaluation.embedding_model
    if name and name != "none":
        _tokenizer_of(config, "evaluation.embedding_model", name)


def _tokenizer_of(config: Config, field: str, name: str) -> Any:
    try:
        return load_tokenizer(config.policy.model_copy(update={"model": name}))
    except DataError as error:
        raise DataError(str(error).replace("policy.model", field)) from None


def _check_body(judge: DiscriminatorConfig, name: str) -> None:
    from discriminator.model import body_kind, load_canonicaliser  # seconds to import
    from learner.pretrained import skeleton

    policy = PolicyConfig(model=name, trust_remote_code=judge.trust_remote_code)
    with _refusals("discriminator.model", name):
        shape = _shape(policy)
        kind = body_kind(shape, judge.body)
        if kind == "encoder" and judge.level == "token":
            raise DataError(
                'the body is bidirectional: discriminator.level = "token" would score prefixes that saw the '
                'future; choose a causal model or level = "sequence"'
            )
        body = skeleton(shape, causal=False, trust_remote_code=judge.trust_remote_code)
        canonical = load_canonicaliser(judge, name)
        _check_vocabulary(body, canonical.tokenizer)
        longest = canonical.max_prompt + canonical.max_response
        packing = judge.packing and kind == "causal"
        limits = "discriminator.canonical.max_prompt_tokens + max_response_tokens"
        _check_attention(body, body, packing, "discriminator", longest, limits)
    _check_adapters("discriminator", judge.lora, body)


@contextmanager
def _refusals(field: str, name: str) -> Iterator[None]:
    """What is refused within is refused as this field's."""
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise DataError(f"{field} = {name!r}: {(str(error).splitlines() or [''])[0]}") from None


def _shape(policy: PolicyConfig) -> "PreTrainedConfig":
    from transformers import AutoConfig

    shape = AutoConfig.from_pretrained(
        policy.model,
        trust_remote_code=policy.trust_remote_code,
        local_files_only=not Path(policy.model).is_dir() and hub_problem(policy.model) is not None,
    )
    if getattr(shape, "quantization_config", None):
        raise DataError("its weights are quantised, which nothing here can train; name an unquantised model")
    return shape


def _check_vocabulary(model: "PreTrainedModel", tokenizer: Any) -> None:
    embedding: Any = model.get_input_embeddings()
    rows, last = embedding.weight.shape[0], max(tokenizer.get_vocab().values())
    if last >= rows:
        raise DataError(
            f"vocabulary mismatch: the tokenizer has a token {last}, and the model's embedding {rows} rows; "
            "take the tokenizer that belongs to the model"
        )


def _check_context(config: Config, model: "PreTrainedModel", tokenizer: Any) -> None:
    """vLLM refuses what is longer than the model's context or the tokenizer's own limit."""
    from learner.pretrained import longest_input

    context = min(longest_input(model) or tokenizer.model_max_length, tokenizer.model_max_length)
    if config.max_model_len > context:
        field = "rollout.max_model_len" if config.rollout.max_model_len else LONGEST
        raise DataError(
            f"{field} = {config.max_model_len} is more than the context of the model and its tokenizer "
            f"({context}); lower data.max_prompt_tokens to at most {context - config.sampling.max_tokens}"
        )


def _check_attention(
    model: "PreTrainedModel", body: Any, packing: bool, section: str, longest: int, limits: str
) -> None:
    """Packed rows are computed exactly up to the longest sequence."""
    from learner.attention import longest_packable

    if not packing:
        return
    limit = longest_packable(model.config.get_text_config(), body)
    if limit is not None and longest > limit:
        raise DataError(
            f"{limits} = {longest} is more than the model's sliding window of {limit}, beyond which packed "
            f"rows attend too far; lower it, or set {section}.packing = false"
        )


def _check_adapters(section: str, lora: LoraConfig, model: "PreTrainedModel") -> None:
    import torch

    from learner.lora import attach

    try:
        attach(model, lora, sent=torch.float32)
    except ValueError as error:
        raise DataError(f"{section}.{error}") from None
