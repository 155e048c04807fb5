"""A disk that takes no more is an answer of a rank, not its end."""

from collections.abc import Callable

from safetensors import SafetensorError


def written(write: Callable[[], None]) -> str:
    """Why the files could not be written; empty where they were."""
    try:
        write()
    except (OSError, SafetensorError) as error:
        return str(error)
    return ""
