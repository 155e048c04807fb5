"""Runs the pods of one namespace of an API server on this machine (pods.py), as a kubelet would, and
reports them.

Every pod goes Pending → init containers one after the other → Running → Succeeded or Failed with its first
container. It is ready once each of its probes has answered. A deleted pod gets its preStop hook, SIGTERM,
and SIGKILL at the end of its grace period, in that order; then it is gone from the server. A container that
ended is not started again.

Volumes: emptyDir, ConfigMap, Secret, projected, and PersistentVolumeClaim, which is a folder named after
the claim. Variables: values, `$(NAME)`, fields of the pod, ConfigMap and Secret keys. What is not supported
raises.
"""

import base64
import os
import re
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests
from api_server import CORE, ApiError, ApiServer, Object
from pods import Container, Mount, Network, Process, Sandbox

PROBE_S = 5.0
FIELDS: dict[str, Callable[[Object, str], str]] = {
    "metadata.name": lambda pod, _: pod["metadata"]["name"],
    "metadata.namespace": lambda pod, _: pod["metadata"]["namespace"],
    "status.podIP": lambda _, address: address,
}


@dataclass
class End:
    """How a deleted pod ended, for tests."""

    hook_code: int | None = None
    hook_seconds: float = 0.0
    hook_log: Path | None = None
    killed: bool = False


@dataclass
class Running:
    """A pod on this machine."""

    pod: Object
    sandbox: Sandbox
    volumes: dict[str, Mount]
    waiting: list[Object]
    """Containers that have not been started: init containers, then the pod's own together."""
    inits: int
    processes: list[Process] = field(default_factory=list)
    answered: set[str] = field(default_factory=set)
    reported: Object = field(default_factory=dict)
    end: End | None = None
    hook: Process | None = None
    since: float = 0.0
    terminated: bool = False

    @property
    def main(self) -> Process | None:
        return self.processes[self.inits] if len(self.processes) > self.inits else None

    @property
    def logs(self) -> list[Path]:
        return sorted(self.sandbox.folder.glob("*.log"))


