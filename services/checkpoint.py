"""Checkpoints: one folder per step, whole or absent.

Invariant: a checkpoint exists once its manifest (sizes and CRC-32 of every file) has its name, and
everything else in it is on disk before that. All parts are written into `.partial-step-N`, then the manifest;
then the folder is renamed to `step-N`. What is pruned is renamed away before it is deleted. A kill or a power
cut at any moment leaves the old set of checkpoints or the new one. The next `begin` clears hidden folders
without a manifest. A folder whose files do not match its manifest is refused by name, and `newest_whole` goes
on to the one before it.
"""

import errno
import json
import re
import shutil
import zlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, NonNegativeInt

from rollout.files import inside, put_in_place, read_record, sync_all, write_whole
from rollout.printable import one_line
from services.code_version import code_version

MANIFEST = "manifest.json"
STATE = "state.json"
CONFIG = "config.toml"
"""The run's configuration when the checkpoint was written, everything resolved."""
FORMAT = 4
SUPERSEDED = ".superseded-"
_NAME = re.compile(r"(?:\.partial-)?step-([0-9]{6,})")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used or written; the message names folder and file."""


class Sealed(BaseModel):
    """What the manifest says of one file."""

    bytes: NonNegativeInt
    crc32: NonNegativeInt


class _Format(BaseModel):
    format: int


class Manifest(_Format):
    """A checkpoint's step, the versions of the code that wrote it (`code_version`), and its files."""

    step: NonNegativeInt
    code: dict[str, str]
    files: dict[str, Sealed]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.bytes for file in self.files.values())


@dataclass(frozen=True)
class Found:
    """A whole checkpoint, and why each newer one was passed over."""

    step: int
    folder: Path
    state: dict[str, Any]
    skipped: list[str]


class Checkpoints:
    """The checkpoints of one run, under `root`."""

    def __init__(self, root: Path, keep: int) -> None:
        self.root = root
        self.keep = keep

    def begin(self, step: int) -> Path:
        """An empty folder to write step `step`'s parts into; what earlier attempts left unfinished is
        removed.

        Raises:
            OSError: it cannot be made, or the disk has no room for a checkpoint as large as the newest.
        """
        self.finish()
        for left in self.leftovers():
            if not left.name.startswith(SUPERSEDED):
                shutil.rmtree(left)
        partial = self._partial(step)
        partial.mkdir(parents=True)
        self._require_room()
        return partial

    def commit(self, step: int, state: dict[str, Any]) -> Path:
        """Seal the folder begun for `step` with `state` (JSON) and the manifest; prune what is older than the
        newest `keep` that look whole."""
        partial = self._partial(step)
        (partial / STATE).write_text(json.dumps(state, indent=1, sort_keys=True))
        seal(partial, step)
        self.finish()
        kept = [each for each, folder in self.folders().items() if looks_whole(folder)][-self.keep :]
        for old, folder in self.folders().items():
            if old < kept[0]:
                self.remove(folder)
        for given_up in self.root.glob(f"{SUPERSEDED}*"):
            self.remove(given_up)
        return self.folder(step)

    def discard(self, step: int) -> None:
        """Give the folder begun for `step` up, and its space back."""
        shutil.rmtree(self._partial(step), ignore_errors=True)

    def supersede(self, step: int) -> list[int]:
        """Put every checkpoint after `step`, which a run has gone on from, out of sight; the next `commit`
        deletes them. Returns their steps."""
        self.finish()
        later = {each: folder for each, folder in self.folders().items() if each > step}
        for folder in later.values():
            put_in_place(folder, self.root / f"{SUPERSEDED}{folder.name}")
        return list(later)

    def remove(self, folder: Path) -> None:
        """Delete a checkpoint; it is out of sight before it is broken."""
        gone = folder.with_name(f".{folder.name}.removed")
        shutil.rmtree(gone, ignore_errors=True)
        folder.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)

    def steps(self) -> list[int]:
        """Steps with a sealed checkpoint, oldest first."""
        return sorted(step for step, folder in self.folders().items() if (folder / MANIFEST).is_file())

    def folder(self, step: int) -> Path:
        """Where step `step`'s checkpoint is, or would be."""
        return self.folders().get(step, self.root / f"step-{step:06d}")

    def newest(self) -> Path | None:
        """Folder of the newest sealed checkpoint, whole or not."""
        steps = self.steps()
        return self.folder(steps[-1]) if steps else None

    def newest_whole(self, step: int | None = None) -> Found | None:
        """The newest checkpoint whose files match its manifest, or that of `step`; None where there is none.

        Raises:
            CheckpointError: none of those there are is whole; says why of each.
        """
        skipped: list[str] = []
        for each in sorted(self.folders(), reverse=True):
            if step in (None, each):
                try:
                    return Found(each, self.folder(each), verify(self.folder(each)), skipped)
                except CheckpointError as error:
                    skipped.append(str(error))
        if skipped:
            raise CheckpointError("; ".join(skipped))
        return None

    def _require_room(self) -> None:
        for step in self.steps()[-1:]:
            with suppress(CheckpointError):
                require_room(self.root, read_manifest(self.folder(step)).size)

    def _partial(self, step: int) -> Path:
        return self.root / f".partial-step-{step:06d}"

    def folders(self) -> dict[int, Path]:
        """Folders by step, oldest first, broken ones too; one that was sealed and not yet renamed is newer
        than the one it replaces."""
        found: dict[int, Path] = {}
        for path in sorted(self.root.glob("*step-*"), reverse=True):  # hidden ones come last and count
            step = step_of(path.name)
            hidden = path.name.startswith(".")
            if step is not None and path.is_dir() and (not hidden or (path / MANIFEST).is_file()):
                found[step] = path
        return dict(sorted(found.items()))

    def leftovers(self) -> list[Path]:
        """What attempts left unfinished, what was not deleted to its end, and what was superseded."""
        taken = self.folders().values()
        return sorted(path for path in self.root.glob(".*step-*") if path not in taken and path.is_dir())

    def finish(self) -> None:
        """Rename what was sealed and, as its process was killed, not renamed any more."""
        for step, folder in self.folders().items():
            if folder == self._partial(step):
                put_in_place(folder, self.root / f"step-{step:06d}")


