"""The Prometheus metrics of a run, one table: docs/deploy.md, the alert rules and the dashboard refer to it.

The driver of a run sets them through Ray (`services/ray_metrics.py`), and the metrics endpoint of its node
exports them with Ray's prefix: `rlgaf_policy_lag_max` is scraped as `ray_rlgaf_policy_lag_max`. Every series
has the label `run` (run.name) beside Ray's own. Ratios lie in 0..1. Gauges vanish with the run's driver.
Counters stay as long as the node: a resumed run has series of its own beside the earlier driver's, so their
sum over `run` is the run's. A counter's series begins with its first event, at that event's amount.

    python -m services.metric_names     # the table of docs/deploy.md
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["gauge", "counter", "histogram"]
PREFIX = "ray_"
"""What Ray puts before each name when it exports it."""

SECONDS = (0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0, 1000.0, 2500.0)


@dataclass(frozen=True)
class Metric:
    """One metric. Exactly one of `key` (of metrics.jsonl), `series` (keys by value of the second label),
    `setting` (dotted path of the configuration) and `live` says where its value comes from. A `key` that ends
    in `/` stands for all keys below it; their rest is the second label's value."""

    name: str
    kind: Kind
    what: str
    """Description; ASCII, or Ray refuses it."""
    key: str = ""
    series: Mapping[str, str] = field(default_factory=dict)
    setting: str = ""
    live: str = ""
    label: str = ""
    """Second label, beside `run`."""
    scale: float = 1.0
    """Factor from the row's unit to this one's."""
    per_step: bool = False
    """Of a counter: the row holds one step's amount, not a running total."""
    boundaries: tuple[float, ...] = ()
    """Upper bounds of a histogram's buckets."""
    when: str = ""
    """Empty when each step sets it, else when it appears."""

    @property
    def exported(self) -> str:
        """The name that Prometheus sees; a histogram's has `_bucket`, `_sum` and `_count` behind it."""
        return PREFIX + self.name

    @property
    def source(self) -> str:
        """Where the value comes from, for readers."""
        keys = [self.key] if self.key else list(self.series.values())
        if keys:
            return ", ".join(f"`{key}`" for key in keys)
        return f"setting `{self.setting}`" if self.setting else self.live


EVALUATED = "with each evaluation"
TURNED = "from the first discriminator turn on"
TRAINED = "with each turn that the health gate lets train"
HAPPENED = "from the first one on"

