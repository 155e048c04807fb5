"""What a run is made of, by its method: processes, loop and watch."""

from collections.abc import Callable
from typing import Any

from rollout.data import DataSplits
from rollout.templates import Renderer
from services.config import Config
from services.controller import Controller
from services.plan import ResourcePlan
from services.supervised.controller import SupervisedController
from services.supervised.system import SupervisedSystem, SupervisedWatch
from services.system import System
from services.watching.watch import Watch

Parts = tuple[System | SupervisedSystem, Controller | SupervisedController, Watch]


def parts(
    config: Config,
    plan: ResourcePlan,
    splits: DataSplits,
    renderer: Renderer,
    start: int,
    observe: Callable[[int, dict[str, Any]], None],
    phase: Callable[[str], None],
) -> Parts:
    """Of a run that begins, or goes on, at step `start`. `observe` takes each step's metrics, `phase` what is
    being waited for."""
    if config.run.method == "sft":
        trained = SupervisedSystem(config, plan, splits, renderer, start)
        return (
            trained,
            SupervisedController(config, trained, observe, phase),
            SupervisedWatch(config, trained),
        )
    system = System(config, plan, splits, renderer, start)
    return system, Controller(config, system, observe, phase), Watch(config, system)