def require_room(place: Path, size: int) -> None:
    """Raise OSError where the disk has not so many bytes free."""
    if (free := shutil.disk_usage(place).free) < size:
        said = f"{free / 2**20:.0f} MiB free, and a checkpoint takes {size / 2**20:.0f}"
        raise OSError(errno.ENOSPC, said, str(place))


def seal(folder: Path, step: int) -> None:
    """Write the manifest of a folder in which everything else is written; all of it is on disk then."""
    sync_all(folder)
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {str(path.relative_to(folder)): _sealed(path) for path in paths}
    manifest = Manifest(format=FORMAT, step=step, code=code_version(), files=files)
    write_whole(folder / MANIFEST, manifest.model_dump_json(indent=1))


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint of this version's format.

    Raises:
        CheckpointError: there is none, it is damaged, or of another format or step.
    """
    file = folder / MANIFEST
    try:
        if (found := read_record(file, _Format).format) != FORMAT:
            raise CheckpointError(f"{folder} has format {found}; this version reads {FORMAT}")
        manifest = read_record(file, Manifest)
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no {MANIFEST}: it is no finished checkpoint") from None
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{folder}: {MANIFEST} cannot be read: {error}") from None
    if step_of(folder.name) not in (None, manifest.step):
        raise CheckpointError(f"{folder}: {MANIFEST} is that of step {manifest.step}")
    return manifest


def looks_whole(folder: Path) -> bool:
    """Whether all files of a checkpoint are there and as long as they should be; no content is read."""
    try:
        files = read_manifest(folder).files
        return all((folder / name).stat().st_size == said.bytes for name, said in files.items())
    except (CheckpointError, OSError):
        return False


def verify(folder: Path) -> dict[str, Any]:
    """Check every file against the manifest and return the checkpoint's state.

    Raises:
        CheckpointError: a missing, short or altered file, or an unknown format.
    """
    manifest = read_manifest(folder)
    for name, expected in manifest.files.items():
        try:
            path = inside(folder, name)
            if not path.is_file():
                raise CheckpointError(f"{folder}: {one_line(name)} is missing")
            if path.stat().st_size != expected.bytes or _sealed(path) != expected:
                raise CheckpointError(f"{folder}: {one_line(name)} differs from the manifest")
        except (ValueError, OSError) as error:
            raise CheckpointError(f"{folder}: {error}") from None
    if missing := {STATE} - set(manifest.files):
        raise CheckpointError(f"{folder}: {MANIFEST} does not name {', '.join(sorted(missing))}")
    return _state(folder)


def _state(folder: Path) -> dict[str, Any]:
    try:
        state = json.loads((folder / STATE).read_bytes())
    except (ValueError, RecursionError, OSError) as error:
        raise CheckpointError(f"{folder}: {STATE} cannot be read: {error}") from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{folder}: {STATE} is no JSON object")
    return state


def _sealed(path: Path) -> Sealed:
    crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            crc = zlib.crc32(block, crc)
        return Sealed(bytes=file.tell(), crc32=crc)


def step_of(name: str) -> int | None:
    """Step that a checkpoint's folder of this name has; `step-000006.bak` is nobody's."""
    named = _NAME.fullmatch(name)
    return int(named[1]) if named and named[1] == f"{int(named[1]):06d}" else None
