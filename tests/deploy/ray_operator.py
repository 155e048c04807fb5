"""Plays KubeRay for the RayJobs of one namespace: what its v1.7 operator does with a RayJob in K8sJobMode,
written after its sources (controllers/ray: rayjob_controller.go, common/pod.go, common/job.go).

A RayJob goes New → Initializing (a RayCluster: the head's service, the pods, with the `ray start` lines and
variables KubeRay gives them) → Running, once all pods are ready (a Job whose pod submits the entrypoint and
follows its log) → Complete or Failed; a failed one is tried again while `backoffLimit` allows. After
`ttlSecondsAfterFinished` the cluster goes. Deleting a RayJob stops its Ray job first. What an owner that is
gone leaves behind is deleted too, which on a cluster is the garbage collector's part.

Not played: autoscaling, other submission modes, fault tolerance, tokens, suspension, deadlines, RayService.
"""

import secrets
import time
from copy import deepcopy
from datetime import UTC, datetime

import requests
from api_server import CORE, RAY, ApiServer, Object

FINALIZER = "ray.io/rayjob-finalizer"
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
REQUEST_S = 30.0
SUFFIXES = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
WAIT_GCS = (
    "until ray health-check --address {address} >/dev/null 2>&1; do echo waiting for the GCS; sleep 5; done"
)
HEALTHY = (
    "python3 -c \"import urllib.request as u; u.urlopen('{url}/api/gcs_healthz', timeout=5)\" >/dev/null 2>&1"
)


