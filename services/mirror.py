"""A copy of the run's folder in object storage: a run outlives the disk that it was written to.

Protocol: `push` after every checkpoint and at the end; `pull` before a run goes on. Invariant: the manifest
of a checkpoint is the last of its files to arrive, on either side, and the first to go, so a checkpoint that
is listed with its manifest is whole at every moment. The record of the best policy seals its model and
responses in the same way, and arrives before the manifest of a checkpoint made after it. A copy belongs to
the run that made it, by an identity that both folders hold; another run of its name does not touch it.
"""

import asyncio
import os
import threading
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path, PurePath, PurePosixPath

from pyarrow import fs

from rollout.credentials import redacted
from rollout.files import inside, whole_file, write_whole
from services.checkpoint import MANIFEST, CheckpointError, Checkpoints, step_of
from services.config import Config, ConfigError
from services.run_folder import BEST_RECORD
from services.waiting import bounded

CHECKPOINTS = "checkpoints"
IDENTITY = "run.id"
"""File of the run's folder, and of its copy, that says whose copy it is."""
PROBE = ".write-test"
NOT_COPIED = "ray"
"""Ray Train's own folder; hidden files and folders, which are unfinished, stay behind too."""


class Mirror:
    """The copy of one run's folder, below a URL.

    Args:
        folder: the run's folder; its name is the copy's name.
        url: of the folder that holds run folders, in a scheme that Arrow's file systems know (s3, gs, hdfs,
            file). Options such as S3's `?region=…&endpoint_override=…` belong to it.

    Raises:
        ConfigError: a URL that Arrow does not understand, or of the run's own folder.
    """

    def __init__(self, folder: Path, url: str) -> None:
        try:
            self.remote, base = fs.FileSystem.from_uri(url)
        except (ValueError, OSError) as error:
            raise ConfigError(f'run.mirror = "{url}": {error}') from None
        self.folder = folder
        self.url = url
        self.base = f"{base.rstrip('/')}/{folder.name}"
        if self.remote.type_name == "local":
            here, there = Path(os.path.realpath(folder)), Path(os.path.realpath(self.base))
            if here.is_relative_to(there) or there.is_relative_to(here):
                raise ConfigError(
                    f'run.mirror = "{url}": the copy would lie in the run\'s own folder, {folder}'
                )
        self._pushed: dict[str, tuple[int, int]] = {}
        self._busy = threading.Lock()

    async def pushed(self, timeout_s: float, say: Callable[[str], None]) -> bool:
        """`push` with a deadline; False when it failed, which is said."""
        try:
            await asyncio.wait_for(asyncio.to_thread(self.push), timeout_s)
        except OSError as error:  # TimeoutError is one too
            reason = redacted(str(error)) or f"not done within {timeout_s:g} s"
            say(f"run.mirror: the copy to {self.url} failed: {reason}")
            return False
        return True

    def push(self) -> int:
        """Copy what is new or has changed, and remove what is gone here; returns bytes copied.

        Raises:
            OSError: the storage failed, the copy is another run's, or an earlier push has not ended yet.
        """
        if not self._busy.acquire(blocking=False):
            raise OSError("the copy begun earlier is still under way")
        try:
            self._claim()
            here, there = self._local(), set(self._listed())
            stats = {name: path.stat() for name, path in here.items()}
            stamps = {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}
            new = [name for name in here if name not in there or self._pushed.get(name) != stamps[name]]
            self._remove((there - set(here)) | ({BEST_RECORD} & there & set(new)))
            for name in sorted(new, key=_seals_last):
                self._upload(here[name], name)
                self._pushed[name] = stamps[name]
            return sum(stats[name].st_size for name in new)
        finally:
            self._busy.release()

    def pull(self, step: int, rest: bool = True) -> None:
        """Copy a checkpoint here, with the `rest` of the run's files over whatever has the same name, but for
        other checkpoints.

        Raises:
            OSError: the storage or the disk failed.
            ValueError: a name in the storage leads out of the run's folder.
        """
        checkpoints = Checkpoints(self.folder / CHECKPOINTS, keep=1)
        partial = checkpoints.begin(step)
        for name in sorted(self._listed(), key=_seals_last):
            of, path = _checkpoint_of(name), inside(self.folder, name)
            if of == step:
                path = partial / path.relative_to(checkpoints.root / f"step-{step:06d}")
            elif of is not None or not rest or _stays(path.relative_to(self.folder)):
                continue
            with whole_file(path) as scratch:
                fs.copy_files(
                    f"{self.base}/{name}",
                    str(scratch),
                    source_filesystem=self.remote,
                    destination_filesystem=fs.LocalFileSystem(),
                )
        checkpoints.finish()

    def steps(self) -> list[int]:
        """Steps of the copy's checkpoints, oldest first. Raises OSError when the storage cannot be read."""
        return sorted(_steps(self._listed()))

    def empty(self) -> bool:
        """Whether nothing of this run is there. Raises OSError when the storage cannot be read."""
        return not self._listed()

    def try_writing(self) -> None:
        """Write something and remove it. Raises OSError when the storage takes nothing."""
        target = self._target(PROBE)
        with self.remote.open_output_stream(target) as stream:
            stream.write(b"x")
        self.remote.delete_file(target)

    def _claim(self) -> None:
        """Mark the copy as this run's: another's checkpoints would be removed as what is gone here."""
        own = self.folder / IDENTITY
        if not own.exists():
            write_whole(own, uuid.uuid4().hex)
        if self.remote.get_file_info(f"{self.base}/{IDENTITY}").type == fs.FileType.NotFound:
            self._upload(own, IDENTITY)
        with self.remote.open_input_stream(f"{self.base}/{IDENTITY}") as stream:
            if stream.read() != own.read_bytes():
                raise OSError("another run of this name is copied there; give one of them another run.name")

    def _local(self) -> dict[str, Path]:
        files: dict[str, Path] = {}
        for path in self.folder.rglob("*"):
            name = path.relative_to(self.folder)
            if path.is_file() and not _stays(name):
                files[name.as_posix()] = path
        return files

    def _listed(self) -> list[str]:
        found = self.remote.get_file_info(fs.FileSelector(self.base, allow_not_found=True, recursive=True))
        return [info.path.removeprefix(f"{self.base}/") for info in found if info.type == fs.FileType.File]

    def _upload(self, path: Path, name: str) -> None:
        fs.copy_files(
            str(path),
            self._target(name),
            source_filesystem=fs.LocalFileSystem(),
            destination_filesystem=self.remote,
        )

    def _target(self, name: str) -> str:
        """Where a file is written in the storage."""
        target = f"{self.base}/{name}"
        if self.remote.type_name == "local":  # object stores have no folders to be made
            Path(target).parent.mkdir(parents=True, exist_ok=True)
        return target

    def _remove(self, names: set[str]) -> None:
        for name in sorted(names, key=_seals_last, reverse=True):
            self.remote.delete_file(f"{self.base}/{name}")
            self._pushed.pop(name, None)


