"""What a Dockerfile says: its stages and their instructions, and which files of the context a build sees.

Known is what the Dockerfiles of this project use; anything else is a ValueError.
"""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

FLAG = re.compile(r"--([a-z]+)=(\S+)\s+")


@dataclass(frozen=True)
class Step:
    """One instruction, its flags apart from its text; continued lines are one."""

    name: str
    text: str
    flags: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Stage:
    """From one FROM to the next; `name` is its number where it has none."""

    base: str
    name: str
    steps: list[Step]


def instructions(path: Path) -> list[Step]:
    """All instructions in order, comments left out."""
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    found = []
    for line in filter(str.strip, joined.splitlines()):
        name, text = line.split(maxsplit=1)
        flags = {}
        while match := FLAG.match(text) if name in ("COPY", "RUN") else None:
            flags[match[1]], text = match[2], text[match.end() :]
        found.append(Step(name, text, flags))
    return found


def stages(path: Path) -> list[Stage]:
    """The stages, with the values of the ARGs before the first one filled in."""
    values: dict[str, str] = {}
    found: list[Stage] = []
    for step in instructions(path):
        if step.name == "ARG":
            if found:
                raise ValueError(f"{path}: an ARG within a stage")
            values.update([step.text.split("=", 1)])
        elif step.name == "FROM":
            words = re.sub(r"\$\{(\w+)\}", lambda match: values[match[1]], step.text).split()
            found.append(Stage(words[0], words[2] if len(words) == 3 else str(len(found)), []))
        else:
            found[-1].steps.append(step)
    return found


def pairs(text: str) -> dict[str, str]:
    """What an ENV sets."""
    return dict(word.split("=", 1) for word in shlex.split(text))


def context(root: Path, ignore: Path) -> Iterator[Path]:
    """Files below `root` that `ignore` (a .dockerignore) leaves to the build, relative to it.

    The last pattern that matches a file or a folder it lies in decides; one with `!` lets it in.
    """
    lines = [line.strip() for line in ignore.read_text().splitlines()]
    if "*" not in lines:
        raise ValueError(f"{ignore} does not begin with leaving everything out")
    rules = [(line.startswith("!"), _pattern(line.lstrip("!"))) for line in lines if line and line[0] != "#"]
    tops = {line[1:].split("/")[0] for line in lines if line.startswith("!")}
    for top in sorted(tops):  # nothing else can be let in
        for path in sorted([root / top, *(root / top).rglob("*")]):
            relative = path.relative_to(root)
            names = [str(relative), *map(str, relative.parents[:-1])]
            verdicts = [kept for kept, pattern in rules if any(map(pattern.fullmatch, names))]
            if path.is_file() and (not verdicts or verdicts[-1]):
                yield relative


def _pattern(glob: str) -> re.Pattern[str]:
    """A pattern of a .dockerignore: `**/` is any number of folders, `*` stays within a name."""
    known = {"**/": "(?:.*/)?", "*": "[^/]*", "?": "[^/]"}
    parts = re.split(r"(\*\*/|\*|\?)", glob.strip("/"))
    return re.compile("".join(known.get(part, re.escape(part)) for part in parts))
