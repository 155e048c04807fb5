"""`rlgaf up` and `rlgaf down`: a Ray cluster of one machine with dashboard and jobs; it outlives the command.

`ray start --block` runs as a process of its own in a session of its own, and takes every process of its
cluster with it when it ends; `down` ends exactly that process, so other Ray clusters of the machine are left
alone. What is known about it (process, start time, ports) lies in `folder()/cluster-PORT.json`; it counts as
running while that very process lives. Two clusters need different ports.

Everything listens on 127.0.0.1 unless another address is named, and whoever connects needs a token, because
Ray runs their code. Without a token a cluster can be had on 127.0.0.1 only.
"""

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
from pydantic import TypeAdapter

from rollout.files import parsed, write_whole
from services.config import ConfigError
from services.plan import cpu_torch
from services.ray_access import (
    LOOPBACK,
    MODE,
    ON_LOOPBACK,
    own_folder,
    token_file,
    token_source,
    token_value,
)

LOCAL = "127.0.0.1"
STOP_WAIT_S = 900
"""Seconds that a stopped job has for its last step and checkpoint before Ray kills it (Ray's default: 3)."""
UP_DEADLINE_S = 180.0
DOWN_DEADLINE_S = 60.0


@dataclass(frozen=True)
class Ports:
    """Where a cluster listens: GCS (RAY_ADDRESS), dashboard and jobs, Ray client, Prometheus metrics."""

    gcs: int = 6379
    dashboard: int = 8265
    client: int = 10001
    metrics: int = 8090


@dataclass(frozen=True)
class LocalCluster:
    """A cluster that `up` started. `created` is its process's start time, which tells it from a later
    process with the same id."""

    pid: int
    created: float
    host: str
    ports: Ports
    token: bool
    logs: str

    def running(self) -> bool:
        """Whether its process is alive."""
        try:
            process = psutil.Process(self.pid)
            return process.create_time() == self.created and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    def lines(self) -> list[str]:
        """Addresses and the next command, for the console."""
        address = f"http://{self.host}:{self.ports.dashboard}"
        token = f"{MODE}=token " if self.token else ""
        return [
            f"dashboard    {address}",
            f"jobs         {address}",
            f"Ray client   ray://{self.host}:{self.ports.client}",
            f"metrics      http://{self.host}:{self.ports.metrics}/metrics",
            f"logs         {self.logs}",
            f"token        {'required; ' + token_source() if self.token else 'none'}",
            "",
            f"train here:  {token}RAY_ADDRESS={self.host}:{self.ports.gcs} rlgaf train run.toml",
            f"or as a job: rlgaf submit run.toml --address {address} --working-dir . --run.output $PWD/runs",
            f"end it:      rlgaf down --port {self.ports.gcs}",
        ]


def folder() -> Path:
    """Where clusters are written down."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "rlgaf"


def known(port: int) -> LocalCluster | None:
    """The running cluster that `up` started at this port."""
    file = folder() / f"cluster-{port}.json"
    try:
        cluster = parsed(str(file), partial(TypeAdapter(LocalCluster).validate_json, file.read_bytes()))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ConfigError(f"{error}; end Ray with `ray stop` and remove the file") from None
    return cluster if cluster.running() else None


def up(
    ports: Ports,
    *,
    cpus: int | None = None,
    gpus: int | None = None,
    object_store_mib: int | None = None,
    host: str = LOCAL,
    token: bool = True,
    stop_wait_s: int = STOP_WAIT_S,
) -> LocalCluster:
    """Start a cluster and wait until it takes jobs. Numbers left out are Ray's own choice, but no GPUs with
    a CPU build of torch.

    Raises:
        ConfigError: one runs already, a port is taken, the host is open without a token, or it did not come
        up within three minutes.
    """
    if host == "0.0.0.0":
        raise ConfigError("--host is the address other machines reach this one by, not 0.0.0.0")
    if host not in LOOPBACK and not token:
        raise ConfigError(f"--host {host} lets everyone who reaches it run code here; leave out --no-token")
    if (running := known(ports.gcs)) is not None:
        raise ConfigError(
            f"a cluster runs already at {running.host}:{ports.gcs} (process {running.pid}); "
            f"`rlgaf down --port {ports.gcs}` ends it, another --port starts a second one"
        )
    for name, port in asdict(ports).items():
        if _listens(host, port):
            raise ConfigError(
                f"something listens already at {host}:{port}, the port for {name}: another Ray cluster "
                f"perhaps (`ray status --address {host}:{ports.gcs}`); choose other ports"
            )
    if token:
        _keep_token()
    logs = own_folder() / str(ports.gcs)
    shutil.rmtree(logs, ignore_errors=True)
    folder().mkdir(mode=0o700, parents=True, exist_ok=True)
    log = folder() / f"cluster-{ports.gcs}.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            _start_command(ports, host, logs, cpus=cpus, gpus=gpus, object_store_mib=object_store_mib),
            env=_environment(host, token, stop_wait_s),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    created = psutil.Process(process.pid).create_time()
    cluster = LocalCluster(process.pid, created, host, ports, token, str(logs / "session_latest" / "logs"))
    write_whole(folder() / f"cluster-{ports.gcs}.json", json.dumps(asdict(cluster)))
    deadline = time.monotonic() + UP_DEADLINE_S
    while not _ready(host, ports.dashboard):
        if process.poll() is not None or time.monotonic() > deadline:
            _end(cluster)
            raise ConfigError(f"Ray did not come up; its last words ({log}):\n{_tail(log)}")
        time.sleep(0.5)
    return cluster


def down(port: int) -> bool:
    """End the cluster that `up` started at this port; False when there is none.

    Raises:
        ConfigError: something is left after a minute.
    """
    cluster = known(port)
    if cluster is None:
        return False
    _end(cluster)
    return True


def _keep_token() -> None:
    """Make a token where there is none. Ray's own commands leave its file readable to everyone."""
    file = token_file()
    if token_value() is None:
        file.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as out:
            out.write(secrets.token_hex(32))
    if file.exists() and file.stat().st_uid == os.getuid():
        file.chmod(0o600)


