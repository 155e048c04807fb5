"""Configuration of everything between a data file and a trajectory: data, policy model, sampling, rollout
workers.
"""

from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationInfo,
    field_validator,
    model_validator,
)

Seed = Annotated[int, Field(ge=0, lt=2**31)]
"""What numpy, torch and vLLM all take."""


class Section(BaseModel):
    """Base of every configuration section: unknown fields are refused, attribute docstrings document the
    fields, and "none" empties a field that may be empty, since TOML has no null. Numbers are finite and of a
    size that every library takes.
    """

    model_config = ConfigDict(
        extra="forbid", use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )

    @model_validator(mode="before")
    @classmethod
    def _emptied(cls, said: Any) -> Any:
        if not isinstance(said, dict):
            return said
        return {
            name: None if value == "none" and _may_be_empty(cls, name) else value
            for name, value in said.items()
        }

    @field_validator("*")
    @classmethod
    def _usable_everywhere(cls, value: Any, field: ValidationInfo) -> Any:
        name = str(field.field_name)
        if isinstance(value, int | float) and abs(value) > (LONGEST_WAIT_S if name.endswith("_s") else 2**53):
            unit = " seconds" if name.endswith("_s") else ""
            raise ValueError(f"{value:g}{unit} is more than any part of a run can count")
        for text in (value,) if isinstance(value, str) else value if isinstance(value, list | tuple) else ():
            if isinstance(text, str) and any(sign == "\0" or "\ud800" <= sign <= "\udfff" for sign in text):
                raise ValueError("holds a NUL or half a character, which no file name or tokenizer takes")
        return value


LONGEST_WAIT_S = 1e8
"""Three years; Ray and the event loop count nanoseconds in 64 bits."""


def without_places(said: dict[str, Any]) -> dict[str, Any]:
    """Nested sections without the fields that hold an absolute path: they mean nothing on another machine."""
    return {
        name: without_places(value) if isinstance(value, dict) else value
        for name, value in said.items()
        if not (isinstance(value, str) and Path(value).is_absolute())
    }


def _may_be_empty(section: type[BaseModel], name: str) -> bool:
    field = section.model_fields.get(name)
    return field is not None and type(None) in get_args(field.annotation)


class DataConfig(Section):
    """Where demonstrations and prompts come from and how they are split."""

    demonstrations: str = ""
    """JSONL or Parquet file, or a Hugging Face dataset folder; a row is one demonstration (prompt, response).
    """

    prompts: str = ""
    """Optional file of further prompts without responses; they are used for rollouts only. The discriminator
    scores the answers to them but does not learn from them: the prompt alone would give the side away."""

    preferences: str = ""
    """Optional file or folder of preference pairs (prompt, chosen, rejected) for the reward model of
    run.method = "rlhf"."""

    split: str = ""
    """Which split to read of a folder that has several ("train" where none is named), such as "train_sft"."""

    prompt_column: str = "prompt"
    """Column with the prompt: a string, or a list of chat messages with `role` and `content`."""

    response_column: str = "response"
    """Column with the human answer: a string."""

    chosen_column: str = "chosen"
    """Column of `preferences` with the preferred answer: a string."""

    rejected_column: str = "rejected"
    """Column of `preferences` with the other answer: a string."""

    prompt_format: Literal["text", "chat"] = "text"
    """`text` uses the prompt as it stands; `chat` renders it with the tokenizer's chat template."""

    prompt_template: str = "{prompt}"
    """Python format string around a text prompt (in chat format: around the single user message made from
    it).
    """

    system_prompt: str = ""
    """System message put before every chat prompt that does not bring its own."""

    template_variables: dict[str, JsonValue] = {}
    """Variables of the chat template, as in {enable_thinking = false}."""

    today: date | None = None
    """The date that a chat template reads with strftime_now (none: the day on which the run began, which its
    own config.toml keeps)."""

    max_prompt_tokens: PositiveInt = 512
    """Prompts longer than this many tokens are an error (or skipped with on_error = "skip")."""

    on_error: Literal["stop", "skip"] = "stop"
    """A malformed row stops the run with file and line, or is skipped, counted and reported."""

    heldout_fraction: Annotated[float, Field(gt=0, lt=0.5)] = 0.1
    """Share of prompts whose demonstrations only judge the discriminator."""

    selection_fraction: Annotated[float, Field(gt=0, lt=0.5)] = 0.1
    """Share of prompts used to choose the best checkpoint."""

    test_fraction: Annotated[float, Field(gt=0, lt=0.5)] = 0.1
    """Share of prompts read only to report base, best and last."""

    split_seed: Seed = 0
    """Seed of the split; the same seed and prompts give the same four splits, whatever the template."""

    max_demonstrations: PositiveInt | None = None
    """Use at most this many training demonstrations (none: all). Evaluation splits stay as they are."""

    @model_validator(mode="after")
    def _fractions_leave_training_data(self) -> "DataConfig":
        total = self.heldout_fraction + self.selection_fraction + self.test_fraction
        if total >= 0.9:
            raise ValueError(
                f"heldout, selection and test fractions add up to {total:.2f}; leave training data (< 0.9)"
            )
        return self


