"""Copy a finished run's model out of its folder."""

import shutil
import tomllib
from pathlib import Path

from rollout.config import without_places
from rollout.files import readable, whole_folder
from services.config import ConfigError
from services.config_text import tables_to_toml

EXPORTED_CONFIG = "rlgaf.toml"
"""The run's configuration in an exported model's folder."""


def export_model(run: Path, out: Path, which: str) -> Path:
    """Copy `run`/`which` (best or last), and the run's configuration as `rlgaf.toml`, to `out`, a folder that
    must not exist yet; returns `out`. Fields that name a place on this machine are left out.

    Raises:
        ConfigError: no such run or model, or `out` exists.
    """
    if which not in ("best", "last"):
        raise ConfigError(f"--which is {which!r}; it can be best or last")
    model = run / which
    if not (model / "config.json").exists():
        there = [name for name in ("best", "last") if (run / name / "config.json").exists()]
        raise ConfigError(f"{model} holds no model" + (f"; {run} has: {', '.join(there)}" if there else ""))
    if out.exists():
        raise ConfigError(f"{out} exists already; nothing was overwritten")
    said = without_places(tomllib.loads((run / "config.toml").read_text()))
    with whole_folder(out) as partial:
        shutil.copytree(model, partial)
        (partial / EXPORTED_CONFIG).write_text(tables_to_toml(said))
        readable(partial)
    return out
