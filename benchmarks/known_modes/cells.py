"""What a benchmark run is: cells of declared grids, and the tasks (cell, seed) that come of them.

A cell says what differs from `examples/known_modes/known-modes.toml`, in the words of the command line. A
cell with candidates is tuned: every candidate runs once, with a seed of its own, and is judged on the
selection split; the best one's settings join the cell's, and only then its seeds run.
"""

import hashlib
import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from services.config import Config, load
from services.methods import Method

CONFIG = Path("examples/known_modes/known-modes.toml")
"""What every cell starts from; benchmarks are run from the repository root."""
TUNING_SEED = 1000
FORMAT = 1
"""Part of every digest: results of another format are not read."""
COMMON: dict[str, Any] = {"run.checkpoint_every": 0, "discriminator.audit.enabled": False}
"""Settings of all cells. The audit is a grid of its own."""

Settings = Mapping[str, Any]
Kind = Literal["train", "reference", "audit"]


@dataclass(frozen=True)
class Data:
    """Demonstrations of a cell. Those of the selection and test splits never have a planted artefact."""

    source: Literal["expert", "base", "long"] = "expert"
    """Who writes training and held-out demonstrations: the expert, the base distribution itself, or an expert
    whose sentences are 30 % longer (and is judged against the expert).
    """
    seed: int | None = 0
    """Of the sentences; None: the run's, so that seeds differ in their demonstrations too."""
    heldout: int = 512
    train: int = 2048
    """Training demonstrations; `data.max_demonstrations` takes fewer of them."""
    plant: str = ""
    """Artefact planted in training and held-out demonstrations (`benchmarks.known_modes.artefacts`)."""


@dataclass(frozen=True)
class Cell:
    """One line of a table."""

    name: str
    settings: Settings = field(default_factory=dict)
    """By dotted name, over `CONFIG` and the method's preset."""
    method: Method = "rlgaf"
    data: Data = Data()
    candidates: tuple[Settings, ...] = ()
    """Settings to choose among on the selection split."""
    kind: Kind = "train"
    """`reference`: nothing is trained; the rows of the base and of fresh human answers. `audit`: nothing is
    trained; what the shortcut auditor says of the sides as they come.
    """
    base: str = "known-modes"
    """Folder of the assets that holds the base model."""
    guard: bool = True
    """Off: the discriminator reads both sides as they come, without the canonical path."""
    seeds: tuple[int, ...] | None = None
    """None: the grid's, or its first alone where nothing is trained."""


@dataclass(frozen=True)
class Grid:
    """Cells that answer one question."""

    name: str
    question: str
    cells: tuple[Cell, ...]
    seeds: tuple[int, ...] = (0, 1, 2)

    def __post_init__(self) -> None:
        names = [cell.name for cell in self.cells]
        if len(set(names)) < len(names):
            raise ValueError(f"grid {self.name}: two cells have the same name")
        tuned = {len(cell.candidates) for cell in self.cells if cell.candidates}
        if len(tuned) > 1:
            raise ValueError(
                f"grid {self.name}: every method gets the same number of tuning runs, not {tuned}"
            )

    def seeds_of(self, cell: Cell) -> tuple[int, ...]:
        """Seeds that one of its cells runs with."""
        if cell.seeds is not None:
            return cell.seeds
        return self.seeds if cell.kind == "train" else self.seeds[:1]

    def cell(self, name: str) -> Cell:
        """The cell of that name."""
        return next(cell for cell in self.cells if cell.name == name)


@dataclass(frozen=True)
class Task:
    """One run: a cell with a seed, or one of its candidates."""

    grid: str
    cell: Cell
    seed: int
    candidate: int | None = None
    chosen: Settings = field(default_factory=dict)
    """The candidate's settings: this one's, or those that tuning chose."""

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that differs from the example's configuration."""
        return {**COMMON, **self.cell.settings, **self.chosen}

    @property
    def label(self) -> str:
        """For progress lines."""
        which = f"seed {self.seed}" if self.candidate is None else f"candidate {self.candidate}"
        return f"{self.grid} / {self.cell.name} / {which}"

    def file(self, base_facts: Mapping[str, Any]) -> Path:
        """Where the result is kept, relative to the results folder: it names all that the run depends on."""
        name = re.sub(r"[^a-z0-9.]+", "-", self.cell.name.lower()).strip("-")
        which = f"seed{self.seed}" if self.candidate is None else f"candidate{self.candidate}"
        return Path(self.grid) / f"{name}.{self.digest(base_facts)}.{which}.json"

    def digest(self, base_facts: Mapping[str, Any]) -> str:
        """Eight digits over the settings, the data and the base model's training."""
        cell = self.cell
        said = {
            "format": FORMAT,
            "example": tomllib.loads(CONFIG.read_text()),
            "settings": self.settings,
            "method": cell.method,
            # `train` came later than most results: its default does not count.
            "data": {k: v for k, v in vars(cell.data).items() if k != "train" or v != Data.train},
            "kind": cell.kind,
            "guard": cell.guard,
            "base": dict(base_facts),
        }
        return hashlib.blake2b(json.dumps(said, sort_keys=True).encode(), digest_size=4).hexdigest()

    def config(self, base: Path, demonstrations: Path, folder: Path) -> Config:
        """The run's configuration.

        Raises:
            ConfigError: unknown or contradictory settings.
        """
        settings = {
            **self.settings,
            "run.method": self.cell.method,
            "run.seed": self.seed,
            "run.name": "run",
            "run.output": str(folder),
            "policy.model": str(base),
            "data.demonstrations": str(demonstrations),
        }
        return load(CONFIG, [f"--{name}={_toml(value)}" for name, value in settings.items()])


def _toml(value: Any) -> str:
    return "none" if value is None else json.dumps(value)
