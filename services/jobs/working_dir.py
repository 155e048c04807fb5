"""What a working directory takes to a cluster, and which files of a run it leaves behind.

Ray packs the folder without `.git`, virtual environments and whatever `.gitignore` and `.rayignore` name,
and unpacks it on each node into a temporary copy, which is the job's current directory and is deleted with
it. So a run that reads a file must carry it, or name one by an absolute path that exists on the nodes; and
what a run writes must not lie there.
"""

import os.path
from dataclasses import dataclass
from pathlib import Path

from services.config import Config, ConfigError


@dataclass(frozen=True)
class Carried:
    """The files that are sent, as absolute paths, and their size."""

    root: Path
    files: frozenset[Path]
    bytes: int

    def holds(self, path: Path) -> bool:
        """Whether the file, or something in the folder, is sent."""
        return path in self.files or any(path in file.parents for file in self.files)


def carried(root: Path) -> Carried:
    """The files of `root` that Ray sends.

    Raises:
        ConfigError: no such folder, or too large for Ray.
    """
    from ray._private.ray_constants import get_runtime_env_default_excludes
    from ray._private.runtime_env.packaging import GCS_STORAGE_MAX_SIZE, _dir_travel, _get_excludes

    root = root.absolute()
    if not root.is_dir():
        raise ConfigError(f"--working-dir {root}: no such folder")
    files: set[Path] = set()

    def seen(path: Path) -> None:
        if path.is_file():
            files.add(path)

    _dir_travel(root, [_get_excludes(root, get_runtime_env_default_excludes())], seen, include_gitignore=True)
    size = sum(file.stat().st_size for file in files)
    if size >= GCS_STORAGE_MAX_SIZE:
        largest = sorted(files, key=lambda file: -file.stat().st_size)[:3]
        raise ConfigError(
            f"--working-dir {root} holds {size / 2**20:.0f} MiB and Ray takes less than "
            f"{GCS_STORAGE_MAX_SIZE / 2**20:.0f}; name large files in .rayignore and put them where the "
            f"nodes can read them. The largest: {', '.join(str(f.relative_to(root)) for f in largest)}"
        )
    return Carried(root, frozenset(files), size)


def packed(root: Path, scratch: Path) -> Path:
    """A zip file in `scratch` of what Ray sends of `root`.

    Ray hashes a folder twice, for the job and for the upload; a file that grows in between, as the output of
    this very process redirected into the folder, would leave the job without its package.
    """
    from ray._private.ray_constants import get_runtime_env_default_excludes
    from ray._private.runtime_env.packaging import create_package

    file = scratch / "working_dir.zip"
    create_package(str(root), file, include_gitignore=True, excludes=get_runtime_env_default_excludes())
    return file


def check_paths(config: Config, sent: Carried | None) -> list[str]:
    """Notes about paths that only the cluster can check.

    Args:
        sent: the working directory, or None where nothing is sent.

    Raises:
        ConfigError: a path of the configuration that cannot work there, one a line.
    """
    problems, notes = [], []
    for field, name, folder_or_hub in _paths(config):
        if not name:
            continue
        if Path(name).expanduser().is_absolute() or name.startswith("~"):
            notes.append(f"{field} = {name} must exist on the cluster's nodes")
        elif sent is None:
            if not folder_or_hub:
                problems.append(
                    f"{field} = {name} is relative and nothing is sent along; use --working-dir, or an "
                    "absolute path on the nodes"
                )
        elif (problem := _problem(field, name, sent, must_exist=not folder_or_hub)) is not None:
            problems.append(problem)
    if not Path(config.run.output).expanduser().is_absolute():
        problems.append(
            f"run.output = {config.run.output} is relative: the job's directory is deleted with the job, "
            "and checkpoints would go with it; give an absolute path on a disk that stays and that all "
            "nodes share"
        )
    if problems:
        raise ConfigError("\n".join(problems))
    return notes


def _problem(field: str, name: str, sent: Carried, *, must_exist: bool) -> str | None:
    path = Path(name)
    inside = Path(os.path.normpath(sent.root / path))
    if not inside.is_relative_to(sent.root):
        return f"{field} = {name} leaves the working directory {sent.root}; use an absolute path instead"
    if sent.holds(inside):
        return None
    if inside.exists():
        return (
            f"{field} = {name} is in {sent.root} but is not sent: .gitignore, .rayignore or Ray's own "
            "rules leave it out. Put it elsewhere in the folder, or on a disk of the nodes and use its "
            "absolute path"
        )
    if must_exist or path.exists():
        return f"{field} = {name} is not in the working directory {sent.root}, which is where the job looks"
    return None  # a hub name


def _paths(config: Config) -> list[tuple[str, str, bool]]:
    """Field, value, and whether the value may be a hub name."""
    measures = config.evaluation.extra_measures
    source, colon, _ = measures.rpartition(":")
    return [
        ("data.demonstrations", config.data.demonstrations, False),
        ("data.prompts", config.data.prompts, False),
        ("data.preferences", config.data.preferences, False),
        ("evaluation.extra_measures", source if colon and source.endswith(".py") else "", False),
        ("policy.model", config.policy.model, True),
        ("discriminator.model", config.discriminator.model, True),
        ("evaluation.embedding_model", config.evaluation.embedding_model, True),
    ]