class Operator:
    """`tick()` looks at every RayJob once and does what is due."""

    def __init__(self, server: ApiServer, namespace: str = "default") -> None:
        self.server, self.namespace = server, namespace
        self._jobs = f"{RAY}/namespaces/{namespace}/rayjobs"
        self._clusters = f"{RAY}/namespaces/{namespace}/rayclusters"
        self._core = f"{CORE}/namespaces/{namespace}"
        self._batch = f"/apis/batch/v1/namespaces/{namespace}/jobs"

    def tick(self) -> None:
        for job in self.server.items(self._jobs):
            if "deletionTimestamp" in job["metadata"]:
                self._delete(job)
            else:
                self._reconcile(job)
        self._collect_garbage()

    def _reconcile(self, job: Object) -> None:
        name, status = job["metadata"]["name"], job.get("status", {})
        state = status.get("jobDeploymentStatus", "")
        if state == "":
            finalizers = [*job["metadata"].get("finalizers", []), FINALIZER]
            self.server.patch(f"{self._jobs}/{name}", {"metadata": {"finalizers": finalizers}})
            names = {key: f"{name}-{secrets.token_hex(3)[:5]}" for key in ("jobId", "rayClusterName")}
            self._status(name, names | {"jobDeploymentStatus": "Initializing", "startTime": now()})
        elif state == "Initializing":
            self._initialize(job)
        elif state == "Running":
            self._follow(job)
        elif state == "Retrying":
            if self._gone(job):
                fresh = {"jobId": None, "rayClusterName": None, "dashboardURL": None, "jobStatus": None}
                self._status(name, fresh | {"jobDeploymentStatus": ""})
        elif state in ("Complete", "Failed") and job["spec"].get("shutdownAfterJobFinishes"):
            ended = datetime.fromisoformat(status["endTime"]).timestamp()
            if time.time() >= ended + job["spec"].get("ttlSecondsAfterFinished", 0):
                self.server.delete(f"{self._clusters}/{status['rayClusterName']}")

    def _initialize(self, job: Object) -> None:
        """The cluster, and the submitter once the cluster is ready."""
        name, cluster_name = job["metadata"]["name"], job["status"]["rayClusterName"]
        cluster = self.server.find(f"{self._clusters}/{cluster_name}")
        if cluster is None:
            labels = job["metadata"].get("labels", {}) | {"ray.io/originated-from-cr-name": name}
            spec = job["spec"]["rayClusterSpec"]
            cluster = self._create("RayCluster", self._clusters, cluster_name, job, spec, {"labels": labels})
        pods = self._pods(cluster)
        if not all(_ready(pod) for pod in pods):
            return
        workers = len(pods) - 1
        counts = {
            "desiredWorkerReplicas": workers,
            "readyWorkerReplicas": workers,
            "availableWorkerReplicas": workers,
        }
        state = {"state": "ready", "lastUpdateTime": now()} | counts
        self.server.patch(f"{self._clusters}/{cluster_name}/status", {"status": state})
        dashboard = f"{_head_service(cluster_name)}.{self.namespace}.svc.cluster.local:8265"
        self._submit(job, f"http://{dashboard}")
        running = {"jobDeploymentStatus": "Running", "dashboardURL": dashboard, "rayClusterStatus": state}
        self._status(name, running)

    def _follow(self, job: Object) -> None:
        """Copy the Ray job's state; the RayJob ends when both it and the submitter have ended."""
        name, status = job["metadata"]["name"], job["status"]
        answer = self._dashboard(job, "GET")
        submitter = self.server.find(f"{self._core}/pods/{name}")
        phase = submitter["status"]["phase"] if submitter else "Failed"
        if answer is None:
            if phase in ("Succeeded", "Failed"):
                self._finish(job, "Failed", {"reason": "SubmissionFailed"})
            return
        state = {"jobStatus": answer["status"], "message": answer.get("message") or ""}
        if answer["status"] in ENDED and phase in ("Succeeded", "Failed"):
            failed = answer["status"] == "FAILED"
            self._finish(
                job, "Failed" if failed else "Complete", state | ({"reason": "AppFailed"} if failed else {})
            )
        elif status.get("jobStatus") != answer["status"]:
            self._status(name, state)

    def _finish(self, job: Object, state: str, status: Object) -> None:
        counted = "failed" if state == "Failed" else "succeeded"
        count = job["status"].get(counted, 0) + 1
        if state == "Failed" and count <= job["spec"].get("backoffLimit", 0):
            state = "Retrying"
        ended = {"jobDeploymentStatus": state, counted: count, "endTime": now()}
        self._status(job["metadata"]["name"], status | ended)

    def _gone(self, job: Object) -> bool:
        """Delete cluster and submitter; whether both, with their pods, are gone."""
        name, cluster = job["metadata"]["name"], job["status"]["rayClusterName"]
        paths = [f"{self._clusters}/{cluster}", f"{self._batch}/{name}", f"{self._core}/pods/{name}"]
        for path in paths:
            self.server.delete(path)
        left = [pod for pod in self.server.items(f"{self._core}/pods") if _cluster_of(pod) == cluster]
        return not left and all(self.server.find(path) is None for path in paths)

    def _delete(self, job: Object) -> None:
        """Stop the Ray job and let go of the object, whether or not the head answers."""
        if job.get("status", {}).get("jobStatus") not in ENDED:
            self._dashboard(job, "POST", "/stop")
        left = [entry for entry in job["metadata"].get("finalizers", []) if entry != FINALIZER]
        self.server.patch(f"{self._jobs}/{job['metadata']['name']}", {"metadata": {"finalizers": left}})

    def _collect_garbage(self) -> None:
        """Delete what belongs to an object that is gone."""
        there: set[str] = {job["metadata"]["uid"] for job in self.server.items(self._jobs)}
        for path in (self._clusters, self._batch, f"{self._core}/services", f"{self._core}/pods"):
            for found in self.server.items(path):
                there.add(found["metadata"]["uid"])
                owners = found["metadata"].get("ownerReferences", [])
                if owners and owners[0]["uid"] not in there and "deletionTimestamp" not in found["metadata"]:
                    self.server.delete(f"{path}/{found['metadata']['name']}")
                    there.discard(found["metadata"]["uid"])

    def _dashboard(self, job: Object, method: str, what: str = "") -> Object | None:
        """The Ray job in the head's job API; None when there is no head or no such job."""
        status = job.get("status", {})
        cluster, submission = status.get("rayClusterName"), status.get("jobId")
        heads = [
            pod
            for pod in self.server.items(f"{self._core}/pods")
            if _cluster_of(pod) == cluster and pod["metadata"]["labels"]["ray.io/node-type"] == "head"
        ]
        if not heads or not heads[0]["status"].get("podIP"):
            return None
        url = f"http://{heads[0]['status']['podIP']}:8265/api/jobs/{submission}{what}"
        try:
            answer = requests.request(method, url, timeout=REQUEST_S)
        except requests.RequestException:
            return None
        return answer.json() if answer.ok else None

    def _pods(self, cluster: Object) -> list[Object]:
        """Head and workers of a cluster; made, with the head's service, where they are not there."""
        name, spec = cluster["metadata"]["name"], cluster["spec"]
        if (
            spec.get("enableInTreeAutoscaling")
            or spec.get("gcsFaultToleranceOptions")
            or spec.get("authOptions")
        ):
            raise ValueError("autoscaling, fault tolerance and tokens are not played here")
        found = [pod for pod in self.server.items(f"{self._core}/pods") if _cluster_of(pod) == name]
        if found:
            return found
        head = f"{name}-head"
        ports = [{"name": "dashboard", "port": 8265}, {"name": "gcs-server", "port": 6379}]
        selector = {"ray.io/cluster": name, "ray.io/node-type": "head"}
        service = _head_service(name)
        behind = {"selector": selector, "ports": ports, "clusterIP": "None"}
        self._create("Service", f"{self._core}/services", service, cluster, behind)
        address = f"{service}.{self.namespace}.svc.cluster.local"
        made = [self._ray_pod(cluster, head, "head", "headgroup", spec["headGroupSpec"], address)]
        for group in spec.get("workerGroupSpecs", []):
            for number in range(group["replicas"]):
                pod = f"{name}-{group['groupName']}-{number}"
                made.append(self._ray_pod(cluster, pod, "worker", group["groupName"], group, address))
        return made

    def _ray_pod(self, cluster: Object, name: str, role: str, group: str, spec: Object, head: str) -> Object:
        template = deepcopy(spec["template"])
        container = template["spec"]["containers"][0]
        line = ray_start(role, spec.get("rayStartParams", {}), container["resources"]["limits"], head)
        found_by_name = [variable("FQ_RAY_IP", head), variable("RAY_IP", head.partition(".")[0])]
        inits = template["spec"].setdefault("initContainers", [])
        if role == "worker":
            waiting = {
                key: container[key]
                for key in ("image", "securityContext", "volumeMounts")
                if key in container
            }
            words = ["/bin/bash", "-c", "--", WAIT_GCS.format(address=f"{head}:6379")]
            waiting |= {"name": "wait-gcs-ready", "command": words, "env": list(container.get("env", []))}
            inits.append(deepcopy(waiting))
        for init in inits:
            init["env"] = [*init.get("env", []), *found_by_name]
        container["command"] = ["/bin/bash", "-c", "--"]
        container["args"] = [f"ulimit -n 65536; {line}"]
        host = "127.0.0.1" if role == "head" else head
        container["env"] = [
            *container.get("env", []),
            *(found_by_name if role == "worker" else []),
            field_of("RAY_CLUSTER_NAME", "metadata.labels['ray.io/cluster']"),
            field_of("RAY_CLOUD_INSTANCE_ID", "metadata.name"),
            field_of("RAY_NODE_TYPE_NAME", "metadata.labels['ray.io/group']"),
            variable("KUBERAY_GEN_RAY_START_CMD", line),
            variable("RAY_PORT", "6379"),
            variable("RAY_ADDRESS", f"{host}:6379"),
            variable("RAY_USAGE_STATS_KUBERAY_IN_USE", "1"),
            variable("RAY_DASHBOARD_ENABLE_K8S_DISK_USAGE", "1"),
        ]
        labels = {"app.kubernetes.io/name": "kuberay", "app.kubernetes.io/created-by": "kuberay-operator"}
        labels |= {"ray.io/is-ray-node": "yes"} | template.get("metadata", {}).get("labels", {})
        labels |= {
            "ray.io/cluster": cluster["metadata"]["name"],
            "ray.io/node-type": role,
            "ray.io/group": group,
        }
        about = {"labels": labels, "annotations": template.get("metadata", {}).get("annotations", {})}
        return self._create("Pod", f"{self._core}/pods", name, cluster, template["spec"], about)

    def _submit(self, job: Object, address: str) -> None:
        """The Kubernetes Job of the submitter, and its pod, which a job controller would make."""
        name, spec = job["metadata"]["name"], job["spec"]
        if spec["submissionMode"] != "K8sJobMode":
            raise ValueError(f"{spec['submissionMode']} is not played here")
        template = deepcopy(spec["submitterPodTemplate"])
        container = template["spec"]["containers"][0]
        submission = job["status"]["jobId"]
        if not container.get("command"):
            container["command"] = ["/bin/bash", "-ce", "--"]
            container["args"] = [submit_script(address, submission, spec["entrypoint"])]
        container["env"] = [
            *container.get("env", []),
            variable("PYTHONUNBUFFERED", "1"),
            variable("RAY_DASHBOARD_ADDRESS", job["status"].get("dashboardURL") or address),
            variable("RAY_JOB_SUBMISSION_ID", submission),
        ]
        made = self._create("Job", self._batch, name, job, {"backoffLimit": 2, "template": template})
        owner = {"apiVersion": "batch/v1", "kind": "Job"} | made
        pod = owner["spec"]["template"]
        labels = pod["metadata"]["labels"] | {"batch.kubernetes.io/job-name": name}
        self._create("Pod", f"{self._core}/pods", name, owner, pod["spec"], {"labels": labels})

    def _create(
        self, kind: str, path: str, name: str, owner: Object, spec: Object, about: Object | None = None
    ) -> Object:
        """Make an object that `owner` owns; `about`: labels and annotations."""
        reference = {key: owner[key] for key in ("apiVersion", "kind")}
        reference |= {key: owner["metadata"][key] for key in ("name", "uid")} | {"controller": True}
        metadata = {"name": name, "ownerReferences": [reference]} | (about or {})
        version = {"Pod": "v1", "Service": "v1", "Job": "batch/v1", "RayCluster": "ray.io/v1"}[kind]
        body = {"apiVersion": version, "kind": kind, "metadata": metadata, "spec": spec}
        return self.server.ask("POST", path, body)

    def _status(self, name: str, status: Object) -> None:
        self.server.patch(f"{self._jobs}/{name}/status", {"status": status})


