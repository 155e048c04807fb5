"""Every example renders, is valid for Kubernetes and KubeRay, has room for its run, and is what it was."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from chart import (
    CHART,
    EXAMPLES,
    SMALLEST,
    cluster_spec,
    groups,
    one,
    pod_templates,
    ray_object,
    render,
    run_helm,
)
from crd import problems
from fetched_tools import kuberay_crds, kubernetes_schemas

from services.config import Config
from services.plan import resource_plan

GOLDEN = Path(__file__).parent / "golden"
SERVE = (
    "--set",
    "mode=RayService",
    "--set",
    "service.args.run=/runs/demo",
    "--set",
    "secrets.scoring.name=token",
)
WITHOUT_SCHEMA = ("monitoring.coreos.com/v1", "ray.io/v1")
VALIDATE = """
import sys, yaml, kubernetes_validate
for manifest in yaml.safe_load_all(sys.stdin):
    kubernetes_validate.validate(manifest, "1.34", strict=True)
"""

pytestmark = pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)


def test_lint(example: Path) -> None:
    assert "0 chart(s) failed" in run_helm("lint", "--strict", str(CHART), "-f", str(example))


def test_core_kinds_are_valid(example: Path) -> None:
    folder = kubernetes_schemas()
    manifests = render("-f", str(example))
    core = [manifest for manifest in manifests if manifest["apiVersion"] not in WITHOUT_SCHEMA]
    assert {"ConfigMap", "ServiceAccount", "NetworkPolicy", "Pod"} <= {m["kind"] for m in core}
    for name, template in pod_templates(manifests):
        spec = {"restartPolicy": "Never", **template["spec"]}
        core.append({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": spec})
    done = subprocess.run(
        [sys.executable, "-c", VALIDATE],
        input=yaml.safe_dump_all(core),
        env=os.environ | {"PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("more", [(), SERVE], ids=["mode as given", "RayService"])
def test_ray_kinds_are_valid(example: Path, more: tuple[str, ...]) -> None:
    crds = kuberay_crds()
    if more and example.stem == "8-gpus":
        more = (*more, "--set", "scoring.http=false")
    assert problems(crds, ray_object(render("-f", str(example), *more))) == []


def test_the_run_fits_into_the_pods(example: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLGAF_SCORE_TOKEN", "secret")
    manifests = render("-f", str(example))
    toml = [m["data"]["run.toml"] for m in manifests if m["kind"] == "ConfigMap" and "run.toml" in m["data"]]
    if not any(manifest["kind"] == "RayJob" for manifest in manifests):
        assert not toml, "the other modes take runs later, or none"
        return
    have = {"num-cpus": 0, "num-gpus": 0}
    for _, group in groups(manifests):
        for name in have:
            have[name] += group.get("replicas", 1) * int(group["rayStartParams"][name])
    plan = resource_plan(Config.model_validate(tomllib.loads(toml[0])), gpus=have["num-gpus"])
    plan.check(have["num-cpus"], have["num-gpus"], "the rendered cluster")
    assert plan.gpus == have["num-gpus"], "GPUs that no process of the run would use"


def test_ray_sees_what_the_containers_have(example: Path) -> None:
    for name, group in groups(render("-f", str(example))):
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        params, volumes = group["rayStartParams"], group["template"]["spec"]["volumes"]
        if name != "head":
            assert params["num-cpus"] == limits["cpu"]
        assert params["num-gpus"] == limits.get("nvidia.com/gpu", "0")
        (shm,) = (v["emptyDir"]["sizeLimit"] for v in volumes if v["name"] == "shared-mem")
        assert int(params["object-store-memory"]) * 4 == int(shm.removesuffix("Gi")) * 2**30 * 3


def test_pods_on_one_volume_can_share_its_node(example: Path) -> None:
    """ReadWriteOnce: the head follows the workers and tolerates what they do; ReadWriteMany: it is free."""
    manifests = render("-f", str(example))
    templates = dict(pod_templates(manifests))
    runs = (yaml.safe_load(example.read_text()).get("storage") or {}).get("runs", {})
    if runs.get("accessMode", "ReadWriteMany") == "ReadWriteMany":
        assert "affinity" not in templates["head"]["spec"]
        return
    affinity = templates["head"]["spec"]["affinity"]["podAffinity"]
    (term,) = affinity["requiredDuringSchedulingIgnoredDuringExecution"]
    assert term["topologyKey"] == "kubernetes.io/hostname"
    (wanted,) = term["labelSelector"]["matchExpressions"]
    (worker,) = (templates[name] for name in templates if name in wanted["values"])
    assert term["labelSelector"]["matchLabels"].items() <= worker["metadata"]["labels"].items()
    assert worker["metadata"]["labels"][wanted["key"]] in wanted["values"]
    for name in ("head", "test"):
        assert templates[name]["spec"].get("tolerations") == worker["spec"].get("tolerations"), name
    assert not any("nodeSelector" in templates[name]["spec"] for name in ("head", "test"))


def test_a_secret_that_pods_cannot_start_without_is_made_in_the_header(example: Path) -> None:
    text = example.read_text()
    name = (yaml.safe_load(text).get("secrets") or {}).get("scoring", {}).get("name")
    assert name is None or f"#   kubectl create secret generic {name} --from-literal=token=" in text


def test_golden(example: Path) -> None:
    """`RLGAF_UPDATE_GOLDEN=1 pytest …` writes the files anew."""
    shown = yaml.safe_dump_all([_readable(m) for m in render("-f", str(example))], width=110, sort_keys=True)
    golden = GOLDEN / f"{example.stem}.yaml"
    if os.environ.get("RLGAF_UPDATE_GOLDEN"):
        golden.write_text(shown)
    assert shown == golden.read_text()


def _readable(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest with the chart's own files named instead of shown."""
    files = {path.read_text().strip(): f"<{path.relative_to(CHART)}>" for path in (CHART / "files").iterdir()}
    if manifest["kind"] == "ConfigMap":
        manifest["data"] = {key: files.get(text.strip(), text) for key, text in manifest["data"].items()}
    if manifest["kind"] == "PrometheusRule":
        assert manifest["spec"] == yaml.safe_load((CHART / "files/rules.yaml").read_text())
        manifest["spec"] = "<files/rules.yaml>"
    return manifest


def test_the_smallest_values_make_the_same_kinds(example: Path) -> None:
    always = {
        "ConfigMap",
        "ServiceAccount",
        "NetworkPolicy",
        "PodDisruptionBudget",
        "Pod",
    }
    for arguments in (("-f", str(example)), SMALLEST):
        assert always <= {manifest["kind"] for manifest in render(*arguments)}


def test_no_pod_may_be_evicted_however_far_the_cluster_has_grown(example: Path) -> None:
    manifests = render("-f", str(example))
    largest = 1 + sum(group["maxReplicas"] for group in cluster_spec(manifests)["workerGroupSpecs"])
    assert one(manifests, "PodDisruptionBudget")["spec"]["minAvailable"] == largest
