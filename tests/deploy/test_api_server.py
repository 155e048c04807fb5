"""The chart on a real API server: accepted, defaulted, refused; and a run that trains through it, stopped by
deleting its RayJob, resumed by an upgrade, kept by upgrades, a rollback and the end of the release.

Opt-in: RLGAF_TEST_API_SERVER names a folder with etcd and kube-apiserver (build_api_server.sh makes one),
RLGAF_KUBERAY_CRDS one with KubeRay's CRDs where its release cannot be downloaded. KubeRay and the kubelet are
played (ray_operator.py, kubelet.py): the pods' commands run as they are, in namespaces of this machine, with
real Ray, vLLM and DeepSpeed inside.
"""

import json
import re
import shutil
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml
from api_server import CORE, RAY, ApiError, ApiServer, api_server
from chart import CHART, ray_object, render
from fetched_tools import kuberay_crds
from local_cluster import LocalCluster, local_cluster

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]
READY_S = 420.0
TRAIN_S = 900.0
STOP_S = 400.0
EXAMPLE = CHART / "examples" / "kind-cpu.yaml"
MORE_STEPS = 3
RUN = """
[run]
name = "demo"
steps = 2000
prompts_per_step = 4
checkpoint_every = 0
[data]
demonstrations = "/runs/assets/demonstrations.jsonl"
max_prompt_tokens = 32
heldout_fraction = 0.2
selection_fraction = 0.2
test_fraction = 0.2
[policy]
model = "/runs/assets/tiny"
dtype = "float32"
[sampling]
group_size = 4
max_tokens = 16
[rollout]
threads = 1
[learner]
threads = 1
lr = 1e-3
[discriminator]
threads = 1
lr = 1e-3
batch_size = 16
warmup_max_steps = 5
[discriminator.scoring]
threads = 1
[discriminator.audit]
base_samples = 32
[discriminator.health]
enabled = false
[evaluation]
every = 200
prompts = 16
test_prompts = 16
bootstrap = 100
embedding_model = "none"
"""
VALUES = {
    "run": {"config": RUN},
    # The chart's own way to data: a claim with the model, copied by the init container of the head.
    "data": {
        "existingClaim": "given",
        "prepare": ["cp", "-r", "/data/assets", "/runs/"],
        "waitFor": ["/runs/assets/tiny/config.json", "/runs/assets/demonstrations.jsonl"],
    },
    "job": {"ttlSecondsAfterFinished": 2},
    "stop": {"graceSeconds": 330, "jobWaitSeconds": 300},
    "secrets": {"huggingFace": {"name": "hub"}, "rayToken": {"enabled": False}},  # not played
    "env": [
        {"name": "HF_HUB_OFFLINE", "value": "1"},
        {"name": "OMP_NUM_THREADS", "value": "1"},
        # This machine's memory is not the pods': Ray would end the run for the memory of others.
        {"name": "RAY_memory_monitor_refresh_ms", "value": "0"},
    ],
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    crds = kuberay_crds()
    with api_server(tmp_path_factory.mktemp("api")) as running:
        running.install(crds)
        yield running


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    with local_cluster(tmp_path_factory.mktemp("cluster")) as running:
        yield running


@pytest.fixture(scope="module")
def values(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Chart and values, as words for helm."""
    folder = tmp_path_factory.mktemp("chart")
    shutil.copytree(CHART, folder / "rlgaf")
    # The one line that this API server, older than what KubeRay 1.7 is run on, cannot satisfy.
    about = folder / "rlgaf" / "Chart.yaml"
    text, count = re.subn(r"^kubeVersion:.*\n", "", about.read_text(), flags=re.MULTILINE)
    assert count == 1
    about.write_text(text)
    (folder / "values.yaml").write_text(yaml.safe_dump(VALUES))
    return [str(folder / "rlgaf"), "-f", str(EXAMPLE), "-f", str(folder / "values.yaml")]


def test_the_server_takes_every_example_and_fills_in_defaults(server: ApiServer) -> None:
    made = {}
    for example in sorted((CHART / "examples").glob("*.yaml")):
        manifest = ray_object(render("-f", str(example)))
        manifest["metadata"].pop("namespace", None)
        plural = manifest["kind"].lower() + "s"
        path = f"{RAY}/namespaces/default/{plural}?dryRun=All&fieldManager=test"
        made[example.stem] = (manifest, server.ask("POST", path, manifest))
    given, stored = made["kind-cpu"]
    group, filled = (job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0] for job in (given, stored))
    assert "numOfHosts" not in group
    assert filled["numOfHosts"] == 1
    ports = filled["template"]["spec"]["containers"][0]["ports"]
    assert {port["protocol"] for port in ports} == {"TCP"}
    for given, stored in made.values():
        assert pruned(given["spec"], stored["spec"]) == []


def pruned(given: Any, stored: Any, path: str = "spec") -> list[str]:
    """Paths of what was given and is not stored as given."""
    if isinstance(given, dict) and isinstance(stored, dict):
        return [line for key in given for line in pruned(given[key], stored.get(key), f"{path}.{key}")]
    if isinstance(given, list) and isinstance(stored, list) and len(given) == len(stored):
        pairs = enumerate(zip(given, stored, strict=True))
        return [line for index, (a, b) in pairs for line in pruned(a, b, f"{path}[{index}]")]
    return [] if given == stored else [f"{path}: {given!r} became {stored!r}"]


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("backoffLimit",), "three", "spec.backoffLimit"),
        (("shutdownAfterJobFinishes",), "yes", "spec.shutdownAfterJobFinishes"),
        (("rayClusterSpec", "headGroupSpec", "rayStartParams", "num-cpus"), 2, "num-cpus"),
        (("rayClusterSpec", "workerGroupSpecs", 0, "replicas"), "1", "replicas"),
    ],
)
def test_a_wrong_type_is_refused(server: ApiServer, path: tuple[Any, ...], value: Any, words: str) -> None:
    manifest = deepcopy(ray_object(render("-f", str(EXAMPLE))))
    manifest["metadata"].pop("namespace", None)
    target = manifest["spec"]
    for step in path[:-1]:
        target = target[step]
    target[path[-1]] = value
    with pytest.raises(ApiError, match=re.escape(words)) as refused:
        server.ask("POST", f"{RAY}/namespaces/default/rayjobs?dryRun=All", manifest)
    assert refused.value.status == 422


def test_a_run_through_the_chart(
    cluster: LocalCluster, values: list[str], tiny_model: Path, tiny_demonstrations: Path
) -> None:
    assets = cluster.kubelet.claim("given") / "assets"
    shutil.copytree(tiny_model, assets / "tiny")
    shutil.copy(tiny_demonstrations, assets / "demonstrations.jsonl")
    claim = {"accessModes": ["ReadOnlyMany"], "resources": {"requests": {"storage": "1Gi"}}}
    make(cluster, "persistentvolumeclaims", "PersistentVolumeClaim", "given", spec=claim)
    make(cluster, "secrets", "Secret", "hub", stringData={"token": "a-secret"})
    run = cluster.kubelet.claim("demo-rlgaf-runs") / "demo"

    # Installed, the run starts.
    # Applied by helm itself: this old server's own apply refuses ports without a protocol.
    notes = cluster.helm("install", "demo", *values, "--server-side=false")
    assert "kubectl -n default get rayjob demo-rlgaf-1" in notes
    assert "This cluster has no policy/v1" in notes
    cluster.wait(
        lambda: cluster.status("demo-rlgaf-1").get("jobStatus") == "RUNNING", READY_S, "no running job"
    )
    cluster.wait(lambda: len(rows(run)) >= 2, TRAIN_S, "no steps")
    first = identities(cluster)
    head, worker = (group_pods(cluster, role) for role in ("head", "worker"))
    assert (len(head), len(worker)) == (1, 1)
    environment = cluster.kubelet.pods[head[0]].processes[-1].container.env
    assert environment["HF_TOKEN"] == "a-secret"

    machines_are_waited_for(cluster, head[0])

    # An upgrade with other values, and the way back, leave it alone.
    upgraded = cluster.helm("upgrade", "demo", *values, "--set", "monitoring.dashboard.enabled=false")
    assert "REVISION: 2" in upgraded
    assert "demo-rlgaf-dashboard" not in names(cluster, "configmaps")
    cluster.helm("rollback", "demo", "1")
    assert "demo-rlgaf-dashboard" in names(cluster, "configmaps")
    assert identities(cluster) == first
    assert cluster.status("demo-rlgaf-1")["jobStatus"] == "RUNNING"
    before = len(rows(run))
    cluster.wait(lambda: len(rows(run)) > before, 120, "the run does not go on after upgrade and rollback")

    # Deleting the RayJob stops it with a checkpoint, inside the pods' grace period.
    cluster.server.delete(f"{RAY}/namespaces/default/rayjobs/demo-rlgaf-1")
    cluster.wait(lambda: not names(cluster, "pods"), STOP_S, "the pods do not end")
    ends = [cluster.kubelet.ends[pod] for pod in (*head, *worker)]
    assert [(end.hook_code, end.killed) for end in ends] == [(0, False), (0, False)], ends
    of_head, of_worker = ends
    # The worker's rank was needed for the checkpoint, so its hook waits as long as the head's.
    assert of_worker.hook_seconds > of_head.hook_seconds - 5, (ends, cluster.words())
    stopped = rows(run)
    log = next(
        (cluster.kubelet.folder / "pods" / head[0] / "volumes" / "tmp").glob(
            "ray/session_2*/logs/job-driver-*"
        )
    )
    assert f"stopped at step {len(stopped)}; go on with --resume" in log.read_text()
    assert (run / "checkpoints" / f"step-{len(stopped):06d}").is_dir()
    assert cluster.rayjobs() == []

    # The next attempt goes on from there, with the values changed in between, to the end.
    steps = len(stopped) + MORE_STEPS
    wanted = json.dumps([f"--run.steps={steps}"])
    cluster.helm(
        "upgrade", "demo", *values, "--set", "job.attempt=2", "--set-json", f"run.overrides={wanted}"
    )

    def ended() -> bool:
        return cluster.status("demo-rlgaf-2").get("jobDeploymentStatus") in ("Complete", "Failed")

    cluster.wait(ended, READY_S + TRAIN_S, "the second attempt does not end")
    status = cluster.status("demo-rlgaf-2")
    assert (status["jobDeploymentStatus"], status["jobStatus"]) == ("Complete", "SUCCEEDED"), cluster.words()
    assert [row["step"] for row in rows(run)] == list(range(1, steps + 1))
    assert json.loads((run / "summary.json").read_text())["steps"] == steps
    log = cluster.kubelet.folder / "pods" / "demo-rlgaf-2" / "ray-job-submitter.log"
    assert f"resuming from step {len(stopped)}" in log.read_text()
    cluster.wait(lambda: names(cluster, "pods") == ["demo-rlgaf-2"], STOP_S, "the cluster stays")

    # helm test, and the end of the release: the run stays on its volume.
    assert "Succeeded" in cluster.helm("test", "demo")
    cluster.helm("uninstall", "demo")
    cluster.wait(lambda: not names(cluster, "pods"), STOP_S, "the pods do not end after uninstall")
    assert cluster.rayjobs() == []
    for kind in ("configmaps", "services", "serviceaccounts"):
        assert not [name for name in names(cluster, kind) if name.startswith("demo")]
    assert names(cluster, "persistentvolumeclaims") == ["demo-rlgaf-runs", "given"]
    assert (run / "summary.json").exists()


def machines_are_waited_for(cluster: LocalCluster, head: str) -> None:
    """A second run on the head, as in an autoscaled release: it asks for machines, waits, and names what is
    missing in the end."""
    running = cluster.kubelet.pods[head]
    assert running.main is not None
    file = running.volumes["tmp"].source / "missing.json"
    file.write_text(json.dumps(["--run.output=/tmp/other", "--rollout.workers=9"]))
    start = ["python", "/etc/rlgaf/scripts/start.py", "/etc/rlgaf/run/run.toml", "/tmp/missing.json"]
    process = running.sandbox.execute(running.main, ["env", "RLGAF_AUTOSCALED=0 9 3", *start], "autoscaled")
    cluster.wait(lambda: process.code is not None, 180, "the run goes on without its machines")
    text = process.log.read_text()
    assert process.code == 2, text
    assert "and the cluster, 3 s after it was asked to grow, has 2" in text


def make(cluster: LocalCluster, plural: str, kind: str, name: str, **content: Any) -> None:
    body = {"apiVersion": "v1", "kind": kind, "metadata": {"name": name}} | content
    cluster.server.ask("POST", f"{CORE}/namespaces/default/{plural}", body)


def names(cluster: LocalCluster, kind: str) -> list[str]:
    return sorted(found["metadata"]["name"] for found in cluster.core(kind))


def group_pods(cluster: LocalCluster, role: str) -> list[str]:
    pods = cluster.core("pods")
    return [p["metadata"]["name"] for p in pods if p["metadata"]["labels"].get("ray.io/node-type") == role]


def identities(cluster: LocalCluster) -> dict[str, str]:
    """What must not be made anew under a run: its RayJob, its claim, its pods."""
    found = [*cluster.rayjobs(), *cluster.core("persistentvolumeclaims"), *cluster.core("pods")]
    return {entry["metadata"]["name"]: entry["metadata"]["uid"] for entry in found}


def rows(run: Path) -> list[dict[str, Any]]:
    """Whole lines of the run's metrics, without the base's evaluation."""
    file = run / "metrics.jsonl"
    text = file.read_text().rpartition("\n")[0] if file.exists() else ""
    return [json.loads(line) for line in text.splitlines()[1:]]
