"""The user's reward against a real HTTP server and a real module."""

import json
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from discriminator.external_reward import UserRewardError, call_user_reward, load_user_reward
from discriminator.reward_config import RewardConfig

ARGUMENTS = (["p", "p"], ["short", "longer text"], [True, False])


class Service(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/elsewhere":
            self.send_response(307)
            self.send_header("Location", "/token")
            self.end_headers()
            return
        if self.path == "/endless":
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b" " * 70_000)
            return
        if self.path == "/late":
            time.sleep(2)
        if self.path == "/broken":
            self.send_error(503, "no model loaded")
            return
        rewards = [len(text) + ended for text, ended in zip(body["responses"], body["complete"], strict=True)]
        answer = {
            "/rewards": {"rewards": rewards},
            "/few": {"rewards": rewards[:1]},
            "/other": [1, 2],
            "/nan": {"rewards": [1.0, float("nan")]},
            "/huge": {"rewards": [1.0, 10**400]},
            "/token": {"rewards": [float(self.headers.get("Authorization") == "Bearer secret")] * 2},
            "/late": {"rewards": rewards},
        }[self.path]
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Service)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def call(spec: str, timeout_s: float = 5.0) -> list[float]:
    config = RewardConfig(user_reward=spec, user_timeout_s=timeout_s)
    function = load_user_reward(config)
    assert function is not None
    return call_user_reward(function, *ARGUMENTS, name=spec, timeout_s=timeout_s)


def test_a_url_answers_one_number_per_response(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert call(f"{address}/rewards") == [6.0, 11.0]
    assert call(f"{address}/token") == [0.0, 0.0]
    monkeypatch.setenv("RLGAF_REWARD_TOKEN", "secret")
    assert call(f"{address}/token") == [1.0, 1.0]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/few", "1 rewards for 2 responses"),
        ("/other", 'list "rewards"'),
        ("/nan", "reward 1 is nan"),
        ("/huge", "reward 1 is 1000.*not a number"),
        ("/elsewhere", "HTTP 307: redirects are not followed"),
        ("/endless", "longer than 65664 bytes"),
        ("/broken", "HTTP 503 no model loaded"),
    ],
)
def test_a_bad_answer_is_named(path: str, message: str, address: str) -> None:
    with pytest.raises(UserRewardError, match=message):
        call(address + path)


@pytest.mark.parametrize(
    ("url", "token", "message"),
    [
        ("http://reward.example/score", "secret", "token of RLGAF_REWARD_TOKEN in plain text; use https"),
        ("http://127.0.0.1.example/score", "secret", "in plain text"),
        ("https://me:secret@reward.example/score", "", "credentials in its URL"),
        ("http://127.0.0.1:port/score", "", "is not a URL"),
        ("http://reward.example/score", "", None),
        ("https://reward.example/score", "secret", None),
        ("http://[::1]:9/score", "secret", None),
    ],
)
def test_a_token_goes_by_https_or_stays_on_this_machine(
    url: str, token: str, message: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RLGAF_REWARD_TOKEN", token)
    config = RewardConfig(user_reward=url)
    if message is None:
        assert load_user_reward(config) is not None
        return
    with pytest.raises(UserRewardError, match=message) as error:
        load_user_reward(config)
    assert "secret" not in str(error.value)


def test_a_late_answer_is_an_error_at_the_deadline(address: str) -> None:
    began = time.monotonic()
    with pytest.raises(UserRewardError, match=r"timed out|within 0.3 s"):
        call(f"{address}/late", timeout_s=0.3)
    assert time.monotonic() - began < 1.5


def test_nobody_there() -> None:
    with pytest.raises(UserRewardError, match="cannot be reached"):
        call("http://127.0.0.1:9/rewards")


MODULE = """
import time

def count(prompts, responses, complete):
    return [len(p) + len(r) - c for p, r, c in zip(prompts, responses, complete)]

def raises(prompts, responses, complete):
    raise KeyError("model")

def sleeps(prompts, responses, complete):
    time.sleep(3)

def text(prompts, responses, complete):
    return "12"

def one(responses):
    return []

number = 3
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "reward_of_a_user.py").write_text(MODULE)
    monkeypatch.delitem(sys.modules, "reward_of_a_user", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "reward_of_a_user"


def test_a_python_path(module: str) -> None:
    assert call(f"{module}:count") == [5.0, 12.0]
    assert load_user_reward(RewardConfig()) is None


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("raises", "KeyError: 'model'"),
        ("sleeps", "within 0.2 s"),
        ("text", "str, not a list"),
        ("absent", "has no 'absent'; it has "),
        ("number", "function of three lists"),
        ("one", "function of three lists"),
    ],
)
def test_a_bad_function_is_named(function: str, message: str, module: str) -> None:
    with pytest.raises(UserRewardError, match=message):
        call(f"{module}:{function}", timeout_s=0.2 if function == "sleeps" else 5.0)


def test_a_file(module: str, tmp_path: Path) -> None:
    assert call(f"{tmp_path}/{module}.py:count") == [5.0, 12.0]


def test_a_module_that_does_not_exist_or_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(
        UserRewardError, match="No module named 'no_such_module'; install it, put its folder on"
    ):
        call("no_such_module:reward")
    (tmp_path / "broken_reward.py").write_text("def reward(p, r, c) return []\n")
    with pytest.raises(UserRewardError, match=r"user_reward = .*SyntaxError"):
        call(f"{tmp_path}/broken_reward.py:reward")