def ray_start(role: str, given: dict[str, str], limits: dict[str, str], head: str) -> str:
    """The `ray start` line of a pod: the group's parameters and what KubeRay adds, options by name."""
    parameters = {
        "metrics-export-port": "8080",
        "dashboard-agent-listen-port": "52365",
        **({"dashboard-host": "0.0.0.0"} if role == "head" else {"address": f"{head}:6379"}),
        "memory": str(quantity(limits["memory"])),
        "num-cpus": limits["cpu"],
        **given,
        "block": "true",
    }
    options = []
    for name, value in sorted(parameters.items()):
        if value.lower() not in ("true", "false") or name in ("log-color", "include-dashboard"):
            options.append(f"--{name}={value}")
        elif value.lower() == "true":
            options.append(f"--{name}")
    return f"ray start {'--head ' if role == 'head' else ''}{' '.join(options)}"


def submit_script(address: str, submission: str, entrypoint: str) -> str:
    """Submits once, however often it runs, and follows the log."""
    where = f"--address {address}"
    return (
        f"until {HEALTHY.format(url=address)} ; do echo waiting for the dashboard ; sleep 2 ; done ; "
        f"if ! ray job status {where} {submission} >/dev/null 2>&1 ; "
        f"then ray job submit {where} --no-wait --submission-id {submission} -- {entrypoint} ; fi ; "
        f"ray job logs {where} --follow {submission}"
    )


def quantity(text: str) -> int:
    """A Kubernetes quantity of bytes."""
    for suffix, factor in SUFFIXES.items():
        if text.endswith(suffix):
            return int(float(text.removesuffix(suffix)) * factor)
    return int(text)


def variable(name: str, value: str) -> Object:
    return {"name": name, "value": value}


def field_of(name: str, path: str) -> Object:
    return {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}}


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _head_service(cluster: str) -> str:
    return f"{cluster}-head-svc"


def _cluster_of(pod: Object) -> str | None:
    return pod["metadata"].get("labels", {}).get("ray.io/cluster")


def _ready(pod: Object) -> bool:
    conditions = pod["status"].get("conditions", [])
    return any(entry["type"] == "Ready" and entry["status"] == "True" for entry in conditions)
