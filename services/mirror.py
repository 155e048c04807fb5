"""A copy of the run's folder in object storage: a run outlives the disk that it was written to.

Protocol: `push` after every checkpoint and at the end; `pull` before a run goes on. Invariant: the manifest
of a checkpoint is the last of its files to arrive, on either side, and the first to go, so a checkpoint that
is listed with its manifest is whole at every moment. The record of the best policy seals its model and
responses in the same way, and arrives before the manifest of a checkpoint made after it.
"""

import threading
from pathlib import Path, PurePosixPath

from pyarrow import fs

from services.checkpoint import MANIFEST, Checkpoints
from services.config import Config, ConfigError
from services.run_folder import BEST_RECORD
from services.waiting import bounded

CHECKPOINTS = "checkpoints"
NOT_COPIED = "ray"
"""Ray Train's own folder; hidden files and folders, which are unfinished, stay behind too."""


class Mirror:
    """The copy of one run's folder, below a URL.

    Args:
        folder: the run's folder; its name is the copy's name.
        url: of the folder that holds run folders, in a scheme that Arrow's file systems know (s3, gs, hdfs,
            file). Options such as S3's `?region=…&endpoint_override=…` belong to it.

    Raises:
        ConfigError: a URL that Arrow does not understand.
    """

    def __init__(self, folder: Path, url: str) -> None:
        try:
            self.remote, base = fs.FileSystem.from_uri(url)
        except (ValueError, OSError) as error:
            raise ConfigError(f'run.mirror = "{url}": {error}') from None
        self.folder = folder
        self.base = f"{base.rstrip('/')}/{folder.name}"
        self._pushed: dict[str, tuple[int, int]] = {}
        self._busy = threading.Lock()

    def push(self) -> int:
        """Copy what is new or has changed, and remove what is gone here; returns bytes copied.

        Raises:
            OSError: the storage failed, or an earlier push has not ended yet.
        """
        if not self._busy.acquire(blocking=False):
            raise OSError("the copy begun earlier is still under way")
        try:
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

    def pull(self) -> None:
        """Copy the run's files here: all but older checkpoints, over whatever has the same name.

        Raises:
            OSError: the storage or the disk failed.
            ValueError: there is no whole checkpoint.
        """
        names = self._listed()
        steps = _steps(names)
        wanted = [
            name for name in names if _checkpoint_of(name) is None or _checkpoint_of(name) == max(steps)
        ]
        for name in sorted(wanted, key=_seals_last):
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            fs.copy_files(
                f"{self.base}/{name}",
                str(path),
                source_filesystem=self.remote,
                destination_filesystem=fs.LocalFileSystem(),
            )

    def newest(self) -> int | None:
        """Step of the copy's newest whole checkpoint. Raises OSError when the storage cannot be read."""
        return max(_steps(self._listed()), default=None)

    def empty(self) -> bool:
        """Whether nothing of this run is there. Raises OSError when the storage cannot be read."""
        return not self._listed()

    def _local(self) -> dict[str, Path]:
        files: dict[str, Path] = {}
        for path in self.folder.rglob("*"):
            name = path.relative_to(self.folder)
            hidden = any(part.startswith(".") for part in name.parts)
            if path.is_file() and not hidden and name.parts[0] != NOT_COPIED:
                files[name.as_posix()] = path
        return files

    def _listed(self) -> list[str]:
        found = self.remote.get_file_info(fs.FileSelector(self.base, allow_not_found=True, recursive=True))
        return [
            str(PurePosixPath(info.path).relative_to(self.base))
            for info in found
            if info.type == fs.FileType.File
        ]

    def _upload(self, path: Path, name: str) -> None:
        target = f"{self.base}/{name}"
        if self.remote.type_name == "local":  # object stores have no folders to be made
            Path(target).parent.mkdir(parents=True, exist_ok=True)
        fs.copy_files(
            str(path),
            target,
            source_filesystem=fs.LocalFileSystem(),
            destination_filesystem=self.remote,
        )

    def _remove(self, names: set[str]) -> None:
        for name in sorted(names, key=_seals_last, reverse=True):
            self.remote.delete_file(f"{self.base}/{name}")
            self._pushed.pop(name, None)


def fetch_newer(config: Config) -> int | None:
    """Bring a run's folder up to its copy where that has the newer checkpoint; returns the copy's step then.

    An attempt without a checkpoint in the folder must have been set aside before.

    Raises:
        ConfigError: a wrong URL, or the storage cannot be read.
    """
    mirror = Mirror(config.folder, config.run.mirror)
    here = Checkpoints(config.folder / CHECKPOINTS, config.run.keep_checkpoints).steps()
    try:
        newest = bounded(config.run.mirror_timeout_s, "listing it", mirror.newest)
        if newest is None or newest <= max(here, default=-1):
            return None
        bounded(config.run.mirror_timeout_s, "fetching it", mirror.pull)
    except OSError as error:
        raise ConfigError(f'run.mirror = "{config.run.mirror}" cannot be read: {error}') from None
    return newest


def refuse_used(config: Config) -> None:
    """Raise ConfigError where a new run would be copied over an earlier one's copy, or cannot be copied."""
    try:
        free = bounded(
            config.run.mirror_timeout_s, "listing it", Mirror(config.folder, config.run.mirror).empty
        )
    except OSError as error:
        raise ConfigError(f'run.mirror = "{config.run.mirror}" cannot be read: {error}') from None
    if not free:
        raise ConfigError(
            f'run.mirror = "{config.run.mirror}" holds a run named {config.run.name} already; nothing was '
            "overwritten. Use --resume to go on with it, or another run.name"
        )


def _checkpoint_of(name: str) -> int | None:
    """Step of the checkpoint that a file belongs to, None for the others."""
    parts = PurePosixPath(name).parts
    if len(parts) < 3 or parts[0] != CHECKPOINTS:
        return None
    step = parts[1].removeprefix("step-")
    return int(step) if step.isdigit() else None


def _steps(names: list[str]) -> list[int]:
    """Steps whose manifest is among the files."""
    steps = [_checkpoint_of(name) for name in names if PurePosixPath(name).name == MANIFEST]
    return [step for step in steps if step is not None]


def _seals_last(name: str) -> tuple[int, str]:
    return 2 if PurePosixPath(name).name == MANIFEST else int(name == BEST_RECORD), name
