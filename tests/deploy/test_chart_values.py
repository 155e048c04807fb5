"""values.yaml, values.schema.json and README.md name the same values; wrong ones are refused with reasons."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from chart import CHART, SMALLEST, ChartError, render

SCHEMA = json.loads((CHART / "values.schema.json").read_text())
VALUES = yaml.safe_load((CHART / "values.yaml").read_text())


def leaves(schema: dict[str, Any], path: str = "") -> Iterator[tuple[str, str]]:
    """Dotted path and description of every value that is not a section."""
    for name, field in schema["properties"].items():
        if "properties" in field:
            yield from leaves(field, f"{path}{name}.")
        else:
            yield path + name, field["description"]


def value_at(path: str) -> Any:
    node = VALUES
    for name in path.split("."):
        node = node[name]
    return node


def table() -> str:
    """The table of README.md."""
    rows = ["| value | default | what |", "|---|---|---|"]
    for path, what in leaves(SCHEMA):
        if path != "global":
            rows.append(f"| `{path}` | `{json.dumps(value_at(path))}` | {what} |")
    return "\n".join(rows)


def test_readme_lists_every_value() -> None:
    assert table() in (CHART / "README.md").read_text()


def test_schema_and_values_name_the_same() -> None:
    def given(node: dict[str, Any], path: str = "") -> Iterator[str]:
        for name, value in node.items():
            known = any(leaf == path + name for leaf, _ in leaves(SCHEMA))
            yield from (
                [path + name] if known or not isinstance(value, dict) else given(value, f"{path}{name}.")
            )

    assert set(given(VALUES)) == {path for path, _ in leaves(SCHEMA)} - {"global"}


def test_every_value_is_described_and_unknown_ones_are_refused() -> None:
    def sections(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
        yield schema
        for field in schema.get("properties", {}).values():
            if "properties" in field:
                yield from sections(field)

    for section in [*sections(SCHEMA), SCHEMA["definitions"]["group"]]:
        assert section["additionalProperties"] is False
        assert all(field.get("description") for field in section["properties"].values())


def test_worker_groups_take_what_the_defaults_have() -> None:
    assert list(SCHEMA["definitions"]["group"]["properties"]) == list(VALUES["workerDefaults"])


def test_every_value_is_read_by_a_template() -> None:
    templates = "".join(path.read_text() for path in (CHART / "templates").rglob("*.*"))
    for path, _ in leaves(SCHEMA):
        if path != "global":
            assert f".{path.rsplit('.', 1)[-1]}" in templates or path.startswith("workers."), path


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("mode=Ray", "at '/mode': value must be one of 'RayJob', 'RayCluster', 'RayService'"),
        ("workers.rolout.replicas=2", "at '/workers': additional properties 'rolout' not allowed"),
        ("workers.learner.replica=2", "at '/workers/learner': additional properties 'replica' not allowed"),
        ("workers.learner.replicas=-1", "at '/workers/learner/replicas': minimum: got -1, want 0"),
        ("workers.cpu.gpus=many", "at '/workers/cpu/gpus': got string, want integer"),
        ("head.memory=lots", "at '/head/memory': 'lots' does not match pattern"),
        (
            "storage.runs.accessMode=RWX",
            "at '/storage/runs/accessMode': value must be one of 'ReadWriteMany'",
        ),
        ("run.overrides={steps=3}", "at '/run/overrides/0': 'steps=3' does not match pattern"),
        ("data.waitFor={assets}", "at '/data/waitFor/0': 'assets' does not match pattern"),
        ("service.args.gpus=1", "at '/service/args': additional properties 'gpus' not allowed"),
        ("service.args.run=runs/a", "at '/service/args/run': 'runs/a' does not match pattern"),
        ("secrets.scoring=token", "at '/secrets/scoring': got string, want object"),
        (
            "gangScheduling.scheduler=slurm",
            "at '/gangScheduling/scheduler': value must be one of 'none', 'volcano'",
        ),
        ("security.runAsUser=0", "at '/security/runAsUser': minimum: got 0, want 1"),
        ("image.pullPolicy=Sometimes", "at '/image/pullPolicy': value must be one of"),
    ],
)
def test_wrong_values_are_refused(wrong: str, message: str) -> None:
    with pytest.raises(ChartError) as refused:
        render(*SMALLEST, "--set", wrong)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("together", "message"),
    [
        (["run.config="], "run.config is empty: give the run's TOML"),
        (["run.existingConfigMap=mine"], "run.config and run.existingConfigMap are both set"),
        (["workers.cpu.replicas=0"], "the cluster has no Ray CPUs"),
        (["stop.jobWaitSeconds=700"], "stop.jobWaitSeconds = 700 must be below stop.graceSeconds = 660"),
        (
            ["headFaultTolerance.enabled=true"],
            "headFaultTolerance.enabled needs mode RayCluster or RayService",
        ),
        (["headFaultTolerance.enabled=true", "mode=RayCluster"], "needs headFaultTolerance.redisAddress"),
        (["scoring.http=true"], "scoring.http needs secrets.scoring.name"),
        (
            ["scoring.http=true", "secrets.scoring.name=t", "mode=RayCluster"],
            "set discriminator.scoring.http in the run you submit",
        ),
        (["mode=RayService"], "mode RayService needs service.args.run: the folder of the finished run"),
        (
            [
                "mode=RayService",
                "service.args.run=/runs/a",
                "service.args.gpu=true",
                "secrets.scoring.name=t",
            ],
            "service.args.gpu gives each replica a GPU, and no worker group has any",
        ),
        (["mode=RayService", "service.args.run=/runs/a"], "mode RayService needs secrets.scoring.name"),
        (["gangScheduling.queue=a"], "do nothing while gangScheduling.scheduler is none"),
        (["gangScheduling.scheduler=kueue"], "the name of a LocalQueue"),
        (
            [
                "gangScheduling.scheduler=kueue",
                "gangScheduling.queue=a",
                "job.deleteClusterWhenFinished=false",
            ],
            "Kueue refuses RayJobs that keep their cluster",
        ),
        (["gangScheduling.scheduler=volcano", "autoscaling.enabled=true"], "exclude each other"),
        (
            ["gangScheduling.scheduler=yunikorn", "gangScheduling.priorityClass=high"],
            "set head.priorityClassName and workerDefaults.priorityClassName",
        ),
        (
            ["mode=RayCluster", "run.config=", "storage.mirror.url=s3://bucket/runs"],
            "Set run.mirror and the other fields in the run you submit",
        ),
        (
            [
                "mode=RayService",
                "service.args.run=/runs/a",
                "secrets.scoring.name=t",
                "run.overrides={--run.steps=3}",
            ],
            "storage.mirror.url and run.overrides change the run that the chart brings",
        ),
        (
            ["storage.runs.accessMode=ReadWriteOncePod"],
            "storage.runs.accessMode = ReadWriteOncePod lets a single pod mount the volume",
        ),
        (
            ["storage.cache.enabled=true", "storage.cache.accessMode=ReadWriteOncePod"],
            "storage.cache.accessMode = ReadWriteOncePod lets a single pod mount the volume",
        ),
        (
            [
                "storage.runs.accessMode=ReadWriteOnce",
                "autoscaling.enabled=true",
                "workers.cpu.minReplicas=0",
            ],
            "the head would come first and bind the volume to a node of its own choice",
        ),
        (["networkPolicy.operatorNamespace="], "name the namespace of KubeRay's operator"),
        (["storage.mirror.url=s3://KEY:SECRET@bucket/runs"], "storage.mirror.url has a URL with credentials"),
        (["run.overrides={--run.mirror=s3://KEY@bucket}"], "run.overrides has a URL with credentials"),
        (
            ['run.config=[run]\nmirror = "https://user:secret@host/runs"'],
            "run.config has a URL with credentials",
        ),
        (["workers.cpu.gpuType=A100"], "workers.cpu: gpuType = A100 without gpus"),
        (
            ["autoscaling.enabled=true", "workers.cpu.minReplicas=3", "workers.cpu.maxReplicas=2"],
            "workers.cpu: minReplicas = 3 exceeds maxReplicas = 2",
        ),
    ],
)
def test_contradictions_are_refused(together: list[str], message: str) -> None:
    with pytest.raises(ChartError) as refused:
        render(*SMALLEST, *(word for value in together for word in ("--set", value)))
    assert message in str(refused.value)


@pytest.mark.parametrize(
    "together",
    [
        ["storage.cache.accessMode=ReadWriteOncePod"],
        ["workers.cpu.replicas=0", "head.rayCpus=2", "storage.runs.accessMode=ReadWriteOncePod"],
        [
            "storage.runs.accessMode=ReadWriteOnce",
            "autoscaling.enabled=true",
            "workers.cpu.minReplicas=0",
            "head.affinity.nodeAffinity.requiredDuringSchedulingIgnoredDuringExecution.nodeSelectorTerms=[]",
        ],
        ["mode=RayCluster", "storage.mirror.url=s3://bucket/runs", "run.overrides={--run.steps=3}"],
    ],
    ids=["no cache volume", "the head alone", "a head with a place", "a cluster with a run"],
)
def test_what_only_looks_contradictory_is_taken(together: list[str]) -> None:
    assert render(*SMALLEST, *(word for value in together for word in ("--set", value)))
