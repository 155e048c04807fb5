"""A run with two of everything: learner ranks under ZeRO-2 with LoRA, discriminator ranks, rollout workers of
which one is killed, scoring replicas. The policy gradient is mixed with a Gumbel-Softmax update.

Every secret that a run knows is in its environment, and its endpoint, tracker and reward service use them.
"""

import json
import secrets
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path

import grpc
import psutil
import pytest
from free_ports import free_ports
from launching import PROMPTS, SAMPLES, Finished, Launch, kill_a_rollout_worker
from ray.serve.generated import serve_pb2, serve_pb2_grpc

from learner.environment import jemalloc

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1800)]

TWO_OF_EVERYTHING = {
    "run.steps": "5",
    "rollout.workers": "2",
    "rollout.cpus_per_worker": "0.2",
    "learner.ranks": "2",
    "learner.cpus_per_rank": "0.2",
    "learner.zero_stage": "2",
    "learner.lora.rank": "4",
    "learner.gumbel.weight": "0.1",
    "learner.gumbel.samples": "16",
    "discriminator.ranks": "2",
    "discriminator.cpus_per_rank": "0.2",
    "discriminator.zero_stage": "2",
    "discriminator.lora.rank": "4",
    "discriminator.scoring.replicas": "2",
    "discriminator.scoring.cpus": "0.2",
}


COMPUTING = ("ray::RayTrainWorker", "ray::RolloutWorker", "ray::ServeReplica", "VLLM::EngineCore")


class Reward(BaseHTTPRequestHandler):
    """A reward service that pays nothing, to callers with the token."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        known = self.headers["Authorization"] == f"Bearer {PLANTED['RLGAF_REWARD_TOKEN']}"
        self.send_response(200 if known else 401)
        self.end_headers()
        self.wfile.write(json.dumps({"rewards": [0.0] * len(body["responses"])}).encode())

    def log_message(self, *_: object) -> None:
        """Nothing."""


PLANTED = {
    "HF_TOKEN": f"hf_{secrets.token_hex(17)}",
    "WANDB_API_KEY": secrets.token_hex(20),
    "RLGAF_SCORE_TOKEN": secrets.token_hex(16),
    "RLGAF_REWARD_TOKEN": secrets.token_hex(16),
    "AWS_ACCESS_KEY_ID": f"AKIA{secrets.token_hex(8).upper()}",
    "AWS_SECRET_ACCESS_KEY": secrets.token_hex(20),
}


@dataclass
class Seen:
    """What was found out about the run's processes while it ran."""

    jemalloc: dict[str, set[bool]] = field(default_factory=lambda: {kind: set() for kind in COMPUTING})
    """By kind of process that computes: whether those of the run had jemalloc."""
    listening: set[tuple[str, str]] = field(default_factory=set)
    """Process and address of every port."""
    ray_tokens: set[str] = field(default_factory=set)
    refusals: list[grpc.StatusCode] = field(default_factory=list)
    """What replicas say to a caller without a token."""

    def look(self, process: psutil.Process) -> None:
        line, maps = " ".join(process.cmdline()), Path(f"/proc/{process.pid}/maps").read_text()
        if not line:
            return  # it is ending
        for kind in COMPUTING:
            if line.startswith(kind):
                self.jemalloc[kind].add("libjemalloc" in maps)
        ports = [one.laddr for one in process.net_connections("inet") if one.status == psutil.CONN_LISTEN]
        self.listening |= {(line.split()[0], port.ip) for port in ports}
        if line.startswith("ray::ServeReplica"):
            self.refusals += [_answer(port.port) for port in ports if not _loopback(port.ip)]
        if process.name() == "raylet":  # what Ray names anew has lost its environment to the name
            self.ray_tokens.add(process.environ()["RAY_AUTH_TOKEN"])


def _answer(port: int) -> grpc.StatusCode:
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel, pytest.raises(grpc.RpcError) as answered:
        serve_pb2_grpc.ASGIServiceStub(channel).HandleRequest(serve_pb2.ASGIRequest(), timeout=10)
    return answered.value.code()


@pytest.fixture(scope="module")
def seen() -> Seen:
    """Filled by the run."""
    return Seen()


