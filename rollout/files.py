"""Files and folders that are whole or absent, at whatever moment their process or machine goes down.

Invariant: what has its name was written and on disk before it got that name. It is made under a hidden
name beside it, synced and renamed, and the renaming is synced too. What is read back is checked: it may be
damaged, and may come from elsewhere.
"""

import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from rollout.printable import one_line

Record = TypeVar("Record", bound=BaseModel)
Result = TypeVar("Result")


def write_whole(path: Path, content: str | bytes, *, lasting: bool = True) -> Path:
    """Write a file, in place of an earlier one; makes its folder. What is not `lasting` is whole for whoever
    reads it, but may be lost in a power cut."""
    with whole_file(path, lasting=lasting) as scratch:
        scratch.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@contextmanager
def whole_file(path: Path, *, lasting: bool = True) -> Iterator[Path]:
    """A path to write a file to, which takes the place of `path` when the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        yield scratch
        if lasting:
            sync(scratch)
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
    if lasting:
        sync(path.parent)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A path to make a folder at, which takes the place of `folder` when the block ends well."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        yield partial
        sync_all(partial)
        put_in_place(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def readable(folder: Path) -> None:
    """Give the files below a folder the folder's own permissions: safetensors lets only their owner read."""
    mode = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def put_in_place(made: Path, folder: Path) -> None:
    """Rename a synced folder to `folder`; an earlier one is renamed away first and deleted last."""
    earlier = folder.with_name(f".{folder.name}.removed")
    shutil.rmtree(earlier, ignore_errors=True)
    if folder.exists():
        folder.rename(earlier)
    made.rename(folder)
    sync(folder.parent)
    shutil.rmtree(earlier, ignore_errors=True)


def sync_all(folder: Path) -> None:
    """Have a folder, all that is in it and all their names on disk."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if not path.is_symlink():
            sync(path)
    sync(folder)


def sync(path: Path) -> None:
    """Have a file's content, or a folder's list of names, on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_record(path: Path, kind: type[Record]) -> Record:
    """The JSON object in a file.

    Raises:
        ValueError: the file is damaged; one sentence that names it and the field.
        OSError: it cannot be read.
    """
    content = path.read_bytes()
    return parsed(str(path), lambda: kind.model_validate_json(content))


def parsed(place: str, parse: Callable[[], Result]) -> Result:
    """What `parse`, a pydantic validation, returns. Raises ValueError where it does not: one sentence that
    names the place and the field."""
    try:
        return parse()
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False)[0]
        where = "".join(f"{part}: " for part in found["loc"])
        raise ValueError(f"{place} is damaged ({one_line(where + found['msg'])})") from None


def inside(folder: Path, name: str) -> Path:
    """The file called `name` below `folder`. Raises ValueError when it would lie elsewhere."""
    path = folder / name
    within = "\0" not in name and ".." not in path.parts
    if not within or not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        raise ValueError(f"{one_line(name)!r} leads out of {folder}")
    return path
