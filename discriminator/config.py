"""Configuration of the discriminator: body, training, replay, rewards, health and scoring."""

from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from discriminator.audit_config import AuditConfig
from discriminator.health_config import Fraction, HealthConfig
from discriminator.reward_config import ANCHORED_FORMS, RAW_FORMS, RewardConfig
from learner.config import LoraConfig, OptimizerConfig
from rollout.config import Section
from rollout.credentials import VariableName

Level = Literal["sequence", "token"]
LossName = Literal["bce", "hinge", "least_squares", "bradley_terry", "wasserstein"]

SMOOTHED_LOSSES = ("bce", "least_squares", "bradley_terry")
"""Losses with a target that label smoothing can move."""

SHIFT_FREE_LOSSES = ("bradley_terry", "wasserstein")
"""Losses that do not change when a constant is added to all scores, so that a score of zero means nothing."""

BOUNDED_LOSSES = ("hinge", "least_squares")
"""Losses that pull the scores to -1 and 1, or not beyond, so that sigmoid(score) is no probability."""


class CanonicalConfig(Section):
    """The one spelling in which demonstrations and rollouts are judged, the likelihood of human answers is
    measured, and `sft` learns."""

    unicode: Literal["nfc", "off"] = "nfc"
    """Unicode normalisation of responses. `off` lets a decomposed accent tell the sides apart."""

    whitespace: Literal["collapse", "outer", "off"] = "collapse"
    """`outer` strips both ends and makes every line end a newline. `collapse` also turns each run of blanks
    into one space, drops blanks beside newlines and keeps at most one empty line; use `outer` where
    indentation means something (code)."""

    max_prompt_tokens: PositiveInt | None = None
    """Discriminator tokens of a prompt that are read, counted from its end (none: what the context
    leaves)."""

    max_response_tokens: PositiveInt | None = None
    """Discriminator tokens of a response that are read; a longer one is judged as cut, on either side (none:
    half of the body's context)."""


class BufferConfig(Section):
    """The replay buffer of rollouts that the discriminator learns from."""

    max_bytes: PositiveInt = 256 * 2**20
    """Arrow bytes held; the oldest rows go first."""

    max_age: NonNegativeInt = 8
    """Rows whose policy version lies more than this many versions behind the newest one are evicted."""

    replay_fraction: Annotated[float, Field(ge=0, le=0.25)] = 0.0
    """Share of a discriminator turn's rollouts drawn from earlier steps; a turn of several steps passes over
    its rollouts again. Compare every setting with 0: half replay was neutral or harmful in calibration."""

    recency: NonNegativeFloat = 0.0
    """Half-life of a replayed row's weight, in policy versions (0: all ages weigh the same)."""


