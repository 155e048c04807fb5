"""A small in-memory system for tests of the controller's loop.

It stands in for the processes, not for the controller: it samples with the weights it holds, stamps what it
made with their versions, refuses prompts for weights it does not have yet, and writes down what happened
when.
"""

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa

from rollout.data import prompt_id
from rollout.prompts import PromptSource
from rollout.trajectory import trajectories, trajectory_id
from services.config import Config, load
from services.controller import Controller

PROMPTS, SAMPLES = 3, 2
TICK = 0.002

Event = tuple[str, int]


def configuration(**run: Any) -> Config:
    overrides = [f"--run.{name}={str(value).lower()}" for name, value in run.items()]
    return load(
        None,
        [
            "--policy.model=m",
            "--data.demonstrations=d",
            f"--run.prompts_per_step={PROMPTS}",
            f"--sampling.group_size={SAMPLES}",
            *overrides,
        ],
    )


class Machine:
    """Policy weights, discriminator and prompts of a run in one process; every answer takes some ticks."""

    def __init__(self, *, generating: int = 2, learning: int = 4, judging: int = 3) -> None:
        texts = [f"prompt {i}" for i in range(20)]
        table = pa.table({"prompt_id": [prompt_id(t) for t in texts], "prompt_text": texts})
        self.prompts = PromptSource(table, lambda text: list(text.encode()), SAMPLES, seed=1)
        self.ticks = {"generate": generating, "learn": learning, "discriminate": judging}
        self.serving = 0
        self.disc_version = 0
        self.replacements = self.sync_failures = 0
        self.resident = {"rollout": 300.0, "scoring": 200.0}
        self.learned = 0
        self.events: list[Event] = []
        self.scored: list[tuple[int, int]] = []
        self.trained: list[pa.Table] = []
        self.judged: list[int] = []
        self.aged: dict[str, int] = {}
        """Groups that come back that many versions older than they are."""
        self.breaks: int | None = None
        """Step whose generation fails."""
        self.misjudges: int | None = None
        """Step whose discriminator turn fails."""

    async def _busy(self, what: str, step: int) -> None:
        self.events.append((f"{what} begins", step))
        for _ in range(self.ticks[what]):
            await asyncio.sleep(TICK)
        self.events.append((f"{what} ends", step))

    async def generate(self, requests: pa.Table, min_version: int) -> pa.Table:
        step = requests["step"][0].as_py()
        assert self.serving >= min_version, (
            f"step {step} asked for version {min_version}, {self.serving} is served"
        )
        oldest = self.serving
        await self._busy("generate", step)
        if step == self.breaks:
            raise ConnectionError("worker gone")
        rows = []
        for request in requests.to_pylist():
            for sample in range(request["n"]):
                age = self.aged.get(request["group_id"], 0) if sample == 0 else 0
                rows.append(
                    {
                        **{
                            name: request[name]
                            for name in ("group_id", "prompt_id", "step", "prompt_text", "prompt_ids")
                        },
                        "trajectory_id": trajectory_id(request["group_id"], sample),
                        "sample": sample,
                        "response_ids": [7, 8, sample],
                        "response_logprobs": [-1.0, -1.0, -1.0],
                        "response_text": "abc",
                        "token_ends": [1, 2, 3],
                        "finish_reason": "stop",
                        "policy_version": oldest - age,
                        "policy_version_end": self.serving,
                        "worker": 0,
                    }
                )
        return trajectories(rows)

    async def score(self, batch: pa.Table, version: int) -> list[dict[str, Any]]:
        assert version <= self.disc_version, "a version that is not published yet"
        self.scored.append((self.learned, version))
        await asyncio.sleep(TICK)
        scores = np.array([0.1, 0.2, float(version)], dtype=np.float32)
        return [{"scores": scores, "spans": [(0, 1), (1, 2), (2, 3)]} for _ in range(batch.num_rows)]

    async def reward_inputs(self, batch: pa.Table, version: int) -> dict[str, list[float]]:
        return {}

    async def learn(self, scored: pa.Table, step: int, lr_factor: float) -> list[dict[str, float]]:
        assert lr_factor == 1.0
        assert step == self.learned
        self.trained.append(scored)
        await self._busy("learn", step)
        self.learned += 1
        return [{"loss": float(step)}]

    async def sync(self, version: int) -> dict[str, float]:
        assert version == self.learned
        await asyncio.sleep(TICK)
        self.serving = version
        self.events.append(("sync", version))
        return {"wire_s": 0.0}

    async def discriminate(self, batch: pa.Table, step: int) -> dict[str, Any]:
        self.judged.append(step)
        await self._busy("discriminate", step)
        if step == self.misjudges:
            raise ConnectionError("discriminator gone")
        self.disc_version = step + 1
        return {"turn": float(step)}

    def when(self, what: str, step: int) -> int:
        """Position of an event in the order of events."""
        return self.events.index((what, step))


def drive(
    machine: Machine,
    config: Config,
    *,
    state: dict[str, Any] | None = None,
    each: Callable[[Controller], None] | None = None,
) -> tuple[Controller, dict[int, dict[str, Any]]]:
    """Run a controller to its end; returns it and what it observed by step."""
    observed: dict[int, dict[str, Any]] = {}
    controller = Controller(config, machine, observed.__setitem__, lambda phase: None)  # type: ignore[arg-type]
    if state is not None:
        controller.load_state(state)

    async def every_step(step: int) -> None:
        assert step == controller.step
        if each is not None:
            each(controller)

    asyncio.run(controller.run(every_step))
    return controller, observed


def stop_after(step: int) -> Callable[[Controller], None]:
    def each(controller: Controller) -> None:
        controller.stopping = controller.step >= step

    return each
