"""Configuration of the learner: ranks and ZeRO, optimizer, packing, advantages and losses.

Reading this module imports neither torch nor DeepSpeed, so that a dry run can check a configuration on any
machine.
"""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from rollout.config import Section


class LoraConfig(Section):
    """Low-rank adapters in place of full fine-tuning (peft)."""

    rank: NonNegativeInt = 0
    """Rank of the adapters; 0 trains all weights."""

    alpha: PositiveFloat = 16.0
    """Adapters are scaled by alpha / rank."""

    target_modules: list[str] | Literal["all-linear"] = "all-linear"
    """Names of the linear modules that get an adapter; `all-linear` means every linear layer but the head."""


class OptimizerConfig(Section):
    """AdamW with clipping and a learning-rate schedule, on DeepSpeed ZeRO. Shared by every trained module."""

    ranks: PositiveInt = 1
    """Data-parallel processes."""

    zero_stage: Literal[1, 2, 3] = 1
    """What is sharded over the ranks: 1 optimizer states, 2 and gradients, 3 and weights."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes CUDA when the process sees a GPU."""

    cpus_per_rank: PositiveFloat = 0.5
    """Logical Ray CPUs per rank."""

    threads: PositiveInt | None = None
    """Compute threads per CPU rank (None: the node's cores divided by the ranks)."""

    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of the arithmetic. `auto`: the model's dtype on GPUs and on CPUs with AVX-512, else float32,
    because without it bfloat16 matrix products are many times slower. Masters and optimizer states are fp32
    in every case."""

    lr: PositiveFloat = 1e-5
    """Peak learning rate."""

    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.99)
    """Decay of AdamW's first and second moments."""

    eps: PositiveFloat = 1e-8
    """AdamW's epsilon."""

    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay on matrices; vectors (norms, biases) are exempt."""

    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the learning rate after warm-up; linear and cosine end at zero after `schedule_steps`."""

    schedule_steps: PositiveInt | None = None
    """Optimizer updates until a linear or cosine schedule ends (None: the run's own number of updates)."""

    warmup_steps: NonNegativeInt = 0
    """Updates over which the learning rate rises linearly from zero."""

    grad_clip: NonNegativeFloat = 1.0
    """Clip the global gradient norm to this (0: off)."""

    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: a third more arithmetic, far less memory."""

    start_timeout_s: PositiveFloat = 300.0
    """Deadline for all ranks to come up."""

    step_timeout_s: PositiveFloat = 1800.0
    """Deadline for one step, and for every collective inside it."""

    @model_validator(mode="after")
    def _schedule_fits(self) -> "OptimizerConfig":
        if self.schedule_steps is not None and self.warmup_steps >= self.schedule_steps:
            raise ValueError(
                f"warmup_steps = {self.warmup_steps} uses up all of schedule_steps = {self.schedule_steps}; "
                "shorten the warm-up"
            )
        return self


class LearnerConfig(OptimizerConfig):
    """How scored trajectories become new policy weights."""

    packing: bool = True
    """Compute a group's prompt once and share it among its responses. Needs full causal attention; a model
    without it is refused with a message that asks to switch this off."""

    pack_length: PositiveInt = 512
    """Longest packed row in tokens (a longer single prompt plus response still gets a row). A group that is
    longer is split over rows and its prompt computed once per row."""

    micro_batch_tokens: PositiveInt = 4096
    """Most tokens, padding included, in one forward and backward pass; a single longer row still runs."""

    logits_chunk: PositiveInt = 1024
    """Most response tokens whose logits (a vocabulary each) are in memory at one time."""

    epochs: PositiveInt = 1
    """Passes over a step's trajectories."""

    minibatches: PositiveInt = 1
    """Optimizer updates per pass; groups are never split between minibatches."""

    loss: Literal["reinforce", "ppo_clip"] = "reinforce"
    """Policy loss. With epochs = minibatches = 1 the ratio is one and both have the same gradient."""

    clip_low: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """PPO: ratios below 1 - clip_low earn nothing more."""

    clip_high: PositiveFloat = 0.2
    """PPO: ratios above 1 + clip_high earn nothing more."""

    gamma: Annotated[float, Field(ge=0, le=1)] | None = None
    """Discount of later tokens' rewards in a token's return (None: 1 with sequence-level rewards, .25 per
    token).
    """

    baseline: Literal["none", "batch", "group"] = "batch"
    """What is subtracted from returns: nothing, the batch mean, or the mean over the prompt's group."""

    whiten: bool = False
    """Scale a step's advantages to unit standard deviation."""

    kl_coef: NonNegativeFloat = 0.01
    """Weight of the KL divergence from the reference (the base model); 0 loads no reference."""

    kl_estimator: Literal["k1", "k2", "k3"] = "k2"
    """Per-token estimator of that KL. As a loss, k2 has the exact gradient in expectation and k1 has none."""

    kl_in: Literal["loss", "reward"] = "loss"
    """Add the KL to the loss, or subtract it from the token rewards."""

    entropy_coef: NonNegativeFloat = 0.0
    """Weight of the entropy bonus."""

    importance_cap: PositiveFloat | None = 2.0
    """Truncated importance sampling: weights of learner over sampler are capped here (None: no
    correction)."""

    normalise: Literal["token", "sequence"] = "token"
    """Mean of the loss over the step's tokens, or over its sequences of each sequence's mean."""

    lora: LoraConfig = LoraConfig()
    """Low-rank adapters."""

    @model_validator(mode="after")
    def _consistent(self) -> "LearnerConfig":
        if self.kl_coef > 0 and self.kl_in == "loss" and self.kl_estimator == "k1":
            raise ValueError(
                'kl_estimator = "k1" has zero gradient in expectation as a loss; use "k2" or "k3", '
                'or kl_in = "reward"'
            )
        if self.kl_coef > 0 and self.kl_in == "reward" and self.kl_estimator != "k1":
            raise ValueError(
                f'kl_in = "reward" with kl_estimator = "{self.kl_estimator}" has a biased gradient; '
                'set kl_estimator = "k1"'
            )
        if self.loss == "reinforce" and self.epochs * self.minibatches > 1:
            raise ValueError(
                'loss = "reinforce" is on-policy: set epochs = 1 and minibatches = 1, '
                'or loss = "ppo_clip" to reuse samples'
            )
        if self.pack_length > self.micro_batch_tokens:
            raise ValueError(
                f"pack_length = {self.pack_length} exceeds micro_batch_tokens = {self.micro_batch_tokens}; "
                "lower the first or raise the second"
            )
        return self