def _start_command(
    ports: Ports,
    host: str,
    temp: Path,
    *,
    cpus: int | None,
    gpus: int | None,
    object_store_mib: int | None,
) -> list[str]:
    sizes = {
        "num-cpus": cpus,
        "num-gpus": 0 if gpus is None and cpu_torch() else gpus,
        "object-store-memory": None if object_store_mib is None else object_store_mib * 2**20,
    }
    return [
        str(Path(sys.executable).parent / "ray"),
        *("start", "--head", "--block", "--disable-usage-stats", f"--temp-dir={temp}"),
        *(f"--node-ip-address={host}", f"--port={ports.gcs}"),
        *("--include-dashboard=true", f"--dashboard-host={host}", f"--dashboard-port={ports.dashboard}"),
        *(f"--ray-client-server-port={ports.client}", f"--metrics-export-port={ports.metrics}"),
        # Fixed by default, so that a second cluster on this machine would find them taken.
        *(f"--dashboard-agent-listen-port={_free_port(host)}", "--min-worker-port=0", "--max-worker-port=0"),
        *(f"--{name}={value}" for name, value in sizes.items() if value is not None),
    ]


def _environment(host: str, token: bool, stop_wait_s: int) -> dict[str, str]:
    """The cluster's environment: its jobs find this interpreter, and more processes than CPUs take turns."""
    own = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    defaults = {"RAY_worker_maximum_startup_concurrency": "32", "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5"}
    return {
        **defaults,
        **own,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), own.get("PATH", os.defpath)]),
        **(ON_LOOPBACK if host in LOOPBACK else {}),
        MODE: "token" if token else "disabled",
        "RAY_JOB_STOP_WAIT_TIME_S": str(stop_wait_s),
    }


def _ready(host: str, port: int) -> bool:
    """Whether the dashboard lists jobs, and a node that they can run on."""
    if _ask(host, port, "/api/jobs/") is None:
        return False
    nodes = _ask(host, port, "/api/v0/nodes")
    return nodes is not None and any(node["state"] == "ALIVE" for node in nodes["data"]["result"]["result"])


def _ask(host: str, port: int, path: str) -> Any:
    """The dashboard's JSON answer, None where there is none yet; asked with the token, which a cluster
    without one ignores."""
    request = urllib.request.Request(f"http://{host}:{port}{path}")
    if value := token_value():
        request.add_header("Authorization", f"Bearer {value}")
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return json.load(answer)
    except OSError:  # which HTTP errors are too
        return None


def _listens(host: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(2)
        return probe.connect_ex((host, port)) == 0


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def _end(cluster: LocalCluster) -> None:
    """SIGTERM to the cluster's own process, SIGKILL to what is left of it after the deadline."""
    try:
        processes = [psutil.Process(cluster.pid), *psutil.Process(cluster.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        processes = []
    if cluster.running():
        os.kill(cluster.pid, signal.SIGTERM)
    _, left = psutil.wait_procs(processes, timeout=DOWN_DEADLINE_S)
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    _, left = psutil.wait_procs(left, timeout=10)
    if left:
        raise ConfigError(f"processes {', '.join(str(p.pid) for p in left)} of the cluster do not end")
    (folder() / f"cluster-{cluster.ports.gcs}.json").unlink(missing_ok=True)


def _tail(log: Path, lines: int = 15) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