class PolicyConfig(Section):
    """The language model that is fine-tuned."""

    model: str = ""
    """Hub name or local folder of a causal language model."""

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute dtype of policy, reference and rollout workers; `auto`: bfloat16 on GPUs and on CPUs with
    vector units for it, else float32. Masters and optimizer states are always fp32.
    """

    end_of_response: str = ""
    """Token (as text) that ends a response; empty: the tokenizer's EOS. Base models without a trained EOS can
    use a newline.
    """

    trust_remote_code: bool = False
    """Allow model code from the hub to run."""


class SamplingConfig(Section):
    """How responses are drawn during training. Truncating samplers are refused: the learner cannot see what
    they cut.
    """

    group_size: PositiveInt = 8
    """Responses per prompt."""

    max_tokens: PositiveInt = 64
    """Most tokens in a response, its end token included."""

    min_tokens: Annotated[int, Field(ge=0, le=0)] = 0
    """Must be 0: a minimum length renormalises over tokens the learner does not know."""

    temperature: PositiveFloat = 1.0
    """Sampling temperature; the learner divides its logits by the same number."""

    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Must be 1 in training."""

    top_k: int = 0
    """Must be 0 (off) in training."""

    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Must be 0 in training."""

    repetition_penalty: PositiveFloat = 1.0
    """Must be 1 in training."""

    @model_validator(mode="after")
    def _whole_distribution(self) -> "SamplingConfig":
        for name, off in (("top_p", 1.0), ("top_k", 0), ("min_p", 0.0), ("repetition_penalty", 1.0)):
            if getattr(self, name) != off:
                raise ValueError(
                    f"sampling.{name} = {getattr(self, name)} samples from a distribution the learner cannot "
                    f"evaluate; set it to {off} (only evaluations may truncate: evaluation.top_p)"
                )
        return self


class RolloutConfig(Section):
    """The rollout workers: vLLM engines in Ray actors."""

    workers: PositiveInt = 1
    """Number of rollout workers."""

    tensor_parallel: PositiveInt = 1
    """GPUs per worker."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes CUDA when the cluster has GPUs."""

    cpus_per_worker: PositiveFloat = 0.5
    """Logical Ray CPUs per worker."""

    threads: PositiveInt | None = None
    """OMP threads per CPU worker (none: the node's cores divided by the workers)."""

    max_model_len: PositiveInt | None = None
    """Longest prompt plus response (none: data.max_prompt_tokens + sampling.max_tokens)."""

    max_num_seqs: PositiveInt = 256
    """Sequences decoded together in one worker."""

    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.85
    """Share of a GPU's memory that vLLM may take."""

    kv_cache_gib: PositiveInt = 1
    """KV cache of a CPU worker in GiB."""

    enforce_eager: bool | None = None
    """Skip graph capture (none: on CPU yes, on GPU no)."""

    start_timeout_s: PositiveFloat = 300.0
    """Deadline for a worker to come up."""

    generate_timeout_s: PositiveFloat = 600.0
    """Deadline for one batch of responses: a step's, or as many as the workers decode together if that is
    more."""

    sync_timeout_s: PositiveFloat = 120.0
    """Deadline for one weight sync."""

    sync_bucket_mib: PositiveInt = 64
    """Size of a packed bucket on the wire."""

    max_replacements: NonNegativeInt = 3
    """Times that failed rollout workers are replaced before the run stops; those that fail together count
    once, one that fails while it is replaced counts again, and a resumed run counts anew."""

    logprob_alarm: PositiveFloat = 0.1
    """Alarm when the mean |log-prob difference| between sampler and learner exceeds this."""
