"""Parts of a document that a program writes: what stands between their two markers."""

from pathlib import Path

from rollout.files import write_whole


def markers(name: str, command: str) -> tuple[str, str]:
    """First and last line of a part."""
    return f"<!-- {name}: written by `{command}`, from benchmarks/results -->", f"<!-- {name}: end -->"


def replace_part(path: Path, name: str, command: str, text: str) -> None:
    """Put `text` between the markers of a part; the rest stays as it is.

    Raises:
        ValueError: the document lacks the markers.
    """
    begin, end = markers(name, command)
    whole = path.read_text(encoding="utf-8")
    if whole.count(begin) != 1 or whole.count(end) != 1 or whole.index(begin) > whole.index(end):
        raise ValueError(f"{path} needs, once and in this order, the lines\n{begin}\n{end}")
    before, after = whole[: whole.index(begin)], whole[whole.index(end) :]
    write_whole(path, f"{before}{begin}\n\n{text}\n\n{after}")
