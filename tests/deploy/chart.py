"""The chart under test: rendering, and the parts of what was rendered."""

import importlib.util
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml
from fetched_tools import helm

ROOT = Path(__file__).parents[2]
CHART = ROOT / "deploy" / "helm" / "rlgaf"
NAMESPACE = "training"
EXAMPLES = sorted((CHART / "examples").glob("*.yaml"))
OPERATOR_APIS = ("--api-versions", "monitoring.coreos.com/v1")
SMALLEST = (
    *("--set", 'run.config=[policy]\nmodel = "m"', "--set", "workers.cpu.replicas=1"),
    *("--set", "networkPolicy.operatorNamespace=operators"),
)
"""Values with which mode RayJob renders."""

Manifest = dict[str, Any]


class ChartError(RuntimeError):
    """What helm says when it refuses."""


@cache
def run_helm(*arguments: str) -> str:
    """Output of one helm command; asked once for the same words."""
    done = subprocess.run([helm(), *arguments], capture_output=True, text=True, timeout=120, check=False)
    if done.returncode != 0:
        raise ChartError(done.stdout + done.stderr)
    return done.stdout


def render(*arguments: str, release: str = "demo", apis: tuple[str, ...] = OPERATOR_APIS) -> list[Manifest]:
    """All manifests of `helm template` with these arguments."""
    text = run_helm("template", release, str(CHART), "--namespace", NAMESPACE, *apis, *arguments)
    return [manifest for manifest in yaml.safe_load_all(text) if manifest]


def one(manifests: list[Manifest], kind: str) -> Manifest:
    """The only manifest of a kind."""
    (found,) = (manifest for manifest in manifests if manifest["kind"] == kind)
    return found


def ray_object(manifests: list[Manifest]) -> Manifest:
    """The RayJob, RayCluster or RayService."""
    (found,) = (manifest for manifest in manifests if manifest["apiVersion"] == "ray.io/v1")
    return found


def cluster_spec(manifests: list[Manifest]) -> Manifest:
    """The RayCluster's spec, wherever the mode puts it."""
    spec = ray_object(manifests)["spec"]
    return spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec


def groups(manifests: list[Manifest]) -> Iterator[tuple[str, Manifest]]:
    """Head and worker groups by name."""
    spec = cluster_spec(manifests)
    yield "head", spec["headGroupSpec"]
    for group in spec["workerGroupSpecs"]:
        yield group["groupName"], group


def pod_templates(manifests: list[Manifest]) -> Iterator[tuple[str, Manifest]]:
    """Every pod template that comes to run: Ray pods, the submitter, the test's pod."""
    for name, group in groups(manifests):
        yield name, group["template"]
    submitter = ray_object(manifests)["spec"].get("submitterPodTemplate")
    if submitter:
        yield "submitter", submitter
    for manifest in manifests:
        if manifest["kind"] == "Pod":
            yield "test", manifest


def script(name: str) -> ModuleType:
    """A script that the chart mounts, as a module."""
    spec = importlib.util.spec_from_file_location(f"chart_{name}", CHART / "files" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
