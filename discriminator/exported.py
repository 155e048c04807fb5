"""A trained discriminator as a folder, for a scoring service that outlives its run.

The folder is whole or absent. It holds the weights by plain name (adapters merged) and how to read them; the
body's architecture and tokenizer come from the model the run started from, which must be within reach. No
path of the machine it was written on is in it.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from discriminator.config import DiscriminatorConfig
from rollout.config import without_places
from rollout.files import read_record, readable, whole_folder

if TYPE_CHECKING:
    from torch import Tensor

    from discriminator.trainer import Published

WEIGHTS = "weights.safetensors"
DESCRIPTION = "discriminator.json"


class Exported(BaseModel):
    """What the folder says beside the weights."""

    model_config = ConfigDict(protected_namespaces=())

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

    description = Exported(
        version=published.version,
        checksum=published.checksum,
        model=model,
        model_dtype=model_dtype,
        config=config,
    )
    with whole_folder(folder) as partial:
        partial.mkdir()
        save_file(published.state, partial / WEIGHTS)
        told = without_places(description.model_dump(mode="json"))
        (partial / DESCRIPTION).write_text(json.dumps(told, indent=1))
        readable(partial)


def read_exported(folder: Path) -> Exported:
    """Raises FileNotFoundError when the folder holds no discriminator, ValueError when what it says of it is
    damaged."""
    if not (folder / DESCRIPTION).is_file():
        raise FileNotFoundError(f"{folder} holds no {DESCRIPTION}: a run writes it when it ends")
    return read_record(folder / DESCRIPTION, Exported)


def exported_state(folder: Path) -> "dict[str, Tensor]":
    """The weights by plain name, on the CPU."""
    from safetensors.torch import load_file

    return load_file(folder / WEIGHTS)
