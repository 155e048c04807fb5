"""Configuration of the learner: ranks and ZeRO, optimizer, packing, advantages and losses.

Reading this module imports neither torch nor DeepSpeed, so that a dry run can check a configuration on any
machine.
"""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from rollout.config import Section

Advantage = Literal["return", "rloo", "grpo", "dr_grpo", "reinforce_plus_plus", "gae"]
PolicyLoss = Literal["reinforce", "ppo_clip", "gspo"]
GumbelObjective = Literal["neg_log_one_minus_d", "log_d", "logit", "prob"]


class LoraConfig(Section):
    """Low-rank adapters in place of full fine-tuning (peft)."""

    rank: NonNegativeInt = 0
    """Rank of the adapters; 0 trains all weights."""

    alpha: PositiveFloat = 16.0
    """Adapters are scaled by alpha / rank."""

    target_modules: list[str] | Literal["all-linear"] = "all-linear"
    """Names of the linear modules that get an adapter; `all-linear` means every linear layer but the head.
    Modules that are not linear (embeddings, stacked experts) and the head are refused."""


class OptimizerConfig(Section):
    """AdamW with clipping and a learning-rate schedule, on DeepSpeed ZeRO. Shared by every trained module."""

    ranks: PositiveInt = 1
    """Data-parallel processes."""

    zero_stage: Literal[1, 2, 3] = 1
    """What is sharded over the ranks: 1 optimizer states, 2 and gradients, 3 and weights."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes CUDA when the cluster has GPUs."""

    cpus_per_rank: PositiveFloat = 0.5
    """Logical Ray CPUs per rank."""

    threads: PositiveInt | None = None
    """Compute threads per CPU rank (none: the node's cores divided by the ranks)."""

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
    """Optimizer updates until a linear or cosine schedule ends (none: the run's own number of updates, the
    discriminator's with all that its warm-up may take)."""

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


class CriticConfig(Section):
    """The critic of `advantage = "gae"`: the policy's base model with a value head, all its weights trained.

    What is not set here (ranks, ZeRO stage, optimizer, packing) is as for the policy.
    """

    lr: PositiveFloat = 1e-5
    """Peak learning rate; its schedule is the policy's."""

    clip: PositiveFloat | None = 0.2
    """A value that has moved further than this from its value at the step's start earns nothing more (none:
    no clipping)."""


class SupervisedConfig(Section):
    """Supervised fine-tuning, the baseline `run.method = "sft"`; no other method reads this section."""

    batch_size: PositiveInt = 64
    """Human answers in one step."""

    check_every: PositiveInt = 10
    """Steps between two looks at the likelihood of the selection split's human answers."""

    patience: PositiveInt = 5
    """Looks without improvement that end training. Then, and at run.steps, the best weights are restored."""


class GumbelConfig(Section):
    """The Gumbel-Softmax update: the judge's gradient flows into the policy through straight-through samples
    that the learner draws; see learner/gumbel.py."""

    weight: NonNegativeFloat = 0.0
    """Weight of its objective in the loss; 0 switches it off, and nothing below is read."""

    policy_gradient_weight: NonNegativeFloat = 1.0
    """Weight of the policy gradient beside it; 0 leaves Gumbel-Softmax alone (KL and entropy stay in the
    loss)."""

    objective: GumbelObjective = "neg_log_one_minus_d"
    """What is raised, as a function of the score: the reward forms of the same names. `logit`, the raw score,
    also serves for `bradley_terry` and `relativistic`, whose gradient is the same."""

    samples: PositiveInt = 2
    """Responses drawn for each prompt of a step."""

    max_tokens: PositiveInt | None = None
    """Most tokens of a drawn response, its end token included (none: sampling.max_tokens)."""

    schedule: Literal["constant", "linear", "exponential"] = "exponential"
    """How the temperature goes from `tau_start` to `tau_end`: not at all, by equal differences or by equal
    ratios."""

    tau_start: PositiveFloat = 1.0
    """Temperature of the relaxation at step 0. High: little variance, much bias."""

    tau_end: PositiveFloat = 0.5
    """Temperature after `tau_steps`. Low: gradients vanish for all but close races."""

    tau_steps: PositiveInt | None = None
    """Steps until `tau_end` (none: the run's)."""


