"""What a running job shows: one live panel on a terminal, plain lines everywhere else."""

import time
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from rollout.printable import printable

SHOWN = (
    ("reward", "reward/mean"),
    ("D acc", "discriminator/accuracy_heldout"),
    ("KL", "policy/kl"),
    ("entropy", "policy/entropy"),
    ("length", "response/length_mean"),
    ("C2ST", "evaluation/c2st"),
)
"""Label and metric of the numbers on a line; those a step does not have are left out (in the panel: kept)."""


def step_line(step: int, steps: int, row: Mapping[str, Any], seconds: float, left: float | None) -> str:
    """One line for one step, e.g. "step 12/100  reward 0.31  KL 0.02  7.1 s/step  left 10:24"."""
    numbers = [f"{label} {row[key]:.3g}" for label, key in SHOWN if row.get(key) is not None]
    tail = (
        [f"{seconds:.1f} s/step", f"left {clock_time(left)}"]
        if left is not None
        else [f"{seconds:.1f} s/step"]
    )
    return "  ".join([f"step {step}/{steps}", *numbers, *tail])


def clock_time(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    whole = max(0, round(seconds))
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Display:
    """Shows a run.

    with Display(steps=100, start=0) as display:
        display.phase("warm-up")        # what is being waited for now
        display.training()              # start-up is over
        display.step(1, row)            # after each step, with the row of metrics
        display.note("evaluating")      # a line that stays

    On a terminal one panel is redrawn; otherwise phases are silent after the first step and each step is a
    line. The time left is the mean of the last 20 steps (evaluations included) times the steps to go.
    """

    def __init__(
        self,
        steps: int,
        start: int = 0,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._steps = steps
        self._step = start
        self._console = console or Console()
        self._clock = clock
        self._marks = [clock()]
        self._phase = "starting"
        self._training = False
        self._numbers: dict[str, float] = {}
        self._live = Live(
            console=self._console, refresh_per_second=4, get_renderable=self._panel, transient=True
        )
        self._rich = self._console.is_terminal

    def __enter__(self) -> "Display":
        self._marks = [self._clock()]
        if self._rich:
            self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._rich:
            self._live.stop()

    def phase(self, name: str) -> None:
        """Say what the run waits for now: in the panel, and without a terminal only before training."""
        changed, self._phase = name != self._phase, name
        if not self._rich and changed and not self._training:
            self.note(name)

    def training(self) -> None:
        """Training begins: steps and the time left are counted from now."""
        self._training = True
        self._marks = [self._clock()]

    def step(self, step: int, row: Mapping[str, Any]) -> None:
        """Show a finished step."""
        self._step = step
        self._marks = [*self._marks, self._clock()][-21:]
        self._numbers.update({key: row[key] for _, key in SHOWN if row.get(key) is not None})
        if not self._rich:
            line = step_line(step, self._steps, row, self._marks[-1] - self._marks[-2], self.left())
            self._console.print(Text(line), soft_wrap=True)

    def note(self, message: str) -> None:
        """Print a line that stays above the panel (alarms, evaluations, checkpoints)."""
        self._console.print(Text(printable(message)), soft_wrap=True)

    def left(self) -> float | None:
        """Seconds until the last step, or None before the first one is done."""
        if len(self._marks) < 2:
            return None
        return (self._marks[-1] - self._marks[0]) / (len(self._marks) - 1) * (self._steps - self._step)

    def _panel(self) -> Panel:
        numbers = Table.grid(padding=(0, 2))
        numbers.add_row(*(Text(label, style="dim") for label, key in SHOWN if key in self._numbers))
        numbers.add_row(*(Text(f"{self._numbers[key]:.3g}") for _, key in SHOWN if key in self._numbers))
        bar = Table.grid(expand=True)  # as a row it ends with a line break; a bar alone does not
        bar.add_row(ProgressBar(total=max(self._steps, 1), completed=self._step))
        left = self.left()
        head = f"step {self._step}/{self._steps}   {self._phase}" + (
            "" if left is None else f"   left {clock_time(left)}"
        )
        return Panel(
            Group(Text(head), bar, numbers), title="rlgaf", expand=False, width=min(100, self._console.width)
        )
