"""The images' Dockerfiles executed step by step in clean root folders, where no container engine is at hand.

    RLGAF_IMAGE_STEPS=/scratch pytest -m slow -s tests/deploy/test_image_steps.py

needs root on a Debian with the images' Python, 25 GB below /scratch and a quarter of an hour; `steps-KIND.md`
there has the steps, seconds and sizes. The GPU image is executed without most of its CUDA wheels (several GB
that nothing could use without a device): its list is installed less torch and what the CPU list does not
have, but with the compiler for kernels.
"""

import os
import re
import shutil
from pathlib import Path

import pytest
from chart import ROOT
from clean_root import obstacle
from dockerfile import stages
from hand_build import Done, HandBuild

VARIABLE = "RLGAF_IMAGE_STEPS"
COMPILER = {"crt", "nvcc", "runtime", "cccl"}
"""What `nvcc` needs of CUDA, as nvidia-cuda-NAME, beside nvidia-nvvm."""
DOCKER = ROOT / "deploy" / "docker"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(5400)]


@pytest.fixture(scope="module")
def work() -> Path:
    named = os.environ.get(VARIABLE)
    if not named:
        pytest.skip(f"{VARIABLE} names no folder with 25 GB to spare")
    for kind in ("cpu", "gpu"):
        for stage in stages(DOCKER / f"{kind}.Dockerfile"):
            if stage.base.startswith("python:") and (reason := obstacle(stage.base)):
                pytest.skip(reason)
    return Path(named)


def executed(kind: str, work: Path, replaced: dict[str, str]) -> HandBuild:
    """The finished build; what it did is printed and written down as it happens."""
    folder = work / kind
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    report = work / f"steps-{kind}.md"
    report.write_text("| stage | step | seconds | MiB |\n|---|---|---|---|\n")

    def say(done: Done) -> None:
        step = done.step if len(done.step) < 90 else f"{done.step[:87]}..."
        line = f"| {done.stage} | `{step}` | {done.seconds:.0f} | {done.mib:+d} |"
        print(line, flush=True)
        with report.open("a") as out:
            out.write(f"{line}\n")

    build = HandBuild(DOCKER / f"{kind}.Dockerfile", ROOT, folder, work / "base", replaced, say)
    build.build()
    return build


@pytest.fixture(scope="module")
def cpu(work: Path) -> HandBuild:
    return executed("cpu", work, {})


@pytest.fixture(scope="module")
def gpu(work: Path) -> HandBuild:
    small, whole = (
        (ROOT / f"requirements/{kind}.txt").read_text().replace("\\\n", "").splitlines()
        for kind in ("cpu", "gpu")
    )
    known = {line.split("==")[0] for line in small}
    known |= {"nvidia-nvvm", *(f"nvidia-cuda-{part}" for part in COMPILER)}
    kept = [line for line in whole if line.split("==")[0] in known]
    assert any(line.startswith("setuptools==") for line in kept)
    return executed("gpu", work, {"requirements/gpu.txt": "\n".join(kept) + "\n"})


def test_the_images_parts_are_where_they_belong(cpu: HandBuild) -> None:
    root = cpu.image.root
    assert not (root / "src").exists()
    assert not (root / "wheels").exists()
    assert not (root / "root/.cache").exists()
    assert not list((root / "var/lib/apt/lists").glob("*Packages*"))
    assert not list((root / "usr/local/lib").rglob("tests/services/test_*.py"))
    shown = cpu.run("id -u; pwd; command -v g++; touch /runs/a /cache/a /data/a $HOME/a && echo done")
    assert shown.stdout.splitlines() == ["1000", "/runs", "/usr/bin/g++", "done"]


def test_packages_fit_together(cpu: HandBuild) -> None:
    """But for what vLLM names and a CPU has no builds of."""
    missing = re.findall(r"requires (\S+), which is not installed", cpu.run("pip check").stdout)
    assert set(missing) <= {"torchvision", "torchaudio", "torchcodec", "triton"}
    assert "has requirement" not in cpu.run("pip check").stdout


def test_the_command_line_works_and_kernels_compile(cpu: HandBuild) -> None:
    """As the image's user, outside the project."""
    shown = cpu.run("rlgaf doctor")
    assert shown.returncode == 0, shown.stdout
    source = "import torch; print(torch.compile(lambda x: x.sin() + 1)(torch.zeros(3)).tolist())"
    compiled = cpu.run(f'python -c "{source}"', timeout_s=900)
    assert compiled.stdout.splitlines()[-1:] == ["[1.0, 1.0, 1.0]"], compiled.stdout
    vllm = "import vllm, deepspeed, rollout.plugin, services.serving; print(vllm.__version__)"
    imported = cpu.run(f'python -c "{vllm}"', timeout_s=600)
    assert imported.stdout.splitlines()[-1].startswith("0.32.0"), imported.stdout


def test_the_default_command_becomes_healthy(cpu: HandBuild) -> None:
    shown = cpu.healthy(within_s=180)
    assert shown.stdout.splitlines()[-1:] == ["healthy"], shown.stdout


def test_the_gpu_image_has_what_does_not_need_a_device(gpu: HandBuild) -> None:
    """A kernel compiles with the compiler that CUDA_HOME names."""
    source = "__global__ void one(float *x) { x[threadIdx.x] = 1; }"
    compiler = "$CUDA_HOME/bin/nvcc -arch=sm_90 -cubin -o /tmp/one.cubin /tmp/one.cu"
    compiled = gpu.run(f"echo '{source}' > /tmp/one.cu && {compiler}")
    assert compiled.returncode == 0, compiled.stdout
    shown = gpu.run("id -u; pwd; command -v g++; rlgaf --help > /tmp/help && echo done")
    assert shown.stdout.splitlines() == ["1000", "/runs", "/usr/bin/g++", "done"]