class LearnerConfig(OptimizerConfig):
    """How scored trajectories become new policy weights."""

    packing: bool = True
    """Compute a group's prompt once and share it among its responses. Needs full causal attention. Switched
    off, models with sliding windows, ALiBi or recurrent layers are computed too, a response in a row."""

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

    loss: PolicyLoss = "reinforce"
    """Policy loss: `reinforce`, `ppo_clip` (ratios clipped token by token) or `gspo` (one clipped ratio a
    response; its bounds are far smaller, the paper's are 3e-4 and 4e-4). With epochs = minibatches = 1 the
    ratio is one and all have the same gradient."""

    clip_low: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """ppo_clip, gspo: ratios below 1 - clip_low earn nothing more."""

    clip_high: PositiveFloat = 0.2
    """ppo_clip, gspo: ratios above 1 + clip_high earn nothing more; above clip_low it is "clip-higher"."""

    dual_clip: Annotated[float, Field(gt=1)] | None = None
    """ppo_clip: bound on the ratio of tokens with a negative advantage (3 in the paper; none: no bound)."""

    advantage: Advantage = "return"
    """Estimator: `return` (discounted return minus `baseline`), `rloo` (minus the mean of the group's
    others), `grpo` (minus the group's mean, over its standard deviation), `dr_grpo` (minus the group's mean,
    with normalise = "constant"), `reinforce_plus_plus` (return whitened over the step) or `gae` (with a
    critic)."""

    gamma: Annotated[float, Field(ge=0, le=1)] | None = None
    """Discount of later tokens' rewards in a token's return (none: 1 with sequence-level rewards, .25 per
    token).
    """

    absorbing_end: bool = False
    """Count the reward of a response's last token as earned again for ever, so that per-token rewards do not
    pay for length (discounted: needs gamma < 1)."""

    gae_lambda: Annotated[float, Field(ge=0, le=1)] = 0.95
    """gae: 1 trusts the rewards (little bias), 0 the critic (little variance)."""

    baseline: Literal["none", "batch", "group"] = "batch"
    """return: what is subtracted: nothing, the batch mean, or the mean over the prompt's group."""

    whiten: bool = False
    """return, rloo, gae: scale a step's advantages to mean zero and unit standard deviation."""

    kl_coef: NonNegativeFloat = 0.01
    """Weight of the KL divergence from the reference (the base model); 0 loads no reference, and the metrics
    have no `policy/kl`."""

    kl_target: PositiveFloat | None = None
    """Adapt `kl_coef` after each step so that the KL, in nats per token, comes to this (none: fixed)."""

    kl_gain: Annotated[float, Field(gt=0, le=1)] = 0.1
    """With kl_target: the coefficient changes by at most a fifth of this share in one step."""

    kl_estimator: Literal["k1", "k2", "k3"] = "k2"
    """Per-token estimator of that KL. As a loss, k2 has the exact gradient in expectation and k1 has none."""

    kl_in: Literal["loss", "reward"] = "loss"
    """Add the KL to the loss, or subtract it from the token rewards."""

    entropy_coef: NonNegativeFloat = 0.0
    """Weight of the entropy bonus."""

    importance: Literal["truncated", "masked"] = "truncated"
    """What happens to weights of learner over sampler out of bounds: above `importance_cap` they are set to
    it, or below `importance_floor` and above `importance_cap` the token is left out of the policy loss."""

    importance_cap: PositiveFloat | None = 2.0
    """Upper bound of importance weights (none: no correction)."""

    importance_floor: NonNegativeFloat = 0.0
    """masked: lower bound of importance weights."""

    normalise: Literal["token", "sequence", "constant"] = "token"
    """Mean of the loss over the step's tokens; over its sequences of each sequence's mean; or over its
    sequences of each sequence's sum, divided by `constant_length` whatever its length."""

    constant_length: PositiveInt | None = None
    """normalise = "constant": the length that every sequence counts for (none: the run's longest
    response)."""

    critic: CriticConfig = CriticConfig()
    """The critic of `advantage = "gae"`."""

    sft: SupervisedConfig = SupervisedConfig()
    """Supervised fine-tuning."""

    gumbel: GumbelConfig = GumbelConfig()
    """The Gumbel-Softmax update, beside or in place of the policy gradient."""

    lora: LoraConfig = LoraConfig()
    """Low-rank adapters."""

    @property
    def needs_groups(self) -> bool:
        """Whether advantages compare the responses to one prompt, so that there must be more than one."""
        return self.advantage in ("rloo", "grpo", "dr_grpo") or (
            self.advantage == "return" and self.baseline == "group"
        )

    @model_validator(mode="after")
    def _kl_consistent(self) -> "LearnerConfig":
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
        if self.kl_target is not None and self.kl_coef == 0:
            raise ValueError(
                "kl_target adapts kl_coef by factors, which leaves 0 at 0; set kl_coef to the coefficient to "
                "begin with, or drop kl_target"
            )
        return self

    @model_validator(mode="after")
    def _advantage_consistent(self) -> "LearnerConfig":
        if self.advantage != "return" and self.baseline != "batch":
            raise ValueError(
                f'baseline = "{self.baseline}" is read by advantage = "return" alone; '
                f'advantage = "{self.advantage}" brings its own: drop baseline'
            )
        if self.whiten and self.advantage in ("grpo", "dr_grpo", "reinforce_plus_plus"):
            raise ValueError(
                f'advantage = "{self.advantage}" fixes its own scale, which whiten = true would undo; '
                "drop whiten"
            )
        if self.advantage == "dr_grpo" and self.normalise != "constant":
            raise ValueError(
                'advantage = "dr_grpo" is defined with a loss that favours no length: set normalise = '
                '"constant", or take advantage = "return" with baseline = "group"'
            )
        if self.advantage == "reinforce_plus_plus" and self.kl_coef > 0 and self.kl_in != "reward":
            raise ValueError(
                'advantage = "reinforce_plus_plus" whitens returns with the KL in them: set kl_in = "reward" '
                'and kl_estimator = "k1", or kl_coef = 0'
            )
        if self.constant_length is not None and self.normalise != "constant":
            raise ValueError(
                f'constant_length is read with normalise = "constant", not "{self.normalise}"; drop one'
            )
        return self

    @model_validator(mode="after")
    def _loss_consistent(self) -> "LearnerConfig":
        if self.loss == "reinforce" and self.epochs * self.minibatches > 1:
            raise ValueError(
                'loss = "reinforce" is on-policy: set epochs = 1 and minibatches = 1, '
                'or loss = "ppo_clip" to reuse samples'
            )
        if self.dual_clip is not None and self.loss != "ppo_clip":
            raise ValueError(
                f'dual_clip bounds the ratio of loss = "ppo_clip"; "{self.loss}" has none: drop it'
            )
        if self.dual_clip is not None and self.dual_clip <= 1 + self.clip_high:
            raise ValueError(
                f"dual_clip = {self.dual_clip} is within the clip range that ends at {1 + self.clip_high}; "
                "raise it (3 is usual)"
            )
        if self.loss == "gspo" and self.normalise != "sequence":
            raise ValueError(
                f'loss = "gspo" is a mean over sequences: set normalise = "sequence", not "{self.normalise}"'
            )
        if self.importance == "masked" and self.importance_cap is None:
            raise ValueError('importance = "masked" needs importance_cap, the upper bound of what is kept')
        if self.importance == "truncated" and self.importance_floor > 0:
            raise ValueError('importance_floor is the lower bound of importance = "masked"; drop it')
        if self.importance == "truncated" and self.importance_cap is not None and self.importance_cap < 1:
            raise ValueError(
                f"importance_cap = {self.importance_cap} cuts the weight 1 of a sampler that agrees with the "
                "learner; set it to 1 or more"
            )
        if self.importance == "masked" and not self.importance_floor <= 1 <= (self.importance_cap or 1):
            raise ValueError(
                f"importance_floor = {self.importance_floor} to importance_cap = {self.importance_cap} "
                "leaves out the weight 1 of a sampler that agrees with the learner; put 1 between them"
            )
        return self

    @model_validator(mode="after")
    def _gumbel_consistent(self) -> "LearnerConfig":
        gumbel = self.gumbel
        if gumbel.weight == 0:
            if gumbel.policy_gradient_weight != 1:
                raise ValueError(
                    f"gumbel.policy_gradient_weight = {gumbel.policy_gradient_weight:g} weighs the policy "
                    "gradient against Gumbel-Softmax, which gumbel.weight = 0 switches off; set a weight"
                )
            return self
        if self.zero_stage == 3:
            raise ValueError(
                "gumbel.weight > 0 draws responses in the learner, and ZeRO-3 would gather all weights anew "
                "for every token; use zero_stage 1 or 2"
            )
        if self.epochs * self.minibatches > 1:
            raise ValueError(
                "gumbel.weight > 0 needs epochs = 1 and minibatches = 1: its samples are those of the step's "
                "first weights, and a second update would differentiate noise that no longer yields them"
            )
        if gumbel.policy_gradient_weight == 0 and self.kl_coef > 0 and self.kl_in == "reward":
            raise ValueError(
                'gumbel.policy_gradient_weight = 0 drops the rewards, and with kl_in = "reward" the KL too; '
                'set kl_in = "loss" or kl_coef = 0'
            )
        if gumbel.policy_gradient_weight == 0 and self.advantage == "gae":
            raise ValueError(
                'gumbel.policy_gradient_weight = 0 has no use for the critic of advantage = "gae"; choose '
                'advantage = "return"'
            )
        return self

    @model_validator(mode="after")
    def _rows_fit(self) -> "LearnerConfig":
        if self.pack_length > self.micro_batch_tokens:
            raise ValueError(
                f"pack_length = {self.pack_length} exceeds micro_batch_tokens = {self.micro_batch_tokens}; "
                "lower the first or raise the second"
            )
        return self