METRICS: tuple[Metric, ...] = (
    # The pump
    Metric("rlgaf_step", "gauge", "Learner steps done", key="step"),
    Metric("rlgaf_steps_wanted", "gauge", "Learner steps in all", setting="run.steps"),
    Metric("rlgaf_start_timestamp_seconds", "gauge", "Unix time at which this driver began", live="clock"),
    Metric("rlgaf_last_step_timestamp_seconds", "gauge", "Unix time of the last finished step", key="time"),
    Metric(
        "rlgaf_phase_seconds",
        "histogram",
        "Seconds of a step spent in a phase (generate, score, learn, sync, discriminate, evaluate, "
        "checkpoint, mirror, wait for discriminator, warm-up); phases overlap. Its sum is Ray's estimate "
        "from the buckets",
        key="seconds/",
        label="phase",
        boundaries=SECONDS,
    ),
    Metric(
        "rlgaf_phase_spent_seconds_total",
        "counter",
        "Seconds spent in a phase, exactly",
        key="seconds/",
        label="phase",
        per_step=True,
    ),
    # Responses
    Metric(
        "rlgaf_responses_total",
        "counter",
        "Responses by what became of them: submitted, trained, dropped (too old for the lag bound) or failed "
        "(never came back)",
        label="outcome",
        series={
            "submitted": "responses/submitted",
            "trained": "responses/trained",
            "dropped": "responses/dropped",
            "failed": "responses/failed",
        },
    ),
    Metric(
        "rlgaf_responses_in_flight", "gauge", "Responses asked for and not settled", key="responses/in_flight"
    ),
    Metric(
        "rlgaf_tokens_total",
        "counter",
        "Response tokens trained on",
        key="policy/tokens_response",
        per_step=True,
    ),
    Metric(
        "rlgaf_tokens_per_second",
        "gauge",
        "Response tokens of the step by the seconds of their generation (rollout; batches asked for ahead "
        "share the workers) and of the update (learner); tokens of the discriminator's last turn that "
        "trained, prompts too, by the seconds of its updates",
        label="process",
        series={
            "rollout": "rollout/tokens_per_s",
            "learner": "policy/tokens_per_s",
            "discriminator": "discriminator/tokens_per_s",
        },
    ),
    Metric("rlgaf_response_length_tokens", "gauge", "Mean response length", key="response/length_mean"),
    Metric(
        "rlgaf_response_truncated_ratio",
        "gauge",
        "Share of responses cut by the length limit",
        key="response/truncated_rate",
    ),
    # The two clocks
    Metric(
        "rlgaf_policy_lag_max",
        "gauge",
        "Oldest policy version in the step, in versions",
        key="lag/policy_max",
    ),
    Metric(
        "rlgaf_policy_lag_mean", "gauge", "Mean policy lag in the step, in versions", key="lag/policy_mean"
    ),
    Metric("rlgaf_policy_lag_bound", "gauge", "Largest allowed policy lag", setting="run.max_policy_lag"),
    Metric(
        "rlgaf_disc_lag_max",
        "gauge",
        "Oldest discriminator version in the step, in versions",
        key="lag/disc_max",
    ),
    Metric("rlgaf_disc_lag_bound", "gauge", "Largest allowed discriminator lag", setting="run.max_disc_lag"),
    # Policy
    Metric("rlgaf_reward_mean", "gauge", "Mean reward of a response", key="reward/mean"),
    Metric("rlgaf_reward_std", "gauge", "Standard deviation of what responses are paid", key="reward/std"),
    Metric(
        "rlgaf_reward_length_correlation",
        "gauge",
        "Correlation of reward and length",
        key="reward/length_correlation",
    ),
    Metric("rlgaf_policy_loss", "gauge", "Policy loss with its KL and entropy terms", key="policy/loss"),
    Metric("rlgaf_policy_entropy_nats", "gauge", "Entropy per token", key="policy/entropy"),
    Metric(
        "rlgaf_policy_kl_nats",
        "gauge",
        "KL to the reference per token",
        key="policy/kl",
        when="with learner.kl_coef above 0; else there is no reference, and its pass is saved",
    ),
    Metric("rlgaf_policy_grad_norm", "gauge", "Gradient norm before clipping", key="policy/grad_norm"),
    Metric("rlgaf_policy_lr", "gauge", "Learning rate of the policy", key="policy/lr"),
    Metric(
        "rlgaf_logprob_mismatch_nats",
        "gauge",
        "Mean absolute difference of log-probabilities between sampler and learner",
        key="policy/mismatch_mean",
    ),
    Metric(
        "rlgaf_logprob_mismatch_bound_nats",
        "gauge",
        "Difference above which the run raises an alarm",
        setting="rollout.logprob_alarm",
    ),
    # Discriminator
    Metric(
        "rlgaf_discriminator_accuracy_heldout_ratio",
        "gauge",
        "Balanced accuracy on held-out demonstrations against fresh rollouts; near 1 it is saturated",
        key="discriminator/accuracy_heldout",
        when=TURNED,
    ),
    Metric(
        "rlgaf_discriminator_margin_heldout",
        "gauge",
        "Mean score of held-out demonstrations minus that of rollouts",
        key="discriminator/margin_heldout",
        when=TURNED,
    ),
    Metric(
        "rlgaf_discriminator_saturation_heldout_ratio",
        "gauge",
        "Share of held-out scores in the flat part of the loss",
        key="discriminator/saturation_heldout",
        when=TURNED,
    ),
    Metric(
        "rlgaf_discriminator_calibration_error_ratio",
        "gauge",
        "Expected calibration error on held-out data",
        key="discriminator/calibration_heldout",
        when=TURNED,
    ),
    Metric(
        "rlgaf_discriminator_steps",
        "gauge",
        "Optimizer steps that the health gate allowed in the last turn",
        key="discriminator/steps",
        when=TURNED,
    ),
    Metric(
        "rlgaf_discriminator_health",
        "gauge",
        "Health gate: -1 boost, 0 train, 1 slow, 2 paused",
        key="discriminator/health",
        when=TURNED,
    ),
    Metric(
        "rlgaf_discriminator_loss",
        "gauge",
        "Training loss of the last turn",
        key="discriminator/loss",
        when=TRAINED,
    ),
    Metric(
        "rlgaf_replay_buffer_rows",
        "gauge",
        "Responses in the replay buffer",
        key="discriminator/buffer/rows",
        when=TURNED,
    ),
    Metric(
        "rlgaf_replay_buffer_bytes",
        "gauge",
        "Size of the replay buffer",
        key="discriminator/buffer/bytes",
        when=TURNED,
    ),
    # Weight sync and workers
    Metric("rlgaf_sync_seconds", "gauge", "Duration of the last weight sync", key="sync/total_s"),
    Metric(
        "rlgaf_sync_deadline_seconds",
        "gauge",
        "Deadline of one sync",
        setting="rollout.sync_timeout_s",
    ),
    Metric("rlgaf_sync_bytes", "gauge", "Bytes sent to each worker in the last sync", key="sync/bytes"),
    Metric(
        "rlgaf_sync_failures_total",
        "counter",
        "Weight syncs that a worker missed or broke; each was repeated with the worker replaced",
        key="rollout/sync_failures",
        when=HAPPENED,
    ),
    Metric(
        "rlgaf_rollout_replacements_total",
        "counter",
        "Times that rollout workers were replaced: one died, missed a deadline or broke in a sync",
        key="rollout/replacements",
        when=HAPPENED,
    ),
    Metric(
        "rlgaf_rollout_workers_healthy",
        "gauge",
        "Rollout workers whose engine answers; asked every 15 s, also between steps",
        live="asking each worker",
    ),
    Metric("rlgaf_rollout_workers_wanted", "gauge", "Rollout workers of the run", setting="rollout.workers"),
    # Evaluation, alarms, memory
    Metric(
        "rlgaf_evaluation_c2st_ratio",
        "gauge",
        "Accuracy of a fresh classifier that tells human from model; 0.5 means it cannot",
        key="evaluation/c2st",
        when=EVALUATED,
    ),
    Metric(
        "rlgaf_evaluation_nll_nats",
        "gauge",
        "Negative log-likelihood of human answers under the policy, per token",
        key="evaluation/nll",
        when=EVALUATED,
    ),
    Metric(
        "rlgaf_evaluation_coverage_ratio",
        "gauge",
        "Share of human answers with a model answer in their neighbourhood",
        key="evaluation/coverage",
        when=EVALUATED,
    ),
    Metric(
        "rlgaf_evaluation_distinct_2_ratio",
        "gauge",
        "Share of distinct bigrams in the model's answers",
        key="evaluation/distinct_2",
        when=EVALUATED,
    ),
    Metric(
        "rlgaf_monitor_mode_share_ratio",
        "gauge",
        "Effective number of modes, as a share of the humans'",
        key="monitor/mode_share",
        when=EVALUATED,
    ),
    Metric(
        "rlgaf_monitor_repetition_ratio",
        "gauge",
        "Share of tokens inside repeated n-grams",
        key="monitor/repetition",
        when=EVALUATED,
    ),
    Metric(
        "rlgaf_monitor_copy_excess_ratio",
        "gauge",
        "Copied demonstrations above the natural rate, lower end of the interval",
        key="monitor/copy_excess",
        when=EVALUATED,
    ),
    Metric(
        "rlgaf_alarms_total",
        "counter",
        "Alarms raised, by name: mode_collapse, entropy_collapse, discriminator_saturated and the others",
        live="the run's alarms",
        label="alarm",
        when=HAPPENED,
    ),
    Metric(
        "rlgaf_alarm_active",
        "gauge",
        "1 while the alarm's condition holds, else 0; every alarm has its series from the first check on",
        live="the run's alarms",
        label="alarm",
    ),
    Metric(
        "rlgaf_memory_bytes",
        "gauge",
        "Resident memory of the driver (controller), of rank 0 of learner and discriminator, of the largest "
        "rollout worker with its engine's processes, and of the largest scoring replica",
        label="process",
        series={
            "controller": "memory_mib/controller",
            "rollout": "memory_mib/rollout",
            "scoring": "memory_mib/scoring",
            "learner": "policy/memory_mib/rss",
            "discriminator": "discriminator/memory_mib/rss",
        },
        scale=2.0**20,
    ),
)


def markdown() -> str:
    """The table as docs/deploy.md shows it."""
    lines = ["| metric | type | labels | what | from |", "|---|---|---|---|---|"]
    for metric in METRICS:
        labels = f"`run`, `{metric.label}`" if metric.label else "`run`"
        what = f"{metric.what} ({metric.when})" if metric.when else metric.what
        lines.append(f"| `{metric.exported}` | {metric.kind} | {labels} | {what} | {metric.source} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown())
