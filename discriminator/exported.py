"""A trained discriminator as a folder, for a scoring service that outlives its run.

The folder is whole or absent. It holds the weights by plain name (adapters merged) and how to read them; the
body's architecture and tokenizer come from the model the run started from, which must be within reach. No
path of the machine it was written on is in it.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from discriminator.config import DiscriminatorConfig
from rollout.config import without_places
from rollout.files import readable

if TYPE_CHECKING:
    from torch import Tensor

    from discriminator.trainer import Published

WEIGHTS = "weights.safetensors"
DESCRIPTION = "discriminator.json"


@dataclass(frozen=True)
class Exported:
    """What the folder says beside the weights."""

    version: int
    checksum: str
    model_dtype: str
    config: DiscriminatorConfig
    model: str = ""
    """Hub name of the body; empty where it was a folder, of which only the run's own config.toml knows."""


def write_exported(
    folder: Path, published: "Published", config: DiscriminatorConfig, model: str, model_dtype: str
) -> None:
    """Write the folder, in place of an earlier one."""
    from safetensors.torch import save_file

    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file(published.state, partial / WEIGHTS)
    description = {
        "version": published.version,
        "checksum": published.checksum,
        "model": model,
        "model_dtype": model_dtype,
        "config": config.model_dump(mode="json"),
    }
    (partial / DESCRIPTION).write_text(json.dumps(without_places(description), indent=1))
    readable(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def read_exported(folder: Path) -> Exported:
    """Raises FileNotFoundError when the folder holds no discriminator."""
    if not (folder / DESCRIPTION).is_file():
        raise FileNotFoundError(f"{folder} holds no {DESCRIPTION}: a run writes it when it ends")
    raw = json.loads((folder / DESCRIPTION).read_text())
    return Exported(**raw | {"config": DiscriminatorConfig.model_validate(raw["config"])})


def exported_state(folder: Path) -> "dict[str, Tensor]":
    """The weights by plain name, on the CPU."""
    from safetensors.torch import load_file

    return load_file(folder / WEIGHTS)
