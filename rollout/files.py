"""Files that people and other services are to read."""

from pathlib import Path


def readable(folder: Path) -> None:
    """Give the files below a folder the folder's own permissions: safetensors lets only their owner read."""
    mode = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)