def fetch_newer(config: Config, step: int | None = None) -> int | None:
    """Bring a run's folder up to its copy where that has the newer whole checkpoint, or the one of `step`
    that the folder has not; returns the copy's step then.

    An attempt without a checkpoint in the folder must have been set aside before.

    Raises:
        ConfigError: a wrong URL, or the storage cannot be read.
    """
    mirror, limit = Mirror(config.folder, config.run.mirror), config.run.mirror_timeout_s
    here = _whole_step(mirror.folder, None)
    try:
        for there in reversed(bounded(limit, "listing it", mirror.steps)):
            if there <= here if step is None else there != step or _whole_step(mirror.folder, step) == step:
                continue
            rest = step is None or here < 0
            bounded(limit, "fetching it", partial(mirror.pull, there, rest=rest))
            if _whole_step(mirror.folder, there) == there:
                return there
    except (OSError, ValueError) as error:
        raise ConfigError(f'run.mirror = "{config.run.mirror}" cannot be read: {error}') from None
    return None


def _whole_step(folder: Path, step: int | None) -> int:
    """Step of the folder's newest whole checkpoint, or `step` where that one is; -1 where there is none."""
    try:
        found = Checkpoints(folder / CHECKPOINTS, keep=1).newest_whole(step)
    except CheckpointError:
        return -1
    return found.step if found is not None else -1


def check_mirror(config: Config, *, new: bool) -> None:
    """The storage can be written to, and a new run is not copied over an earlier one's copy.

    Raises:
        ConfigError: names what it is.
    """
    mirror, limit = Mirror(config.folder, config.run.mirror), config.run.mirror_timeout_s
    try:
        used = new and not bounded(limit, "listing it", mirror.empty)
        bounded(limit, "writing to it", mirror.try_writing)
    except OSError as error:
        raise ConfigError(f'run.mirror = "{config.run.mirror}" cannot be read or written: {error}') from None
    if used:
        raise ConfigError(
            f'run.mirror = "{config.run.mirror}" holds a run named {config.run.name} already; nothing was '
            "overwritten. Use --resume to go on with it, or another run.name"
        )


def _checkpoint_of(name: str) -> int | None:
    """Step of the checkpoint that a file belongs to, None for the others."""
    parts = PurePosixPath(name).parts
    if len(parts) < 3 or parts[0] != CHECKPOINTS:
        return None
    return step_of(parts[1])


def _steps(names: list[str]) -> list[int]:
    """Steps whose manifest is among the files."""
    steps = [_checkpoint_of(name) for name in names if PurePosixPath(name).name == MANIFEST]
    return [step for step in steps if step is not None]


def _stays(name: PurePath) -> bool:
    """Whether a file of a run's folder belongs to that machine alone."""
    return name.parts[0] == NOT_COPIED or any(part.startswith(".") for part in name.parts)


def _seals_last(name: str) -> tuple[int, str]:
    return 2 if PurePosixPath(name).name == MANIFEST else int(name == BEST_RECORD), name
