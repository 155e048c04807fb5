"""What the images promise, read off the Dockerfiles; the linter where it can be had."""

import re
import subprocess
from pathlib import Path

import pytest
from chart import ROOT
from fetched_tools import hadolint

DOCKER = ROOT / "deploy" / "docker"
pytestmark = pytest.mark.parametrize("kind", ["cpu", "gpu"])


def instructions(kind: str) -> list[tuple[str, str]]:
    """(instruction, arguments) in order, continued lines joined, comments left out."""
    lines = [line for line in path(kind).read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [tuple(line.split(maxsplit=1)) for line in joined.splitlines() if line.strip()]  # type: ignore[misc]


def path(kind: str) -> Path:
    return DOCKER / f"{kind}.Dockerfile"


def final_stage(kind: str) -> list[tuple[str, str]]:
    steps = instructions(kind)
    last = max(i for i, (name, _) in enumerate(steps) if name == "FROM")
    return steps[last:]


def test_packages_come_from_the_pinned_list(kind: str) -> None:
    installs = [text for name, text in instructions(kind) if name == "RUN" and "pip install" in text]
    assert any(f"-r {kind}.txt" in text for text in installs)
    assert all("--no-deps" in text for text in installs)
    assert any(name == "COPY" and f"requirements/{kind}.txt" in text for name, text in instructions(kind))


def test_the_final_stage_holds_a_compiler_and_no_build_leftovers(kind: str) -> None:
    stages = [text for name, text in instructions(kind) if name == "FROM"]
    assert len(stages) == 3
    runs = [text for name, text in final_stage(kind) if name == "RUN"]
    (apt,) = (text for text in runs if "apt-get" in text)
    assert "g++" in apt
    assert "--no-install-recommends" in apt
    assert "rm -rf /var/lib/apt/lists" in apt
    assert not any(name == "COPY" and "--from" not in text for name, text in final_stage(kind))


def test_not_root(kind: str) -> None:
    users = [text for name, text in final_stage(kind) if name == "USER"]
    assert users == ["1000:1000"]
    after = final_stage(kind)[[name for name, _ in final_stage(kind)].index("USER") :]
    assert "RUN" not in {name for name, _ in after}


def test_the_base_image_is_pinned_and_matches_python(kind: str) -> None:
    (base,) = (text for name, text in instructions(kind) if name == "ARG")
    assert re.fullmatch(r"PYTHON_IMAGE=python:3\.11\.\d+-slim-bookworm", base)
    assert all(text.startswith("${PYTHON_IMAGE}") or text.startswith("packages") for _, text in _froms(kind))


def _froms(kind: str) -> list[tuple[str, str]]:
    return [step for step in instructions(kind) if step[0] == "FROM"]


def test_no_secrets(kind: str) -> None:
    assert not re.search(r"(?i)(token|password|secret|api_?key)\s*=", path(kind).read_text())
    ignore = Path(f"{path(kind)}.dockerignore").read_text().split("\n")
    kept = [line[1:] for line in ignore if line.startswith("!")]
    assert "*" in ignore
    copied = {
        word.rstrip("/")
        for name, text in instructions(kind)
        if name == "COPY" and "--from" not in text
        for word in text.split()[:-1]
    }
    roots = {re.sub(r"/\*\.txt$", "", entry) for entry in kept}
    assert {word.removesuffix(f"/{kind}.txt") for word in copied} <= roots
    assert all((ROOT / word).exists() for word in copied)


def test_it_says_whether_it_is_healthy(kind: str) -> None:
    assert [name for name, _ in final_stage(kind)].count("HEALTHCHECK") == 1


def test_hadolint(kind: str) -> None:
    done = subprocess.run([hadolint(), path(kind)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
