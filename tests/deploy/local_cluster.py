"""An API server with KubeRay's CRDs, this folder's operator and kubelet beside it, and helm on it."""

import contextlib
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pods
from api_server import CORE, RAY, ApiServer, Object, api_server, tail, wait
from fetched_tools import helm, kuberay_crds
from kubelet import Kubelet
from ray_operator import Operator

TICK_S = 0.5
HELM_S = 300.0
STOP_S = 60.0
NAMESPACE = "default"


@dataclass
class LocalCluster:
    """A running cluster. Operator and kubelet tick in a thread; what they raise, `wait` and `stop` raise."""

    server: ApiServer
    kubelet: Kubelet
    operator: Operator
    _stop: threading.Event = field(default_factory=threading.Event)
    _error: Exception | None = None

    def run(self) -> None:
        """The thread's loop."""
        try:
            while not self._stop.wait(TICK_S):
                self.operator.tick()
                self.kubelet.tick()
        except Exception as error:  # handed to the test, which looks at it at its next wait
            self._error = error

    def stop(self) -> None:
        self._stop.set()

    def check(self) -> None:
        """Raise what ended the loop."""
        if self._error is not None:
            raise self._error

    def wait(self, condition: Callable[[], bool], seconds: float, message: str) -> None:
        """Wait for a condition; TimeoutError with the state and the logs of all pods."""

        def holds() -> bool:
            self.check()
            return condition()

        wait(holds, seconds, message, words=self.words)

    def words(self) -> str:
        """State of the RayJobs, and the last words of every container."""
        jobs = [f"{job['metadata']['name']}: {job.get('status')}" for job in self.rayjobs()]
        logs = sorted((self.kubelet.folder / "pods").glob("*/*.log"))
        return "\n".join([*jobs, *(f"--- {log.parent.name} {log.stem}\n{tail(log, 12)}" for log in logs)])

    def rayjobs(self) -> list[Object]:
        return self.server.items(f"{RAY}/namespaces/{NAMESPACE}/rayjobs")

    def rayjob(self, name: str) -> Object | None:
        return self.server.find(f"{RAY}/namespaces/{NAMESPACE}/rayjobs/{name}")

    def status(self, name: str) -> Object:
        """Status of a RayJob; empty before there is one."""
        job = self.rayjob(name)
        return job.get("status", {}) if job else {}

    def core(self, kind: str) -> list[Object]:
        """Objects of a core kind, as in pods."""
        return self.server.items(f"{CORE}/namespaces/{NAMESPACE}/{kind}")

    def helm(self, *words: str) -> str:
        """Output of a helm command on this cluster; RuntimeError with helm's words when it fails."""
        homes = {
            f"HELM_{name}_HOME": str(self.server.folder / "helm" / name)
            for name in ("CACHE", "CONFIG", "DATA")
        }
        done = subprocess.run(
            [helm(), *words, "--namespace", NAMESPACE],
            env=os.environ | homes | {"KUBECONFIG": str(self.server.kubeconfig)},
            capture_output=True,
            text=True,
            timeout=HELM_S,
            check=False,
        )
        self.check()
        if done.returncode != 0:
            raise RuntimeError(f"helm {words[0]}: {done.stdout}{done.stderr}\n{self.words()}")
        return done.stdout


@contextlib.contextmanager
def local_cluster(folder: Path) -> Iterator[LocalCluster]:
    """A cluster whose files lie in `folder`; everything it started has ended when the block ends."""
    pods.needed()
    crds = kuberay_crds()
    helm()
    control = folder / "control"
    control.mkdir()
    with api_server(control) as server:
        server.install(crds)
        kubelet = Kubelet(server, folder, NAMESPACE)
        cluster = LocalCluster(server, kubelet, Operator(server, NAMESPACE))
        thread = threading.Thread(target=cluster.run, name="operator and kubelet")
        thread.start()
        try:
            yield cluster
        finally:
            cluster.stop()
            thread.join(STOP_S)
            kubelet.close()
        cluster.check()