class ScoringConfig(Section):
    """The scoring service."""

    replicas: PositiveInt = 1
    """Serve replicas."""

    cpus: PositiveFloat = 0.5
    """Logical Ray CPUs per replica."""

    threads: PositiveInt | None = None
    """Torch threads per replica (none: the node's cores divided by the replicas)."""

    max_batch_groups: PositiveInt = 32
    """Groups scored together at most."""

    batch_wait_s: NonNegativeFloat = 0.01
    """How long a request waits for company."""

    max_batch_tokens: PositiveInt = 8192
    """Packed tokens in one forward pass."""

    http: bool = False
    """Serve `POST /v1/score` too, in a process of the head node."""

    http_host: str = "127.0.0.1"
    """Address that HTTP listens on."""

    http_port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """Port that HTTP listens on (0: a free one, which the console names)."""

    http_token: VariableName = "RLGAF_SCORE_TOKEN"
    """Name of the environment variable that holds the bearer token; http without it is an error."""

    timeout_s: PositiveFloat = 120.0
    """Deadline of one scoring request of up to `max_batch_groups` groups."""


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

    loss: LossName = "bce"
    """Training loss. `bradley_terry` compares each demonstration with the rollouts of its prompt (of the
    whole step where there are none); it and `wasserstein` leave the zero of the scores open and read all of a
    step's scores in a first pass."""

    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.1
    """Share of a demonstration's target given to the other side; rollouts keep theirs. For `bradley_terry`
    the share of comparisons taken for the wrong way round. Left out, it is 0 for every loss but `bce` and
    `least_squares`."""

    gradient_penalty: NonNegativeFloat = 0.0
    """Coefficient of R1: half of it times the mean squared gradient of a demonstration's score in its token
    embeddings. About twice the arithmetic, and attention without the fused kernels."""

    spectral_norm: PositiveFloat | None = None
    """Bound on the spectral norm of the score head, its gain included (none: no bound)."""

    score_centring: NonNegativeFloat = 0.0
    """Coefficient of the squared mean score of a step (both sides weigh half); costs a first pass."""

    length_matched: bool = False
    """Weigh responses so that both sides of a step have the same distribution of lengths: length then tells
    nothing, and is not learned either."""

    length_bins: Annotated[int, Field(ge=2)] = 8
    """Quantile bins of length that `length_matched` balances."""

    perturbed_fraction: Fraction = 0.0
    """Demonstrations with shuffled, dropped or cut words added to the rollouts' side, as a share of the
    step's rollouts."""

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

    token_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Chance of a response token to be hidden (its embedding set to zero), on both sides and in training
    only: a judge that reads answers with holes cannot know few demonstrations by heart (word dropout, Iyyer
    et al. 2015; the same distortion of both sides, Karras et al. 2020, arXiv 2006.06676)."""

    packing: bool = True
    """Compute a prompt once for all its responses. As `learner.packing`; encoders never share a prompt."""

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

    warmup_patience: PositiveInt | None = None
    """Evaluations without a better held-out accuracy that end the warm-up; the weights of its best one are
    then restored, whatever ended it (none: only accuracy and steps end it)."""

    frozen: bool = False
    """Train in the warm-up alone: afterwards the weights, and so the rewards, stay as they are. Turns still
    count and still report the held-out accuracy."""

    steps_per_policy_step: Annotated[int, Field(ge=1, le=3)] = 2
    """Discriminator steps per policy step, before the health gate."""

    batch_size: PositiveInt = 64
    """Rollouts in one discriminator step. Demonstrations and rollouts weigh half each, whatever their
    counts."""

    pair_demonstrations: bool = True
    """Take the demonstrations of the very prompts in the batch, which share the prompt's computation (off: as
    many demonstrations as rollouts, drawn from all)."""

    min_demonstrations: PositiveInt = 16
    """With pairing: demonstrations of other prompts are added where the batch's own are fewer than this. With
    `bradley_terry` each of these is compared with all of the step's rollouts, whatever their prompts; 1 keeps
    that loss within prompts, as in `gad` and `rlhf`."""

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

    audit: AuditConfig = AuditConfig()
    """Which cheap cues are looked for, and when a run is refused for one."""

    @model_validator(mode="before")
    @classmethod
    def _smoothing_where_there_are_targets(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("loss", "bce") not in ("bce", "least_squares"):
            return {"label_smoothing": 0.0} | given
        return given

    @model_validator(mode="before")
    @classmethod
    def _clip_where_there_is_a_zero(cls, given: Any) -> Any:
        if not isinstance(given, dict) or given.get("loss") not in SHIFT_FREE_LOSSES:
            return given
        reward = given.get("reward")
        if isinstance(reward, RewardConfig):
            reward = reward.model_dump(exclude_unset=True)
        if isinstance(reward, dict) and reward.get("form") in RAW_FORMS:
            return given | {"reward": {"clip": None} | reward}
        return given

    @model_validator(mode="after")
    def _objective_makes_sense(self) -> "DiscriminatorConfig":
        if self.label_smoothing and self.loss not in SMOOTHED_LOSSES:
            raise ValueError(
                f'label_smoothing = {self.label_smoothing:g} has no meaning with loss = "{self.loss}", which '
                f"has no targets; set it to 0 or use one of {', '.join(SMOOTHED_LOSSES)}"
            )
        if self.loss == "wasserstein" and not self.gradient_penalty and self.spectral_norm is None:
            raise ValueError(
                'loss = "wasserstein" grows without bound unless the scores are held: set gradient_penalty '
                "or spectral_norm"
            )
        if self.gradient_penalty and self.zero_stage == 3:
            raise ValueError(
                "gradient_penalty differentiates twice through the body, and ZeRO-3 has given the weights "
                "back by the second time; use zero_stage 1 or 2"
            )
        if self.gradient_penalty and self.gradient_checkpointing:
            raise ValueError(
                "gradient_penalty needs the activations that gradient_checkpointing drops, twice; switch one "
                "of them off"
            )
        form = self.reward.form
        if form == "bradley_terry" and self.loss != "bradley_terry":
            raise ValueError(
                f'reward.form = "bradley_terry" is the score of a discriminator trained with loss = '
                f'"bradley_terry", not "{self.loss}"; for that one\'s score use "logit"'
            )
        if self.loss == "bradley_terry" and self.length_matched:
            raise ValueError(
                'loss = "bradley_terry" weighs the answers to a prompt against each other, so that '
                "length_matched cannot give both sides one distribution of lengths; use another loss"
            )
        if self.loss in BOUNDED_LOSSES and form in ANCHORED_FORMS:
            raise ValueError(
                f'loss = "{self.loss}" drives the scores to -1 and 1, where sigmoid(score) is no '
                f'probability: with reward.form = "{form}" a rejected answer would still earn a good part of '
                'what a perfect one does; set reward.form to "logit" or "relativistic"'
            )
        if self.loss in SHIFT_FREE_LOSSES and form in ANCHORED_FORMS and not self.score_centring:
            raise ValueError(
                f'loss = "{self.loss}" leaves the zero of the scores open, and reward.form = "{form}" bends '
                'there; set score_centring, or reward.form to "logit", "relativistic"'
                + (' or "bradley_terry"' if self.loss == "bradley_terry" else "")
            )
        return self

    @model_validator(mode="after")
    def _consistent(self) -> "DiscriminatorConfig":
        if self.body == "encoder" and self.level == "token":
            raise ValueError('level = "token" needs a causal body: an encoder has read the future')
        if self.pack_length > self.micro_batch_tokens:
            raise ValueError(
                f"pack_length = {self.pack_length} exceeds micro_batch_tokens = {self.micro_batch_tokens}"
            )
        if self.frozen and self.warmup_max_steps == 0:
            raise ValueError("frozen = true with warmup_max_steps = 0 would reward by an untrained head")
        if self.frozen and self.health.pause_policy:
            raise ValueError(
                "health.pause_policy follows the race of two sides, and with frozen = true there is none; "
                "drop one"
            )
        return self
