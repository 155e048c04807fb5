"""A real Kubernetes API server on this machine: etcd and kube-apiserver, no controllers, scheduler or
kubelet.

What the server does by itself holds: validation, defaulting, pruning, admission, watches, finalizers. What
controllers do (garbage collection, volumes, jobs) does not happen unless a test does it.
`RLGAF_TEST_API_SERVER` names the folder with the two binaries; build_api_server.sh makes one.
"""

import contextlib
import os
import secrets
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml
from free_ports import free_ports

START_S = 120.0
STOP_S = 30.0
REQUEST_S = 30.0
CORE = "/api/v1"
RAY = "/apis/ray.io/v1"
MERGE = "application/merge-patch+json"

Object = dict[str, Any]


class ApiError(RuntimeError):
    """A request that the server refused: its HTTP status and its words."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{status}: {message}")
        self.status = status


def binaries() -> Path:
    """Folder with `etcd` and `kube-apiserver`; skips the test where the environment names none."""
    named = os.environ.get("RLGAF_TEST_API_SERVER")
    if not named:
        pytest.skip(
            "RLGAF_TEST_API_SERVER names no folder with etcd and kube-apiserver (build_api_server.sh)"
        )
    missing = [name for name in ("etcd", "kube-apiserver") if not os.access(Path(named) / name, os.X_OK)]
    if missing:
        pytest.fail(f"RLGAF_TEST_API_SERVER = {named} has no {' and no '.join(missing)}")
    return Path(named)


@dataclass
class ApiServer:
    """A running server. Paths are those of the API, as in `/api/v1/namespaces/default/pods`."""

    folder: Path
    address: str
    token: str
    session: requests.Session = field(default_factory=requests.Session)

    @property
    def kubeconfig(self) -> Path:
        return self.folder / "kubeconfig"

    def ask(
        self, method: str, path: str, body: Object | None = None, *, kind: str = "application/json"
    ) -> Object:
        """One request; raises ApiError for what the server refuses."""
        answer = self.session.request(
            method,
            self.address + path,
            json=body,
            headers={"Authorization": f"Bearer {self.token}", "Content-Type": kind},
            verify=str(self.folder / "apiserver.crt"),
            timeout=REQUEST_S,
        )
        if not answer.ok:
            raise ApiError(answer.status_code, answer.text[:2000])
        return answer.json()

    def items(self, path: str) -> list[Object]:
        """All objects of a list."""
        return self.ask("GET", path)["items"]

    def find(self, path: str) -> Object | None:
        """The object, or None."""
        try:
            return self.ask("GET", path)
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    def patch(self, path: str, body: Object) -> Object:
        """Merge into an object, or into its status where the path ends so."""
        return self.ask("PATCH", path, body, kind=MERGE)

    def delete(self, path: str, **options: Any) -> None:
        """Delete an object; one that is gone already is fine."""
        # Orphaning, the default for some kinds, waits for a garbage collector that is not there.
        body = {"apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": "Background"} | options
        try:
            self.ask("DELETE", path, body)
        except ApiError as error:
            if error.status != 404:
                raise

    def install(self, crds: Path) -> None:
        """Create KubeRay's CRDs and wait until the server serves them."""
        for file in sorted(crds.glob("ray.io_*.yaml")):
            crd = yaml.load(file.read_text(), Loader=yaml.CSafeLoader)
            self.ask("POST", "/apis/apiextensions.k8s.io/v1/customresourcedefinitions", crd)
        wanted = ("rayclusters", "rayjobs", "rayservices")

        def served() -> bool:
            return all(self.find(f"{RAY}/namespaces/default/{name}") is not None for name in wanted)

        wait(served, START_S, "the server does not serve KubeRay's CRDs")


def wait(
    condition: Callable[[], bool], seconds: float, message: str, *, words: Callable[[], str] | None = None
) -> None:
    """Wait until the condition holds; TimeoutError with the message, and `words()` at that moment."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{message} within {seconds:.0f} s\n{words() if words else ''}")
        time.sleep(0.3)


@contextlib.contextmanager
def api_server(folder: Path) -> Iterator[ApiServer]:
    """A server with an empty etcd; all of it lives in `folder` and ends with the block."""
    programs = binaries()
    client, peer, port = free_ports(3)
    etcd = f"http://127.0.0.1:{client}"
    token = secrets.token_hex(16)
    key = folder / "service-account.key"
    subprocess.run(["openssl", "genrsa", "-out", key, "2048"], check=True, capture_output=True, timeout=60)
    (folder / "tokens.csv").write_text(f'{token},test,test,"system:masters"\n')
    server = ApiServer(folder, f"https://127.0.0.1:{port}", token)
    commands = {
        "etcd": [
            *("--data-dir", folder / "etcd", "--log-level", "warn"),
            *("--listen-client-urls", etcd, "--advertise-client-urls", etcd),
            *("--listen-peer-urls", f"http://127.0.0.1:{peer}"),
            *("--initial-advertise-peer-urls", f"http://127.0.0.1:{peer}"),
            *("--initial-cluster", f"default=http://127.0.0.1:{peer}", "--unsafe-no-fsync"),
        ],
        "kube-apiserver": [
            *("--etcd-servers", etcd, "--bind-address", "127.0.0.1", "--secure-port", str(port)),
            # Its own certificate, self-signed at the start, lands in this folder as apiserver.crt.
            *("--cert-dir", folder, "--advertise-address", "127.0.0.1", "--endpoint-reconciler-type", "none"),
            *("--service-account-issuer", "https://kubernetes.default.svc"),
            *("--service-account-key-file", key, "--service-account-signing-key-file", key),
            *("--token-auth-file", folder / "tokens.csv", "--authorization-mode", "RBAC"),
            *("--service-cluster-ip-range", "10.0.0.0/24", "--allow-privileged=false"),
        ],
    }
    server.session.trust_env = False  # no proxy, no other certificates
    with contextlib.ExitStack() as running:
        running.callback(server.session.close)
        for name, arguments in commands.items():
            running.enter_context(_process(programs / name, arguments, folder / f"{name}.log"))
        _wait_until_up(server)
        server.kubeconfig.write_text(yaml.safe_dump(_kubeconfig(server)))
        yield server


def _wait_until_up(server: ApiServer) -> None:
    def up() -> bool:
        try:
            server.ask("GET", "/readyz")
        except requests.JSONDecodeError:  # "ok"
            return server.find(f"{CORE}/namespaces/default") is not None
        except (OSError, ApiError):  # no certificate, no listener, not ready
            return False
        return True

    def logs() -> str:
        return "\n".join(f"{file.name}:\n{tail(file)}" for file in sorted(server.folder.glob("*.log")))

    wait(up, START_S, "the API server did not come up", words=logs)


def _kubeconfig(server: ApiServer) -> Object:
    cluster = {"server": server.address, "certificate-authority": str(server.folder / "apiserver.crt")}
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "test",
        "clusters": [{"name": "test", "cluster": cluster}],
        "users": [{"name": "test", "user": {"token": server.token}}],
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
    }


@contextlib.contextmanager
def _process(program: Path, arguments: list[Any], log: Path) -> Iterator[None]:
    with log.open("w") as out:
        process = subprocess.Popen(
            [program, *map(str, arguments)], stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT
        )
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(STOP_S)


def tail(log: Path, lines: int = 15) -> str:
    """The last lines of a log."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:]) if log.exists() else "(no log)"
