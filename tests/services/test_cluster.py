"""`rlgaf up` and `rlgaf down` without Ray: what they refuse, what they know of a cluster, the token."""

import json
import os
import socket
import stat
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import psutil
import pytest
from free_ports import free_ports

from services.config import ConfigError
from services.jobs import cluster
from services.jobs.cluster import LocalCluster, Ports, known, up
from services.ray_access import ON_LOOPBACK, TOKEN, TOKEN_PATH


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A home of its own, without a token."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("XDG_STATE_HOME", TOKEN, TOKEN_PATH):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def written(process: "psutil.Process | subprocess.Popen[bytes]", port: int, created: float) -> LocalCluster:
    made = LocalCluster(process.pid, created, "127.0.0.1", Ports(gcs=port), False, "/logs")
    cluster.folder().mkdir(parents=True, exist_ok=True)
    (cluster.folder() / f"cluster-{port}.json").write_text(json.dumps(asdict(made)))
    return made


def test_a_cluster_is_known_while_its_very_process_lives():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    made = written(process, 7001, psutil.Process(process.pid).create_time())
    assert known(7001) == made
    assert known(7002) is None
    assert cluster.down(7001)
    assert process.poll() is not None
    assert known(7001) is None
    assert not cluster.down(7001)


def test_another_process_with_the_same_id_is_left_alone():
    written(psutil.Process(), 7003, created=1.0)  # this process is not the one that was written down
    assert known(7003) is None
    assert not cluster.down(7003)


def test_a_second_cluster_at_the_same_port_is_refused():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    written(process, 7004, psutil.Process(process.pid).create_time())
    with pytest.raises(ConfigError, match=r"runs already at 127\.0\.0\.1:7004 .*`rlgaf down --port 7004`"):
        up(Ports(gcs=7004))
    cluster.down(7004)


@pytest.mark.parametrize("taken", ["gcs", "dashboard", "client", "metrics"])
def test_a_port_where_something_listens_is_named(taken):
    ports = dict(zip(("gcs", "dashboard", "client", "metrics"), free_ports(4), strict=True))
    with (
        socket.create_server(("127.0.0.1", ports[taken])),
        pytest.raises(ConfigError, match=f"{ports[taken]}, the port for {taken}"),
    ):
        up(Ports(**ports))
    assert not cluster.folder().exists()


@pytest.mark.parametrize(("host", "said"), [("10.0.0.7", "leave out --no-token"), ("0.0.0.0", "not 0.0.0.0")])
def test_an_open_address_needs_a_token(host, said):
    with pytest.raises(ConfigError, match=said):
        up(Ports(), host=host, token=False)


def test_the_token_is_found_where_ray_looks_and_made_readable_by_its_owner_only(monkeypatch, home):
    assert cluster.token_value() is None
    cluster._keep_token()
    file = home / ".ray" / "auth_token"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert cluster.token_value() == file.read_text()
    assert len(file.read_text()) == 64
    file.chmod(0o644)  # as Ray's own command leaves it
    cluster._keep_token()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert cluster.token_value() == file.read_text()
    other = home / "other"
    other.write_text("from-file\n")
    monkeypatch.setenv(TOKEN_PATH, str(other))
    assert cluster.token_value() == "from-file"
    assert str(other) in cluster.token_source()
    monkeypatch.setenv(TOKEN, "from-variable")
    assert cluster.token_value() == "from-variable"


def test_the_clusters_environment(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "elsewhere:6379")
    made = cluster._environment("127.0.0.1", True, 77)
    assert "RAY_ADDRESS" not in made
    assert made["RAY_JOB_STOP_WAIT_TIME_S"] == "77"
    assert made["RAY_AUTH_MODE"] == "token"
    assert made.items() >= ON_LOOPBACK.items()
    assert not cluster._environment("10.0.0.7", True, 77).items() & ON_LOOPBACK.items()
    assert cluster._environment("127.0.0.1", False, 77)["RAY_AUTH_MODE"] == "disabled"
    assert made["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)


def test_ray_knows_every_option_of_the_start_command():
    from click.testing import CliRunner
    from ray.scripts.scripts import start

    command = cluster._start_command(
        Ports(), "127.0.0.1", Path("/tmp/x"), cpus=2, gpus=0, object_store_mib=100
    )
    offered = CliRunner().invoke(start, ["--help"]).output
    options = [word.split("=")[0] for word in command if word.startswith("--")]
    assert {"--num-cpus", "--num-gpus", "--object-store-memory", "--dashboard-agent-listen-port"} <= set(
        options
    )
    assert [option for option in options if option not in offered] == []


@pytest.mark.parametrize(
    ("cpu_build", "asked", "told"), [(True, None, ["0"]), (True, 2, ["2"]), (False, None, [])]
)
def test_a_cpu_torch_offers_no_gpus_of_itself(monkeypatch, cpu_build, asked, told):
    monkeypatch.setattr(cluster, "cpu_torch", lambda: cpu_build)
    sizes = {"cpus": None, "gpus": asked, "object_store_mib": None}
    command = cluster._start_command(Ports(), "127.0.0.1", Path("/tmp/x"), **sizes)
    assert [word.split("=")[1] for word in command if word.startswith("--num-gpus")] == told
