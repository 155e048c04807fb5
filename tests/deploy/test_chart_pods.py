"""What the pods may do, what they can write to, how they end, and what stays the same across upgrades."""

import json
import re
from pathlib import Path

import pytest
import yaml
from chart import (
    CHART,
    EXAMPLES,
    SMALLEST,
    Manifest,
    cluster_spec,
    groups,
    one,
    pod_templates,
    ray_object,
    render,
    run_helm,
)
from ray_operator import quantity

SERVE = (
    *(
        "--set",
        "mode=RayService",
        "--set",
        "service.args.run=/runs/demo",
        "--set",
        "secrets.scoring.name=token",
    ),
    *("--set", "workers.cpu.replicas=1", "--set", "networkPolicy.operatorNamespace=operators"),
)
FULL = next(path for path in EXAMPLES if path.stem == "64-gpus")


@pytest.mark.parametrize(
    "arguments", [SMALLEST, SERVE, ("-f", str(FULL))], ids=["RayJob", "RayService", "64 GPUs"]
)
def test_pods_are_restricted(arguments: tuple[str, ...]) -> None:
    """The demands of the `restricted` Pod Security Standard, and a root file system that is read-only."""
    templates = list(pod_templates(render(*arguments)))
    assert {"head", "test"} <= {name for name, _ in templates}
    for name, template in templates:
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True, name
        assert spec["securityContext"]["runAsUser"] == 1000
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert spec["automountServiceAccountToken"] is False
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
        assert not any("hostPath" in volume for volume in spec["volumes"])
        for container in [*spec.get("initContainers", []), *spec["containers"]]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert {"requests", "limits"} <= set(container["resources"])
            written = {mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")}
            assert "/tmp" in written
            environment = {entry["name"]: entry.get("value", "") for entry in container["env"]}
            for variable in ("HOME", "HF_HOME", "TORCHINDUCTOR_CACHE_DIR", "VLLM_CACHE_ROOT"):
                where = environment.get(variable, "/tmp")
                assert any(where == path or where.startswith(path + "/") for path in written), variable


SECRETS = {
    "HF_TOKEN": {"name": "hf", "key": "token", "optional": True},  # open models need none
    "RLGAF_SCORE_TOKEN": {"name": "score", "key": "token"},
    "RLGAF_REWARD_TOKEN": {"name": "reward", "key": "token"},
    "WANDB_API_KEY": {"name": "wandb", "key": "token"},
    "AWS_ACCESS_KEY_ID": {"name": "s3", "key": "AWS_ACCESS_KEY_ID"},
    "AWS_SECRET_ACCESS_KEY": {"name": "s3", "key": "AWS_SECRET_ACCESS_KEY"},
}
HUB, STORE = ["HF_TOKEN"], ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"]


@pytest.mark.parametrize(
    ("arguments", "head", "worker"),
    [
        (SMALLEST, list(SECRETS), HUB),
        ((*SMALLEST, "--set", "mode=RayCluster"), list(SECRETS), HUB),
        (SERVE, [*HUB, "RLGAF_SCORE_TOKEN"], [*HUB, "RLGAF_SCORE_TOKEN"]),
    ],
    ids=["RayJob", "RayCluster", "RayService"],
)
def test_secrets_come_by_reference_to_those_who_use_them(
    arguments: tuple[str, ...], head: list[str], worker: list[str]
) -> None:
    """Every process with a model asks the hub; the rest is the driver's, or the served application's."""
    names = ("huggingFace=hf", "scoring=score", "reward=reward", "objectStore=s3", "wandb=wandb")
    words = [f"secrets.{word.replace('=', '.name=')}" for word in names]
    words += ["data.prepare={sh,-c,ls}", "data.waitFor={/data/a}"]
    manifests = render(*arguments, *(part for word in words for part in ("--set", word)))
    assert all(manifest["kind"] != "Secret" for manifest in manifests)
    given = {
        f"{name} {container['name']}": {
            entry["name"]: entry["valueFrom"]["secretKeyRef"]
            for entry in container["env"]
            if "valueFrom" in entry
        }
        for name, template in pod_templates(manifests)
        for container in [*template["spec"].get("initContainers", []), *template["spec"]["containers"]]
    }
    known = {"head ray-head": head, "head prepare-data": [*HUB, *STORE], "cpu ray-worker": worker}
    assert {place: found for place, found in given.items() if found} == {
        place: {name: SECRETS[name] for name in names} for place, names in known.items()
    }


def test_ray_asks_for_a_token() -> None:
    for arguments in (SMALLEST, SERVE):
        assert cluster_spec(render(*arguments))["authOptions"] == {"mode": "token"}


def test_own_pods_talk_on_all_ports_and_every_pod_is_covered() -> None:
    manifests = render(*SMALLEST)
    policy = one(manifests, "NetworkPolicy")["spec"]
    selector = policy["podSelector"]["matchLabels"]
    own = {"podSelector": {"matchLabels": selector}}
    assert {"from": [own]} in policy["ingress"], "a rule without ports admits all"
    assert {"to": [own]} in policy["egress"]
    assert {"port": 53, "protocol": "UDP"} in [
        port for rule in policy["egress"] for port in rule.get("ports", [])
    ]
    for name, template in pod_templates(manifests):
        assert selector.items() <= template["metadata"]["labels"].items(), name


@pytest.mark.parametrize(("mode", "of_head"), [("RayJob", "job-head"), ("RayCluster", "head")])
def test_a_stopped_run_has_time_for_its_checkpoint(mode: str, of_head: str) -> None:
    arguments = (*SMALLEST, "--set", f"mode={mode}")
    arguments = (*arguments, "--set", "stop.graceSeconds=1000", "--set", "stop.jobWaitSeconds=900")
    for name, group in groups(render(*arguments)):
        spec = group["template"]["spec"]
        assert spec["terminationGracePeriodSeconds"] == 1000
        (ray,) = spec["containers"]
        assert {"name": "RAY_JOB_STOP_WAIT_TIME_S", "value": "900"} in ray["env"]
        hook = ray["lifecycle"]["preStop"]["exec"]["command"]
        assert hook[1:] == ["/etc/rlgaf/scripts/pre_stop.py", of_head if name == "head" else "worker", "900"]


def test_data_is_prepared_once_and_waited_for_everywhere() -> None:
    kind = next(path for path in EXAMPLES if path.stem == "kind-cpu")
    steps = {
        name: [step["name"] for step in group["template"]["spec"]["initContainers"]]
        for name, group in groups(render("-f", str(kind)))
    }
    assert steps == {"head": ["prepare-data", "wait-for-data"], "cpu": ["wait-for-data"]}


def test_the_quickstart_fits_the_machine_it_names() -> None:
    """Requests of its pods, of kind's own (0.95 CPUs, 0.3 GiB) and of KubeRay (0.1 CPUs, 0.5 GiB)."""
    example = CHART / "examples" / "kind-cpu.yaml"
    named = re.match(r"# .* (\d+) CPUs, (\d+) GiB", example.read_text())
    assert named is not None
    cpus, memory = 0.95 + 0.1, 0.3 + 0.5
    for _, template in pod_templates(render("-f", str(example))):
        spec = template["spec"]
        asked = [container["resources"]["requests"] for container in spec["containers"]]
        first = [step["resources"]["requests"] for step in spec.get("initContainers", [])]
        cpus += max(sum(_cpus(a["cpu"]) for a in asked), *(_cpus(a["cpu"]) for a in first), 0)
        memory += (
            max(sum(quantity(a["memory"]) for a in asked), *(quantity(a["memory"]) for a in first), 0) / 2**30
        )
    assert 4 < cpus <= int(named[1])
    assert 14 < memory <= int(named[2])


def _cpus(text: str) -> float:
    return int(text.removesuffix("m")) / 1000 if text.endswith("m") else float(text)


@pytest.mark.parametrize("mode", ["RayJob", "RayCluster"])
def test_the_autoscaler_alone_gets_rights_and_every_driver_knows_of_it(mode: str) -> None:
    grows = ("autoscaling.enabled=true", "workers.cpu.maxReplicas=3", f"mode={mode}")
    manifests = render(*SMALLEST, *(word for value in grows for word in ("--set", value)))
    accounts = {
        name: (
            group["template"]["spec"]["serviceAccountName"],
            group["template"]["spec"]["automountServiceAccountToken"],
        )
        for name, group in groups(manifests)
    }
    assert accounts == {"head": ("demo-rlgaf-head", True), "cpu": ("demo-rlgaf", False)}
    spec = cluster_spec(manifests)
    assert spec["enableInTreeAutoscaling"] is True
    assert [(g["minReplicas"], g["maxReplicas"]) for g in spec["workerGroupSpecs"]] == [(1, 3)]
    # 3 pods of 8 CPUs at most: what a run may ask the autoscaler for, on whichever node its driver is.
    for _, group in groups(manifests):
        assert {"name": "RLGAF_AUTOSCALED", "value": "0 24 1800"} in group["template"]["spec"]["containers"][
            0
        ]["env"]
    assert all(manifest["kind"] not in ("Role", "ClusterRole", "RoleBinding") for manifest in manifests)


@pytest.mark.parametrize(
    ("scheduler", "labels"),
    [
        ("volcano", {"ray.io/scheduler-name": "volcano", "volcano.sh/queue-name": "q"}),
        ("yunikorn", {"ray.io/gang-scheduling-enabled": "true", "yunikorn.apache.org/queue": "q"}),
        ("kueue", {"kueue.x-k8s.io/queue-name": "q"}),
    ],
)
def test_gang_schedulers_are_told(scheduler: str, labels: dict[str, str]) -> None:
    values = ("--set", f"gangScheduling.scheduler={scheduler}", "--set", "gangScheduling.queue=q")
    assert labels.items() <= ray_object(render(*SMALLEST, *values))["metadata"]["labels"].items()


def test_operator_kinds_appear_where_the_operator_is() -> None:
    kinds = {"PodMonitor", "PrometheusRule"}
    assert kinds <= {manifest["kind"] for manifest in render(*SMALLEST)}
    without = {manifest["kind"] for manifest in render(*SMALLEST, apis=())}
    assert not kinds & without
    assert "PodDisruptionBudget" in without


def notes(*words: str) -> str:
    text = run_helm("install", "demo", str(CHART), "--dry-run=client", *SMALLEST, *words)
    return text.partition("NOTES:")[2]


def test_notes_say_which_attempts_are_not_repeated() -> None:
    assert "one whose head\nanswered nothing for 300 s is not." in notes()
    limited = notes("--set", "job.activeDeadlineSeconds=3600")
    assert "answered nothing for 300 s or whose job.activeDeadlineSeconds ran out is not." in limited


def test_notes_say_when_prometheus_is_kept_out() -> None:
    warning = "The network policy lets nobody read the metrics"
    assert warning in notes()
    for value in (
        "networkPolicy.monitoringNamespace=m",
        "networkPolicy.enabled=false",
        "monitoring.podMonitor.enabled=false",
    ):
        assert warning not in notes("--set", value)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_gpu_examples_let_kuberay_and_prometheus_in(example: Path) -> None:
    """KubeRay from its own namespace alone: whoever makes a pod elsewhere can label it as they like."""
    manifests = render("-f", str(example))
    if not any(int(group["rayStartParams"]["num-gpus"]) for _, group in groups(manifests)):
        return
    rules = one(manifests, "NetworkPolicy")["spec"]["ingress"]
    (metrics,) = (rule for rule in rules if rule.get("ports") == [{"port": 8080}])
    assert [set(peer) for peer in metrics["from"]] == [{"namespaceSelector"}]
    (operator,) = (rule for rule in rules if {"port": 8265} in rule.get("ports", []))
    assert operator["from"] == [
        {
            "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "kuberay-system"}},
            "podSelector": {"matchLabels": {"app.kubernetes.io/name": "kuberay-operator"}},
        }
    ]


@pytest.mark.parametrize("mode", ["RayCluster", "RayService"])
def test_each_cluster_has_its_own_state_in_redis(mode: str) -> None:
    """KubeRay names it after the cluster's UID; a RayService has two during an upgrade."""
    values = ("headFaultTolerance.enabled=true", "headFaultTolerance.redisAddress=redis:6379", f"mode={mode}")
    spec = cluster_spec(render(*SERVE, *(word for value in values for word in ("--set", value))))
    assert spec["gcsFaultToleranceOptions"] == {"redisAddress": "redis:6379"}


def test_a_service_says_what_it_serves() -> None:
    service = ray_object(render(*SERVE))["spec"]
    assert yaml.safe_load(service["serveConfigV2"]) == {
        "applications": [
            {
                "name": "rlgaf-scoring",
                "import_path": "services.serving:app",
                "route_prefix": "/",
                "args": {"run": "/runs/demo", "gpu": False},
            }
        ]
    }


def test_the_served_example_has_a_gpu_for_each_replica() -> None:
    manifests = render("-f", str(CHART / "examples" / "serve.yaml"))
    (application,) = yaml.safe_load(ray_object(manifests)["spec"]["serveConfigV2"])["applications"]
    gpus = [
        group.get("replicas", 1) * int(group["rayStartParams"]["num-gpus"]) for _, group in groups(manifests)
    ]
    assert application["args"] == {"run": "/runs/smollm2", "replicas": sum(gpus), "gpu": True}


def test_service_args_are_what_the_application_takes() -> None:
    from services.serving import Arguments

    given = yaml.safe_load((CHART / "values.yaml").read_text())["service"]["args"]
    assert set(given) == set(Arguments.model_fields)
    values = {"run": "/runs/demo", "model": "/runs/body", "replicas": 3, "cpus": 1.5, "gpu": True}
    assert set(values) == set(given)
    words = [
        word
        for name, value in values.items()
        for word in ("--set-json", f"service.args.{name}={json.dumps(value)}")
    ]
    service = ray_object(render(*SERVE, *words, "--set", "workers.cpu.gpus=3"))["spec"]
    (application,) = yaml.safe_load(service["serveConfigV2"])["applications"]
    assert application["args"] == values
    assert Arguments.model_validate(application["args"]).replicas == 3


def test_a_service_sends_requests_to_workers_with_a_serve_proxy_only() -> None:
    """KubeRay asks a head's proxy itself, and a worker's in a readiness probe of its own only."""

    def paths(manifests: list[Manifest]) -> dict[str, list[tuple[str, int]]]:
        ray = {name: group["template"]["spec"]["containers"][0] for name, group in groups(manifests)}
        kinds = ("startupProbe", "readinessProbe", "livenessProbe")
        asked = {name: [container[kind]["httpGet"] for kind in kinds] for name, container in ray.items()}
        return {name: [(get["path"], get["port"]) for get in gets] for name, gets in asked.items()}

    gcs, raylet, proxy = (
        ("/api/gcs_healthz", 8265),
        ("/api/local_raylet_healthz", 52365),
        ("/-/healthz", 8000),
    )
    assert paths(render(*SERVE)) == {"head": [gcs, gcs, gcs], "cpu": [raylet, proxy, raylet]}
    assert paths(render(*SMALLEST)) == {"head": [gcs, gcs, gcs], "cpu": [raylet, raylet, raylet]}


def test_the_entrypoint_knows_the_runs_folder_and_the_scoring_endpoint() -> None:
    http = (
        "--set",
        "scoring.http=true",
        "--set",
        "secrets.scoring.name=t",
        "--set",
        "run.overrides={--run.steps=7}",
        "--set",
        "storage.mirror.url=s3://bucket/runs?region=eu-west-1",
    )
    scripts = next(m for m in render(*SMALLEST, *http) if m["metadata"]["name"].endswith("-scripts"))
    assert json.loads(scripts["data"]["overrides.json"]) == [
        "--run.output=/runs",
        "--run.mirror=s3://bucket/runs?region=eu-west-1",
        "--discriminator.scoring.http=true",
        "--discriminator.scoring.http_host=0.0.0.0",
        "--discriminator.scoring.http_port=8000",
        "--run.steps=7",
    ]


def test_an_upgrade_and_its_rollback_keep_the_run() -> None:
    """Another image, TOML and size: the same objects, hence changed in place; the volume is never touched."""

    def kept(manifests: list[Manifest]) -> set[tuple[str, str]]:
        return {(m["kind"], m["metadata"]["name"]) for m in manifests}

    def claim(manifests: list[Manifest]) -> Manifest:
        return one(manifests, "PersistentVolumeClaim")

    first = render(*SMALLEST)
    changes = (
        "--set",
        "image.tag=v2",
        "--set",
        'run.config=[policy]\nmodel = "n"',
        "--set",
        "workers.cpu.replicas=2",
    )
    for after in (render(*SMALLEST, *changes), render(*SMALLEST, "--is-upgrade")):
        assert kept(after) == kept(first)
        assert claim(after) == claim(first)
    assert claim(first)["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
    again = render(*SMALLEST, "--set", "job.attempt=2")
    assert kept(again) ^ kept(first) == {("RayJob", "demo-rlgaf-1"), ("RayJob", "demo-rlgaf-2")}
    assert claim(again) == claim(first)
    for _, group in groups(again):
        volumes = {volume["name"]: volume for volume in group["template"]["spec"]["volumes"]}
        assert volumes["runs"]["persistentVolumeClaim"]["claimName"] == claim(first)["metadata"]["name"]


def test_names_stay_within_the_limits() -> None:
    manifests = render(*SMALLEST, release="a" * 53)
    assert len(ray_object(manifests)["metadata"]["name"]) <= 47
    assert all(len(manifest["metadata"]["name"]) <= 63 for manifest in manifests)


def test_the_chart_s_version_is_the_project_s() -> None:
    import tomllib

    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    project = tomllib.loads((CHART.parents[2] / "pyproject.toml").read_text())["project"]
    assert chart["appVersion"] == project["version"]
    pins = (CHART.parents[2] / "requirements" / "cpu.txt").read_text().split()
    assert f"ray=={yaml.safe_load((CHART / 'values.yaml').read_text())['rayVersion']}" in pins
