"""What `rlgaf submit` checks before anything is sent, what it sends, and what it makes of a job's end."""

import http.server
import json
import shlex
import socket
import subprocess
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.config import ConfigError, load
from services.jobs.client import JobClient, JobEnd
from services.jobs.submit import RUN_KEY, Submission, _ended, _Log, prepare
from services.jobs.working_dir import carried, check_paths

ADDRESS = "http://127.0.0.1:8265"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A git repository with a run, its data, a model folder, and things that do not travel."""
    root = tmp_path / "project"
    for name in ("data/seen.jsonl", "data/hidden.jsonl", "model/config.json", ".venv/lib.py", "out/big.bin"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("x")
    (root / ".gitignore").write_text("hidden.jsonl\n/out\n")
    (root / "run.toml").write_text(
        '[run]\noutput = "/shared/runs"\nsteps = 3\n[data]\ndemonstrations = "data/seen.jsonl"\n'
        '[policy]\nmodel = "model"\n[learner]\nbetas = [0.8, 0.9]\n'
    )
    subprocess.run(["git", "init", "-q", str(root)], check=True)
    return root


def sent(project: Path, *overrides: str, **options: object) -> Submission:
    options = {"working_dir": project, **options}
    return prepare(project / "run.toml", overrides, ADDRESS, **options)  # type: ignore[arg-type]


def test_the_files_that_travel_are_those_in_rays_own_package(project, tmp_path):
    from ray._private.ray_constants import get_runtime_env_default_excludes
    from ray._private.runtime_env.packaging import create_package

    package = tmp_path / "package.zip"
    create_package(
        str(project),
        package,
        include_gitignore=True,
        include_parent_dir=False,
        excludes=get_runtime_env_default_excludes(),
    )
    with zipfile.ZipFile(package) as archive:
        packed = {name for name in archive.namelist() if not name.endswith("/")}
    assert packed == {"run.toml", ".gitignore", "data/seen.jsonl", "model/config.json"}
    assert {str(file.relative_to(project)) for file in carried(project).files} == packed


def test_a_submission_with_a_working_directory(project):
    submission = sent(project, "--run.steps=5", resume=True, driver_cpus=1, stop_wait_s=60)
    assert submission.entrypoint == ["exec", "rlgaf", "train", "run.toml", "--run.steps=5", "--auto-resume"]
    assert submission.run == "/shared/runs/run"
    words = shlex.split(submission.plain_line())
    assert words[:5] == ["ray", "job", "submit", "--address", ADDRESS]
    given = dict(zip(words[3:13:2], words[4:14:2], strict=True))
    assert given["--working-dir"] == str(project)
    assert json.loads(given["--runtime-env-json"]) == {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "60"}}
    assert given["--entrypoint-num-cpus"] == "1"
    assert json.loads(given["--metadata-json"]) == {RUN_KEY: "/shared/runs/run"}
    assert words[13:] == ["--", *submission.entrypoint]
    assert "gpu" not in submission.plain_line()


def test_a_job_that_is_not_told_how_long_it_may_stop_leaves_the_clusters_time_alone(project):
    submission = sent(project)
    assert submission.environment() == {}
    assert "--runtime-env-json" not in submission.plain_line()
    assert "RAY_JOB_STOP_WAIT_TIME_S" not in submission.plain_line()


def test_without_a_working_directory_the_settings_travel_in_the_entrypoint(project):
    overrides = ["--data.demonstrations=/data/d.jsonl", "--policy.model=org/model", "--run.seed", "7"]
    submission = sent(project, *overrides, working_dir=None)
    assert submission.entrypoint[:4] == ["exec", "rlgaf", "train", "/dev/null"]
    there = load(Path("/dev/null"), shlex.split(submission.command)[4:])
    assert there == load(project / "run.toml", overrides)
    assert list(there.learner.betas) == [0.8, 0.9]
    file = project / "run.toml"
    file.write_text(file.read_text() + "[method.sft.run]\nsteps = 50\n")
    submission = sent(project, *overrides, "--run.method=sft", working_dir=None)
    there = load(Path("/dev/null"), shlex.split(submission.command)[4:])
    assert there == load(file, [*overrides, "--run.method=sft"])
    assert there.run.steps == 50, "what the file says for one method travels with that method"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["--data.demonstrations=data/hidden.jsonl"], "is not sent: .gitignore"),
        (["--data.prompts=data/absent.jsonl"], "data.prompts = data/absent.jsonl is not in the working"),
        (["--data.demonstrations=../elsewhere.jsonl"], "leaves the working directory"),
        (["--policy.model=out"], "policy.model = out is in"),
        (["--run.output=runs"], "run.output = runs is relative"),
        (["--evaluation.extra_measures=mine.py:measure"], "evaluation.extra_measures = mine.py is not in"),
        (["--run.stepz=1"], "unknown field run.stepz"),
    ],
)
def test_a_path_that_would_not_arrive_is_refused(project, overrides, said):
    with pytest.raises(ConfigError, match=said.replace(".", r"\.")):
        sent(project, *overrides)


def test_hub_names_and_absolute_paths_pass_with_a_note(project):
    config = load(project / "run.toml", ["--policy.model=org/model", "--data.demonstrations=/data/d.jsonl"])
    notes = check_paths(config, carried(project))
    assert notes == ["data.demonstrations = /data/d.jsonl must exist on the cluster's nodes"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"image": "registry/rlgaf:1"}, "exclude each other"),
        ({"image": "registry/rlgaf:1", "working_dir": None}, "relative and nothing is sent along"),
        ({"working_dir": Path("/nonexistent")}, "no such folder"),
        ({"working_dir": None}, "relative and nothing is sent along"),
        ({"stop_wait_s": 0}, "--stop-wait 0"),
    ],
)
def test_combinations_that_cannot_work_are_refused(project, options, said):
    with pytest.raises(ConfigError, match=said):
        sent(project, **options)


def test_an_image_gets_no_gpu_from_ray(project):
    overrides = ["--data.demonstrations=/d.jsonl", "--policy.model=org/model"]
    submission = sent(project, *overrides, working_dir=None, image="registry/rlgaf:1")
    assert submission.environment()["image_uri"] == "registry/rlgaf:1"
    with pytest.raises(ConfigError, match=r'learner\.device = "cuda"'):
        sent(project, *overrides, "--learner.device=cuda", working_dir=None, image="registry/rlgaf:1")


def test_the_runtime_environment_is_one_that_ray_accepts(project):
    from ray.runtime_env import RuntimeEnv

    overrides = ["--data.demonstrations=/d.jsonl", "--policy.model=org/model"]
    submission = sent(project, *overrides, working_dir=None, image="registry/rlgaf:1")
    assert RuntimeEnv(**submission.environment())["image_uri"] == "registry/rlgaf:1"


@pytest.mark.parametrize("address", ["ray://head:10001", "auto", "head:8265"])
def test_the_address_is_the_dashboards(project, address):
    with pytest.raises(ConfigError, match="give the dashboard's address"):
        prepare(project / "run.toml", [], address, working_dir=project)


def test_a_file_outside_the_working_directory_does_not_travel(project, tmp_path):
    outside = tmp_path / "other.toml"
    outside.write_text((project / "run.toml").read_text())
    with pytest.raises(ConfigError, match=r"other\.toml is not among the files"):
        prepare(outside, [], ADDRESS, working_dir=project)


@pytest.mark.parametrize(
    ("end", "code", "said"),
    [
        (JobEnd("SUCCEEDED", "", 0), 0, ""),
        (JobEnd("STOPPED", "", None), 130, "was stopped"),
        (JobEnd("FAILED", "long log", 2), 2, "exit code 2"),
        (JobEnd("FAILED", "long log", -9), 137, "exit code 137"),
        (JobEnd("FAILED", "no podman", None), 1, "the job failed without an exit code: no podman"),
    ],
)
def test_exit_code_and_reason_are_passed_on(end, code, said):
    lines: list[str] = []
    assert _ended(end, lines.append) == code
    assert said in "\n".join(lines)


def test_a_log_read_again_from_its_beginning_is_written_once(capsys):
    log = _Log()
    log.write("one\n", 0)
    log.write("two\n", 4)
    for text, position in (("one\ntw", 0), ("o\nthree\n", 6)):  # a new connection, cut differently
        log.write(text, position)
    assert capsys.readouterr().out == "one\ntwo\nthree\n"


class _Refusing(http.server.BaseHTTPRequestHandler):
    status = 404

    def do_GET(self) -> None:
        self.send_response(self.status)
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def dashboard(request: pytest.FixtureRequest) -> Iterator[str]:
    """A server that answers everything with one status."""
    handler = type("Handler", (_Refusing,), {"status": request.param})
    server = http.server.HTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.mark.parametrize(
    ("dashboard", "said"),
    [
        (401, "asks for a token and"),
        (403, "asks for a token and"),
        (404, "is no Ray dashboard"),
        (500, "is no Ray"),
    ],
    indirect=["dashboard"],
)
def test_what_is_not_a_willing_dashboard_is_named(dashboard, said, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ConfigError, match=said):
        JobClient(dashboard)


@pytest.mark.parametrize("dashboard", [401], indirect=True)
def test_a_token_does_not_go_where_others_can_read_it(dashboard, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "t" * 64)
    with pytest.raises(ConfigError, match="refuses the one in the variable RAY_AUTH_TOKEN"):
        JobClient(dashboard)
    monkeypatch.setattr("services.jobs.client.private", lambda _: False)
    with pytest.raises(ConfigError, match="and got none; it is sent by https or to this machine only"):
        JobClient(dashboard)


def test_an_address_where_nothing_listens_is_refused_at_once(monkeypatch):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free = probe.getsockname()[1]
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")  # not what was asked for
    began = time.monotonic()
    with pytest.raises(ConfigError, match=f"127.0.0.1:{free} does not answer"):
        JobClient(f"http://127.0.0.1:{free}")
    assert time.monotonic() - began < 10


def test_a_server_that_accepts_and_says_nothing_has_a_deadline(monkeypatch):
    monkeypatch.setattr("services.jobs.client.REQUEST_S", 0.5)
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        pytest.raises(ConfigError, match="does not answer"),
    ):
        JobClient(f"http://127.0.0.1:{silent.getsockname()[1]}")
