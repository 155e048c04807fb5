"""Checkpoints: one folder per step, whole or absent.

Invariant: a folder `step-N` exists only if everything in it was written before. All parts are written into
`.partial-step-N`, then the manifest (sizes and CRC-32 of every file), then the folder is renamed; what is
pruned is renamed away before it is deleted. A crash at any moment leaves either the old set of checkpoints or
the new one, and hidden folders that the next `begin` clears. A folder whose files do not match its manifest
is refused by name.
"""

import json
import os
import shutil
import zlib
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
FORMAT = 4


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used; the message names folder and file."""


class Checkpoints:
    """The checkpoints of one run, under `root`."""

    def __init__(self, root: Path, keep: int) -> None:
        self.root = root
        self.keep = keep

    def begin(self, step: int) -> Path:
        """An empty folder to write step `step`'s parts into; what earlier attempts left unfinished is
        removed.
        """
        for left in (*self.root.glob(".partial-step-*"), *self.root.glob(".removed-step-*")):
            shutil.rmtree(left)
        partial = self.root / f".partial-step-{step:06d}"
        partial.mkdir(parents=True)
        return partial

    def commit(self, step: int, state: dict[str, Any]) -> Path:
        """Seal the folder begun for `step` with `state` (JSON) and the manifest; prune older checkpoints."""
        partial = self.root / f".partial-step-{step:06d}"
        final = self.root / f"step-{step:06d}"
        (partial / "state.json").write_text(json.dumps(state, indent=1, sort_keys=True))
        files = {
            str(path.relative_to(partial)): {"bytes": path.stat().st_size, "crc32": _crc32(path)}
            for path in sorted(partial.rglob("*"))
            if path.is_file()
        }
        manifest = {"format": FORMAT, "step": step, "files": files}
        with (partial / MANIFEST).open("w") as file:
            json.dump(manifest, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        if final.exists():
            self._remove(step)
        partial.rename(final)
        for old in self.steps()[: -self.keep]:
            self._remove(old)
        return final

    def _remove(self, step: int) -> None:
        gone = (self.root / f"step-{step:06d}").rename(self.root / f".removed-step-{step:06d}")
        shutil.rmtree(gone)

    def steps(self) -> list[int]:
        """Steps with a sealed checkpoint, oldest first."""
        return sorted(
            int(path.name.removeprefix("step-"))
            for path in self.root.glob("step-*")
            if (path / MANIFEST).exists()
        )

    def newest(self) -> Path | None:
        """Folder of the newest sealed checkpoint."""
        steps = self.steps()
        return self.root / f"step-{steps[-1]:06d}" if steps else None


def verify(folder: Path) -> dict[str, Any]:
    """Check every file against the manifest and return the checkpoint's state.

    Raises:
        CheckpointError: a missing, short or altered file, or an unknown format.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no {MANIFEST}: it is no finished checkpoint") from None
    except ValueError as error:
        raise CheckpointError(f"{folder}: {MANIFEST} is damaged ({error}); use an older checkpoint") from None
    if manifest["format"] != FORMAT:
        raise CheckpointError(f"{folder} has format {manifest['format']}; this version reads {FORMAT}")
    for name, expected in manifest["files"].items():
        path = folder / name
        if not path.exists():
            raise CheckpointError(f"{folder}: {name} is missing; use an older checkpoint")
        if path.stat().st_size != expected["bytes"] or _crc32(path) != expected["crc32"]:
            raise CheckpointError(f"{folder}: {name} differs from the manifest; use an older checkpoint")
    return json.loads((folder / "state.json").read_text())


def _crc32(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            crc = zlib.crc32(block, crc)
    return crc