class Kubelet:
    """`tick()` moves every pod on by what is due; nothing in it waits."""

    def __init__(self, server: ApiServer, folder: Path, namespace: str = "default") -> None:
        self.server, self.folder, self.namespace = server, folder, namespace
        self.pods: dict[str, Running] = {}
        self.ends: dict[str, End] = {}
        self.network = Network()
        self._path = f"{CORE}/namespaces/{namespace}"

    def claim(self, name: str) -> Path:
        """Folder of a PersistentVolumeClaim."""
        return self.folder / "claims" / name

    def close(self) -> None:
        """End all pods at once."""
        for running in self.pods.values():
            running.sandbox.remove()
        self.pods.clear()
        self.network.close()

    def tick(self) -> None:
        pods = {pod["metadata"]["name"]: pod for pod in self.server.items(f"{self._path}/pods")}
        for name, pod in pods.items():
            if (
                name not in self.pods
                and "deletionTimestamp" not in pod["metadata"]
                and _phase(pod) == "Pending"
            ):
                self.pods[name] = self._admit(pod)
        self._publish_names()
        for name, running in list(self.pods.items()):
            pod = pods.get(name)
            if pod is None or "deletionTimestamp" in pod["metadata"] or running.end is not None:
                self._end(name, running)
            else:
                self._advance(name, running)

    def _admit(self, pod: Object) -> Running:
        name, spec = pod["metadata"]["name"], pod["spec"]
        # A pod without a node would be deleted without its grace period.
        target = {"apiVersion": "v1", "kind": "Node", "name": "this-machine"}
        binding = {"apiVersion": "v1", "kind": "Binding", "metadata": {"name": name}, "target": target}
        self.server.ask("POST", f"{self._path}/pods/{name}/binding", binding)
        folder = self.folder / "pods" / name
        sandbox = Sandbox(name, folder, self.network)
        volumes = {volume["name"]: self._volume(volume, folder, spec) for volume in spec.get("volumes", [])}
        inits = spec.get("initContainers", [])
        return Running(pod, sandbox, volumes, [*inits, *spec["containers"]], len(inits))

    def _publish_names(self) -> None:
        """Each pod's name and each service's, with the addresses behind it, into the pods' /etc/hosts."""
        lines = [f"{running.sandbox.address} {name}" for name, running in self.pods.items()]
        for service in self.server.items(f"{self._path}/services"):
            name, wanted = service["metadata"]["name"], service["spec"].get("selector") or {}
            full = f"{name}.{self.namespace}.svc"
            for running in self.pods.values():
                labels = running.pod["metadata"].get("labels", {})
                if wanted and wanted.items() <= labels.items():
                    address = running.sandbox.address
                    lines.append(f"{address} {full}.cluster.local {full} {name}.{self.namespace} {name}")
        for running in self.pods.values():
            running.sandbox.hosts("\n".join(lines) + "\n")

    def _advance(self, name: str, running: Running) -> None:
        codes = [process.code for process in running.processes]
        failed_init = any(code not in (None, 0) for code in codes[: running.inits])
        if running.waiting and not failed_init and all(code == 0 for code in codes):
            due = 1 if len(codes) < running.inits else len(running.waiting)
            for container in running.waiting[:due]:
                running.processes.append(running.sandbox.start(self._container(container, running)))
            del running.waiting[:due]
        main = running.main
        if main is None:
            phase = "Failed" if failed_init else "Pending"
        elif main.code is None:
            phase = "Running"
        else:
            phase = "Succeeded" if main.code == 0 else "Failed"
        ready = phase == "Running" and self._answers(running)
        self._report(name, running, phase, ready)

    def _answers(self, running: Running) -> bool:
        """Whether each probe of the first container has answered once."""
        probes = running.pod["spec"]["containers"][0]
        for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
            if kind not in probes or kind in running.answered:
                continue
            get = probes[kind]["httpGet"]
            url = f"http://{running.sandbox.address}:{get['port']}{get['path']}"
            try:
                if requests.get(url, timeout=PROBE_S).ok:
                    running.answered.add(kind)
            except requests.RequestException:
                pass  # not yet: the cluster's deadline says when that is too late
        return all(
            kind in running.answered
            for kind in ("startupProbe", "readinessProbe", "livenessProbe")
            if kind in probes
        )

    def _report(self, name: str, running: Running, phase: str, ready: bool) -> None:
        conditions = [
            {"type": "PodScheduled", "status": "True"},
            {"type": "Ready", "status": "True" if ready else "False"},
        ]
        status = {"phase": phase, "podIP": running.sandbox.address, "conditions": conditions}
        if status != running.reported:
            try:
                self.server.patch(f"{self._path}/pods/{name}/status", {"status": status})
            except ApiError as error:
                if error.status != 404:  # deleted since the list was read; the next one tells
                    raise
            running.reported = status

    def _end(self, name: str, running: Running) -> None:
        """One step of a pod's end: hook, SIGTERM, SIGKILL, gone."""
        grace = running.pod["spec"].get("terminationGracePeriodSeconds", 30)
        main = running.main
        if running.end is None:
            running.end, running.since = End(), time.monotonic()
            hook = running.pod["spec"]["containers"][0].get("lifecycle", {}).get("preStop")
            if hook and main is not None and main.code is None:
                running.hook = running.sandbox.execute(main, hook["exec"]["command"], "pre-stop")
                running.end.hook_log = running.hook.log
        spent = time.monotonic() - running.since
        if running.hook is not None and running.end.hook_code is None:
            running.end.hook_code = running.hook.code
            running.end.hook_seconds = spent
            if running.end.hook_code is None and spent < grace:
                return
        alive = [process for process in running.processes if process.code is None]
        if not running.terminated:
            running.terminated = True
            for process in alive:
                process.signal(signal.SIGTERM)
        elif not alive or spent >= grace:
            running.end.killed = bool(alive)
            running.sandbox.remove()
            self.server.delete(f"{self._path}/pods/{name}", gracePeriodSeconds=0)
            self.ends[name] = running.end
            del self.pods[name]

    def _container(self, container: Object, running: Running) -> Container:
        pod_security = running.pod["spec"].get("securityContext", {})
        security = pod_security | container.get("securityContext", {})
        env = self._variables(container, running)
        mounts = []
        for mount in container.get("volumeMounts", []):
            volume = running.volumes[mount["name"]]
            read_only = mount.get("readOnly", False)
            mounts.append(Mount(mount["mountPath"], volume.source, read_only, volume.size))
        return Container(
            name=container["name"],
            words=[expand(word, env) for word in (*container.get("command", []), *container.get("args", []))],
            env=env,
            folder=container.get("workingDir", "/"),
            mounts=mounts,
            user=security["runAsUser"],
            group=security["runAsGroup"],
            read_only_root=security.get("readOnlyRootFilesystem", False),
        )

    def _variables(self, container: Object, running: Running) -> dict[str, str]:
        env: dict[str, str] = {}
        for entry in container.get("env", []):
            source = entry.get("valueFrom")
            if source is None:
                env[entry["name"]] = expand(entry.get("value", ""), env)
            elif "fieldRef" in source:
                env[entry["name"]] = _field(running, source["fieldRef"]["fieldPath"])
            else:
                ((kind, reference),) = source.items()
                data = self._data(kind.removesuffix("KeyRef"), reference["name"])
                env[entry["name"]] = data[reference["key"]].decode()
        return env

    def _volume(self, volume: Object, folder: Path, spec: Object) -> Mount:
        """The volume as a folder that belongs to the pod's fsGroup; one in memory has none."""
        ((kind, source),) = ((key, value) for key, value in volume.items() if key != "name")
        group = spec.get("securityContext", {}).get("fsGroup", 0)
        path = folder / "volumes" / volume["name"]
        if kind == "emptyDir":
            if source.get("medium") == "Memory":
                return Mount("", None, size=source["sizeLimit"].removesuffix("i").lower())
            path.mkdir(parents=True)
            path.chmod(0o777)
        elif kind == "persistentVolumeClaim":
            self.server.ask("GET", f"{self._path}/persistentvolumeclaims/{source['claimName']}")
            path = self.claim(source["claimName"])
            path.mkdir(parents=True, exist_ok=True)
            if path.stat().st_gid != group:
                for entry in (path, *path.rglob("*")):
                    os.chown(entry, -1, group)
                    entry.chmod(entry.stat().st_mode | (0o2070 if entry.is_dir() else 0o060))
        else:
            path.mkdir(parents=True)
            parts = source["sources"] if kind == "projected" else [{kind: source}]
            for part in parts:
                ((what, one),) = part.items()
                data = self._data(what, one.get("name") or one["secretName"])
                names = {item["key"]: item["path"] for item in one.get("items", [])} or {
                    key: key for key in data
                }
                for key, name in names.items():
                    (path / name).write_bytes(data[key])
        return Mount("", path)

    def _data(self, kind: str, name: str) -> dict[str, bytes]:
        """Contents of a ConfigMap or Secret."""
        kinds = {"configMap": "configmaps", "secret": "secrets"}
        if kind not in kinds:
            raise ValueError(f"{kind} {name}: this kubelet has ConfigMaps and Secrets only")
        data = self.server.ask("GET", f"{self._path}/{kinds[kind]}/{name}").get("data", {})
        return {
            key: base64.b64decode(value) if kind == "secret" else value.encode()
            for key, value in data.items()
        }


def expand(text: str, env: dict[str, str]) -> str:
    """`$(NAME)` replaced by the variable's value; `$$` is a dollar, an unknown name stays as it is."""

    def value(match: re.Match[str]) -> str:
        if match[0] == "$$":
            return "$"
        return env.get(match[1], match[0])

    return re.sub(r"\$\$|\$\(([A-Za-z_][\w.-]*)\)", value, text)


def _field(running: Running, path: str) -> str:
    if label := re.fullmatch(r"metadata\.labels\['(.*)'\]", path):
        return running.pod["metadata"]["labels"][label[1]]
    if path not in FIELDS:
        raise ValueError(f"field {path}: this kubelet knows {', '.join(FIELDS)} and labels")
    return FIELDS[path](running.pod, running.sandbox.address)


def _phase(pod: Object) -> Any:
    return pod.get("status", {}).get("phase", "Pending")
