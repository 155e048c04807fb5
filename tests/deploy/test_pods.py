"""The pods that test_api_server.py runs: paths, rights, addresses and ends, on real namespaces."""

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pods
import pytest
from kubelet import expand
from pods import ROOT, Container, Mount, Network, Process, Sandbox
from ray_operator import ray_start

pytestmark = pytest.mark.slow
HEAD = "demo-head-svc.default.svc.cluster.local"


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[Sandbox, Sandbox]]:
    """Two pods, and a folder `runs` that everyone may write to."""
    pods.needed()
    (runs := tmp_path / "runs").mkdir()
    runs.chmod(0o777)
    network = Network()
    one, two = (Sandbox(name, tmp_path / name, network) for name in ("one", "two"))
    yield one, two
    one.remove()
    two.remove()
    network.close()


def run(sandbox: Sandbox, words: list[str], mounts: list[Mount]) -> Process:
    container = Container("main", words, {"HOME": "/runs"}, "/runs", mounts, 1000, 1000, True)
    return sandbox.start(container)


def ended(process: Process, seconds: float = 60) -> str:
    deadline = time.monotonic() + seconds
    while process.code is None:
        assert time.monotonic() < deadline, process.log.read_text()
        time.sleep(0.05)
    return process.log.read_text()


def test_a_container_sees_what_its_pod_gives_it(pair: tuple[Sandbox, Sandbox], tmp_path: Path) -> None:
    one, two = pair
    (given := tmp_path / "given").mkdir()
    (given / "run.toml").write_text("[run]")
    mounts = [
        Mount("/runs", tmp_path / "runs"),
        Mount("/etc/rlgaf/run", given, read_only=True),
        Mount("/dev/shm", None, size="8m"),
    ]
    one.hosts(f"{two.address} two.default.svc.cluster.local\n")
    script = [
        "id -u; id -G; pwd; hostname; cat /etc/rlgaf/run/run.toml; echo; cat /proc/1/comm",
        "touch mine && echo wrote",
        *(f"touch {place}/x 2>/dev/null && echo wrong" for place in ("", "/etc/rlgaf/run", "/usr", ROOT)),
        "df --output=size -k /dev/shm | tail -1; grep CapEff /proc/self/status",
        "getent hosts two.default.svc.cluster.local; python -c 'import services; print(services.__file__)'",
    ]
    process = run(one, ["bash", "-c", "\n".join([*script, "exit 7"])], mounts)
    text = ended(process)
    assert process.code == 7
    assert text.split() == [
        *("1000", "1000", "/runs", "one", "[run]", "bash", "wrote", "8192", "CapEff:", "0" * 16),
        *(two.address, "two.default.svc.cluster.local", str(ROOT / "services" / "__init__.py")),
    ]
    assert (tmp_path / "runs" / "mine").stat().st_uid == 1000


def test_two_pods_use_the_same_port_and_reach_each_other(
    pair: tuple[Sandbox, Sandbox], tmp_path: Path
) -> None:
    one, two = pair
    serve = ["python", "-m", "http.server", "8080"]
    servers = [run(sandbox, serve, [Mount("/runs", tmp_path / "runs")]) for sandbox in (one, two)]
    ask = f"import urllib.request as u; print(u.urlopen('http://{two.address}:8080', timeout=5).status)"
    reached = f'until python -c "{ask}" 2>/dev/null; do sleep 0.2; done'
    asked = one.execute(servers[0], ["bash", "-c", reached], "ask")
    assert ended(asked) == "200\n"
    servers[0].signal(signal.SIGTERM)  # process 1 of a container: without a handler it ignores this
    time.sleep(1)
    assert servers[0].code is None
    servers[0].signal(signal.SIGKILL)
    ended(servers[0])
    assert servers[0].code != 0


def test_variables_in_commands() -> None:
    env = {"RAY_CLUSTER_NAME": "demo"}
    assert expand("--name $(RAY_CLUSTER_NAME) $$(A) $(B) $HOME", env) == "--name demo $(A) $(B) $HOME"


def test_the_line_that_kuberay_makes_of_a_group() -> None:
    limits = {"cpu": "2", "memory": "10Gi"}
    given = {"num-cpus": "0", "dashboard-host": "0.0.0.0"}
    assert ray_start("head", given, limits, HEAD) == (
        "ray start --head --block --dashboard-agent-listen-port=52365 --dashboard-host=0.0.0.0 "
        "--memory=10737418240 --metrics-export-port=8080 --num-cpus=0"
    )
    assert ray_start("worker", {"no-monitor": "false"}, limits, HEAD) == (
        f"ray start --address={HEAD}:6379 --block --dashboard-agent-listen-port=52365 "
        "--memory=10737418240 --metrics-export-port=8080 --num-cpus=2"
    )