@pytest.fixture(scope="module")
def sessions() -> Iterator[Path]:
    """Folder of Ray's sessions."""
    folder = Path(tempfile.mkdtemp(prefix="rlgaf-", dir="/tmp"))  # Ray's socket paths must stay short
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def scaled(launch: Launch, seen: Seen, sessions: Path) -> Iterator[Finished]:
    def look_and_kill(process: "subprocess.Popen[str]", folder: Path) -> None:
        kill_a_rollout_worker(process, folder)
        for child in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
            try:
                seen.look(child)
            except (psutil.Error, FileNotFoundError, ProcessLookupError):
                continue  # among others the one that was killed

    with ThreadingHTTPServer(("127.0.0.1", 0), Reward) as service:
        threading.Thread(target=service.serve_forever, daemon=True).start()
        yield launch(
            "scaled",
            TWO_OF_EVERYTHING
            | {
                "discriminator.reward.user_reward": f"http://127.0.0.1:{service.server_port}",
                "discriminator.scoring.http": "true",
                "discriminator.scoring.http_port": str(free_ports(1)[0]),
                "run.wandb": "planted",
            },
            meanwhile=look_and_kill,
            variables=PLANTED | {"WANDB_MODE": "offline", "RAY_TMPDIR": str(sessions)},
        )
        service.shutdown()


def test_no_port_is_open_to_other_machines(scaled, seen):
    names = {name for name, _ in seen.listening}
    assert {"ray::RolloutWorker", "ray::RayTrainWorker"} <= {name.split(".")[0] for name in names}, names
    open_ = {(name, ip) for name, ip in seen.listening if not _loopback(ip)}
    # Ray Serve names no address for the port between deployments; it asks for the token.
    assert {name.split(":")[2] for name, _ in open_} <= {"ServeReplica"}
    assert len(seen.refusals) == 2
    assert set(seen.refusals) == {grpc.StatusCode.UNAUTHENTICATED}


def _loopback(ip: str) -> bool:
    found = ip_address(ip.split("%")[0])
    return (getattr(found, "ipv4_mapped", None) or found).is_loopback


def test_no_secret_is_written_anywhere(scaled, seen, sessions):
    assert scaled.code == 0, scaled.output[-3000:]
    (ray_token,) = seen.ray_tokens
    assert len(ray_token) == 64
    logs = [*sessions.rglob("*.log"), *sessions.rglob("*.out")]
    assert len(logs) > 10, "Ray's session is where it is looked for"
    files = [path for root in (scaled.folder, sessions) for path in root.rglob("*") if path.is_file()]
    assert any("wandb" in path.parts for path in files)
    texts = [("console", scaled.output.encode()), *((str(path), path.read_bytes()) for path in files)]
    found = [
        (name, where)
        for name, secret in (PLANTED | {"RAY_AUTH_TOKEN": ray_token}).items()
        for where, text in texts
        if secret.encode() in text
    ]
    assert found == []


@pytest.mark.skipif(jemalloc() is None, reason="this build of Ray brings no libjemalloc.so")
def test_every_process_that_computes_allocates_with_jemalloc(scaled, seen):
    assert seen.jemalloc == {kind: {True} for kind in COMPUTING}


def test_a_killed_rollout_worker_is_replaced_and_the_run_goes_on(scaled):
    assert scaled.code == 0, scaled.output[-3000:]
    assert scaled.left == []
    assert [row["step"] for row in scaled.rows] == [1, 2, 3, 4, 5]
    assert scaled.summary["responses"]["trained"] == 5 * PROMPTS * SAMPLES
    assert scaled.summary["responses"]["dropped"] == scaled.summary["responses"]["failed"] == 0
    assert scaled.rows[-1]["rollout/replacements"] == 1


def test_merged_adapters_reach_every_worker(scaled):
    """The old workers and the new one sample from the weights that the learner holds."""
    assert all(0 <= row["policy/mismatch_max"] < 1e-4 for row in scaled.rows)
    assert all(row["policy/kl"] > 0 for row in scaled.rows[1:]), "the policy never moved"


def test_both_gradients_reach_the_policy(scaled):
    """The learner's ranks fetched the version that scored the batch and judged samples of their own by it."""
    # Few texts of this model survive decoding and encoding: a sample takes part about once in twenty times.
    judged = [row for row in scaled.rows if row["policy/gumbel_masked"] < 1]
    assert judged, "every sample of every step was masked"
    assert all(0 < row["policy/gumbel_grad_share"] < 1 for row in judged)
    assert all(row["policy/gumbel_tokens"] > 0 for row in scaled.rows)
    assert scaled.rows[-1]["policy/gumbel_tau"] < scaled.rows[0]["policy/gumbel_tau"]
