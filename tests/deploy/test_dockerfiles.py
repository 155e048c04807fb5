"""What the images promise, read off the Dockerfiles; the linter where it can be had."""

import re
import subprocess
from pathlib import Path

import pytest
from chart import ROOT
from dockerfile import Step, context, instructions, stages
from fetched_tools import hadolint

DOCKER = ROOT / "deploy" / "docker"
pytestmark = pytest.mark.parametrize("kind", ["cpu", "gpu"])


def path(kind: str) -> Path:
    return DOCKER / f"{kind}.Dockerfile"


def steps(kind: str) -> list[Step]:
    return instructions(path(kind))


def final_stage(kind: str) -> list[Step]:
    return stages(path(kind))[-1].steps


def test_packages_come_from_the_pinned_list(kind: str) -> None:
    installs = [step.text for step in steps(kind) if step.name == "RUN" and "pip install" in step.text]
    assert any(f"-r {kind}.txt" in text for text in installs)
    assert all("--no-deps" in text for text in installs)
    assert any(step.name == "COPY" and f"requirements/{kind}.txt" in step.text for step in steps(kind))


def test_every_package_of_the_list_has_hashes(kind: str) -> None:
    pins = (ROOT / f"requirements/{kind}.txt").read_text().replace("\\\n", "").splitlines()
    assert len(pins) > 150
    assert [pin for pin in pins if not re.match(r"\S+==\S+( +--hash=sha256:[0-9a-f]{64})+$", pin)] == []
    (install,) = (step.text for step in steps(kind) if f"-r {kind}.txt" in step.text)
    assert "--require-hashes" in install
    assert "--require-hashes -r $(LIST)" in (ROOT / "Makefile").read_text()


def test_the_final_stage_holds_a_compiler_and_no_build_leftovers(kind: str) -> None:
    assert len(stages(path(kind))) == 3
    (apt,) = (step.text for step in final_stage(kind) if step.name == "RUN" and "apt-get" in step.text)
    assert "g++" in apt
    assert "--no-install-recommends" in apt
    assert "rm -rf /var/lib/apt/lists" in apt
    assert not any(step.name == "COPY" and "from" not in step.flags for step in final_stage(kind))


def test_not_root(kind: str) -> None:
    names = [step.name for step in final_stage(kind)]
    assert [step.text for step in final_stage(kind) if step.name == "USER"] == ["1000:1000"]
    assert "RUN" not in names[names.index("USER") :]


def test_the_base_image_is_pinned_and_matches_python(kind: str) -> None:
    bases = {stage.base for stage in stages(path(kind))} - {stage.name for stage in stages(path(kind))}
    (base,) = bases
    assert re.fullmatch(r"python:3\.11\.\d+-slim-bookworm", base)


def test_only_pods_that_ask_for_gpus_see_them(kind: str) -> None:
    """Where NVIDIA's container runtime is the default, an image that says `all` gets every GPU."""
    environment = " ".join(step.text for step in final_stage(kind) if step.name == "ENV")
    assert "HOME=/home/rlgaf" in environment
    assert "NVIDIA_VISIBLE_DEVICES" not in environment


def test_no_secrets(kind: str) -> None:
    """Nothing is written down, and the build sees only what some COPY asks for."""
    assert not re.search(r"(?i)(token|password|secret|api_?key)\s*=", path(kind).read_text())
    copied = {
        word.rstrip("/")
        for step in steps(kind)
        if step.name == "COPY" and "from" not in step.flags
        for word in step.text.split()[:-1]
    }
    seen = {str(file) for file in context(ROOT, Path(f"{path(kind)}.dockerignore"))}
    assert all((ROOT / word).exists() for word in copied)
    assert copied <= seen | {file.split("/")[0] for file in seen}
    others = {file for file in seen if file not in copied and file.split("/")[0] not in copied}
    assert others <= {"Makefile"} | {f"requirements/{item.name}" for item in ROOT.glob("requirements/*.txt")}
    assert not [file for file in seen if "__pycache__" in file]


def test_it_says_whether_it_is_healthy(kind: str) -> None:
    assert [step.name for step in final_stage(kind)].count("HEALTHCHECK") == 1


def test_hadolint(kind: str) -> None:
    done = subprocess.run([hadolint(), path(kind)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
