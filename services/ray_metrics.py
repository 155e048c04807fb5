"""A run's metrics for Prometheus: the table of `services/metric_names.py`, set from each step's row through
Ray's metrics.

exported = RunMetrics(config)
exported.begin()                                # bounds and start time
exported.step(row, previous)                    # rows as MetricsLog.log returns them
exported.alarms(raised, active)
watching = asyncio.create_task(exported.watch_workers(lambda: system.fleet.actors))
exported.close()                                # before Ray is left

Ray forgets a gauge that was not set again within two of its export intervals (20 s by default), so a thread
of the driver repeats all of them, also while the loop is busy or hangs; they end with the driver. A number
that is not finite is left out, because Ray drops it: the gauge keeps its last finite value, and the alarm
`not_finite` is active. Ray's counters cannot be set to 0: a series begins with its first event, and queries
have to allow for that (rules.yaml).
"""

import asyncio
import math
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

from services.config import Config
from services.metric_names import METRICS, Metric
from services.metrics import Row
from services.watching.alarms import CHECKS, Alarm

PROBE_EVERY_S = 15.0
PROBE_DEADLINE_S = 30.0
REPEAT_EVERY_S = 1.0
"""The shortest export interval that Ray knows."""
BY_NAME = {metric.name: metric for metric in METRICS}


@dataclass(frozen=True)
class Sample:
    """What one metric is told: a gauge's value, a histogram's observation or a counter's increment."""

    metric: Metric
    value: float
    label: str = ""
    """Value of the metric's second label."""


def row_samples(row: Mapping[str, Any], previous: Mapping[str, Any] | None) -> list[Sample]:
    """What a step's row says; `previous` is the row before, from which running totals are counted on."""
    samples = []
    for metric in METRICS:
        for label, key in _keys(metric, row):
            value = row.get(key)
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                continue
            if metric.kind == "counter" and not metric.per_step:
                value = _increase(value, (previous or {}).get(key))
            if metric.kind != "counter" or value > 0:
                samples.append(Sample(metric, value * metric.scale, label))
    return samples


def setting_samples(config: Config) -> list[Sample]:
    """The bounds and wanted numbers that the configuration gives."""
    return [
        Sample(metric, float(reduce(getattr, metric.setting.split("."), config)))  # type: ignore[arg-type]
        for metric in METRICS
        if metric.setting
    ]


def alarm_samples(raised: Sequence[Alarm], active: Collection[str]) -> list[Sample]:
    """New alarms, and for every alarm whether its condition holds."""
    told = [Sample(BY_NAME["rlgaf_alarms_total"], 1.0, alarm.name) for alarm in raised]
    return told + [Sample(BY_NAME["rlgaf_alarm_active"], float(name in active), name) for name in CHECKS]


def _keys(metric: Metric, row: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if metric.key.endswith("/"):
        yield from ((key.removeprefix(metric.key), key) for key in row if key.startswith(metric.key))
    elif metric.key:
        yield "", metric.key
    else:
        yield from metric.series.items()


def _increase(value: float, before: float | None) -> float:
    """By how much a running total grew; a total smaller than before has begun again."""
    return value - before if before is not None and before <= value else value


class RunMetrics:
    """The run's metrics as Ray exports them, all with the label `run`."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._instruments: dict[str, Any] = {}
        self._gauges: dict[tuple[str, str], Sample] = {}
        """Newest sample of every gauge, by name and label."""
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._repeating = threading.Thread(target=self._repeat, name="gauges", daemon=True)

    def begin(self) -> None:
        """Set what does not change (bounds, wanted numbers, start time), and keep all gauges alive."""
        self._tell(setting_samples(self._config))
        self._tell([Sample(BY_NAME["rlgaf_start_timestamp_seconds"], time.time())])
        self._repeating.start()

    def close(self) -> None:
        """Repeat no more. Harmless when repeated, or without `begin`."""
        self._closed.set()
        if self._repeating.is_alive():
            self._repeating.join(timeout=REPEAT_EVERY_S + 1)  # a daemon: it may stay behind

    def step(self, row: Row, previous: Row | None) -> None:
        """Set everything that the step's row has."""
        self._tell(row_samples(row, previous))

    def alarms(self, raised: Sequence[Alarm], active: Collection[str]) -> None:
        """Count new alarms and set which conditions hold."""
        self._tell(alarm_samples(raised, active))

    async def watch_workers(self, workers: Callable[[], Sequence[Any]]) -> None:
        """Ask every rollout worker's engine for its version again and again, and count those that answer."""
        while True:
            answers = await asyncio.gather(*(_answers(worker) for worker in workers()))
            self._tell([Sample(BY_NAME["rlgaf_rollout_workers_healthy"], float(sum(answers)))])
            await asyncio.sleep(PROBE_EVERY_S)

    def _repeat(self) -> None:
        while not self._closed.wait(REPEAT_EVERY_S):
            self._tell([])

    def _tell(self, samples: Sequence[Sample]) -> None:
        """Record new samples, and the newest of every other gauge once more."""
        with self._lock:
            new = {(sample.metric.name, sample.label): sample for sample in samples}
            gauges = {key: sample for key, sample in new.items() if sample.metric.kind == "gauge"}
            self._record([*samples, *(kept for key, kept in self._gauges.items() if key not in gauges)])
            self._gauges |= gauges

    def _record(self, samples: Sequence[Sample]) -> None:
        for sample in samples:
            metric, tags = sample.metric, {"run": self._config.run.name}
            if metric.label:
                tags[metric.label] = sample.label
            instrument = self._instrument(metric)
            if metric.kind == "gauge":
                instrument.set(sample.value, tags)
            elif metric.kind == "counter":
                instrument.inc(sample.value, tags)
            else:
                instrument.observe(sample.value, tags)

    def _instrument(self, metric: Metric) -> Any:
        from ray.util.metrics import Counter, Gauge, Histogram

        if metric.name not in self._instruments:
            labels = ("run", metric.label) if metric.label else ("run",)
            if metric.kind == "histogram":
                made: Any = Histogram(metric.name, metric.what, list(metric.boundaries), labels)
            else:
                made = (Gauge if metric.kind == "gauge" else Counter)(metric.name, metric.what, labels)
            self._instruments[metric.name] = made
        return self._instruments[metric.name]


async def _answers(worker: Any) -> bool:
    """Whether a rollout worker's engine answers within the deadline."""
    from ray.exceptions import RayError

    async def version() -> int:
        return await worker.policy_version.remote()

    try:
        await asyncio.wait_for(version(), PROBE_DEADLINE_S)
    except (TimeoutError, RayError):
        return False
    return True
