"""Configuration of the discriminator: body, training, replay, rewards, health and scoring."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from learner.config import LoraConfig, OptimizerConfig
from rollout.config import Section

Level = Literal["sequence", "token"]
RewardForm = Literal["neg_log_one_minus_d", "prob", "logit", "log_d"]
Fraction = Annotated[float, Field(ge=0, le=1)]


class CanonicalConfig(Section):
    """The one spelling in which demonstrations and rollouts are judged."""

    unicode: Literal["nfc", "off"] = "nfc"
    """Unicode normalisation of responses. `off` lets a decomposed accent tell the sides apart."""

    whitespace: Literal["collapse", "outer", "off"] = "collapse"
    """`outer` strips both ends and makes every line end a newline. `collapse` also turns each run of blanks
    into one space, drops blanks beside newlines and keeps at most one empty line; use `outer` where
    indentation means something (code)."""

    max_prompt_tokens: PositiveInt | None = None
    """Discriminator tokens of a prompt that are read, counted from its end (None: what the context
    leaves)."""

    max_response_tokens: PositiveInt | None = None
    """Discriminator tokens of a response that are read; a longer one is judged as cut, on either side (None:
    half of the body's context)."""


class HealthConfig(Section):
    """Bands of the health gate. Both numbers are measured on held-out demonstrations against fresh
    rollouts."""

    enabled: bool = True
    """Off: every policy step gets `steps_per_policy_step` discriminator steps."""

    low_accuracy: Fraction = 0.55
    """Below this balanced accuracy the discriminator gets `extra_steps` more steps."""

    slow_accuracy: Fraction = 0.95
    """From here on the discriminator makes one step per policy step."""

    pause_accuracy: Fraction = 0.99
    """From here on it makes none, until the accuracy is below `slow_accuracy` again."""

    slow_margin: PositiveFloat = 6.0
    """Margin (mean score of demonstrations minus that of rollouts, in logits) that slows the
    discriminator."""

    pause_margin: PositiveFloat = 10.0
    """Margin that pauses it, until it is below `slow_margin` again."""

    slow_saturation: Fraction = 0.9
    """Share of sequence probabilities outside [.01, .99] that slows the discriminator: rewards have gone
    flat."""

    extra_steps: NonNegativeInt = 1
    """Steps added per policy step while the accuracy is below `low_accuracy`."""

    @model_validator(mode="after")
    def _bands_in_order(self) -> "HealthConfig":
        if not self.low_accuracy < self.slow_accuracy <= self.pause_accuracy:
            raise ValueError("health: low_accuracy < slow_accuracy <= pause_accuracy must hold")
        if self.slow_margin > self.pause_margin:
            raise ValueError("health: slow_margin must not exceed pause_margin")
        return self


class BufferConfig(Section):
    """The replay buffer of rollouts that the discriminator learns from."""

    max_bytes: PositiveInt = 256 * 2**20
    """Arrow bytes held; the oldest rows go first."""

    max_age: NonNegativeInt = 8
    """Rows whose policy version lies more than this many versions behind the newest one are evicted."""

    replay_fraction: Annotated[float, Field(ge=0, le=0.25)] = 0.0
    """Share of a discriminator batch drawn from earlier steps. Compare every setting with 0: half replay was
    neutral or harmful in calibration."""

    recency: NonNegativeFloat = 0.0
    """Half-life of a replayed row's weight, in policy versions (0: all ages weigh the same)."""


class RewardConfig(Section):
    """How a score becomes a reward."""

    form: RewardForm = "neg_log_one_minus_d"
    """Reward form. At the sequence level only `neg_log_one_minus_d` kept all modes of the calibration
    language; per token with gamma .25 `logit` and `prob` did too, and `log_d` did not."""

    clip: PositiveFloat = 5.0
    """Rewards are clipped to [-clip, clip]."""


class ScoringConfig(Section):
    """The scoring service."""

    replicas: PositiveInt = 1
    """Serve replicas."""

    cpus: PositiveFloat = 0.5
    """Logical Ray CPUs per replica."""

    threads: PositiveInt | None = None
    """Torch threads per replica (None: the node's cores divided by the replicas)."""

    max_batch_groups: PositiveInt = 32
    """Groups scored together at most."""

    batch_wait_s: NonNegativeFloat = 0.01
    """How long a request waits for company."""

    max_batch_tokens: PositiveInt = 8192
    """Packed tokens in one forward pass."""

    http: bool = False
    """Serve `POST /v1/score` too."""

    http_host: str = "127.0.0.1"
    """Address that HTTP listens on."""

    http_port: PositiveInt = 8000
    """Port that HTTP listens on."""

    http_token: str = "RLGAF_SCORE_TOKEN"
    """Name of the environment variable that holds the bearer token; http without it is an error."""

    timeout_s: PositiveFloat = 120.0
    """Deadline of one scoring request."""


class DiscriminatorConfig(OptimizerConfig):
    """The model that learns to tell demonstrations from rollouts, and its optimizer."""

    model: str = ""
    """Hub name or local folder of any causal LM or encoder (empty: the policy's base model)."""

    body: Literal["auto", "causal", "encoder"] = "auto"
    """Kind of body; `auto` reads it off the model's configuration. Encoders are sequence-level only."""

    trust_remote_code: bool = False
    """Allow model code from the hub to run."""

    level: Level = "sequence"
    """`sequence` judges whole responses; `token` judges every prefix."""

    loss: Literal["bce"] = "bce"
    """Training loss."""

    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.1
    """Target of a demonstration is 1 minus this; rollouts keep target 0."""

    lr: PositiveFloat = 2e-5
    """Peak learning rate. Keep it above the policy's: equal rates and one discriminator step collapse."""

    weight_decay: NonNegativeFloat = 0.1
    """Decoupled weight decay. Keeps an over-fitted discriminator from making the policy copy
    demonstrations."""

    head_gain: PositiveFloat = 10.0
    """The head's output is multiplied by this: AdamW then moves the new head that many times faster than the
    body."""

    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout before the score head, in training only."""

    packing: bool = True
    """Compute a prompt once for all its responses (causal bodies with full attention; others are refused)."""

    pack_length: PositiveInt = 512
    """Rows of a packed batch are filled up to this many tokens (or the longest single prompt plus
    response)."""

    micro_batch_tokens: PositiveInt = 4096
    """Most tokens, padding included, in one forward and backward pass."""

    warmup_max_steps: NonNegativeInt = 100
    """Most discriminator steps before the policy's first."""

    warmup_accuracy: Annotated[float, Field(gt=0.5, le=1)] = 0.9
    """Warm-up ends at this held-out accuracy."""

    warmup_eval_every: PositiveInt = 5
    """Warm-up steps between two held-out evaluations."""

    steps_per_policy_step: Annotated[int, Field(ge=1, le=3)] = 2
    """Discriminator steps per policy step, before the health gate."""

    batch_size: PositiveInt = 64
    """Rollouts in one discriminator step. Demonstrations and rollouts weigh half each, whatever their
    counts."""

    pair_demonstrations: bool = True
    """Take the demonstrations of the very prompts in the batch, which share the prompt's computation (off: as
    many demonstrations as rollouts, drawn from all)."""

    min_demonstrations: PositiveInt = 16
    """With pairing: demonstrations of other prompts are added where the batch's own are fewer than this."""

    heldout_size: PositiveInt = 128
    """Held-out demonstrations (and rollouts) in one evaluation."""

    lora: LoraConfig = LoraConfig()
    """Low-rank adapters on the body."""

    canonical: CanonicalConfig = CanonicalConfig()
    """The one spelling of both sides."""

    health: HealthConfig = HealthConfig()
    """When the discriminator slows, pauses or hurries."""

    buffer: BufferConfig = BufferConfig()
    """Replay of earlier rollouts."""

    reward: RewardConfig = RewardConfig()
    """From score to reward."""

    scoring: ScoringConfig = ScoringConfig()
    """The scoring service."""

    @model_validator(mode="after")
    def _consistent(self) -> "DiscriminatorConfig":
        if self.body == "encoder" and self.level == "token":
            raise ValueError('level = "token" needs a causal body: an encoder has read the future')
        if self.pack_length > self.micro_batch_tokens:
            raise ValueError(
                f"pack_length = {self.pack_length} exceeds micro_batch_tokens = {self.micro_batch_tokens}"
            )
        return self
