"""The scoring endpoint over real replicas in memory: its limits, and whatever may come from outside."""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import services.endpoint
from discriminator.config import DiscriminatorConfig
from discriminator.model import load_discriminator
from discriminator.versions import UnknownVersion, state_checksum
from services.endpoint import BODY_BYTES, OPEN_REQUESTS, endpoint_app, serve_on
from services.scoring import ScoringReplica, Turns, parts_of

TOKEN = "only-for-this-test"
AUTHORIZED = {"Authorization": f"Bearer {TOKEN}"}
ASKED = {"prompt": "say cat: ", "responses": ["the cat sat on the mat", "the door"]}


class OneVersion:
    """A source of the versions of a discriminator, as a run's store is; version 3 is the newest."""

    def __init__(self, state: dict[str, torch.Tensor]) -> None:
        self.state = state

    def fetch(self, version: int) -> tuple[str, Any]:
        if version not in (2, 3):
            raise UnknownVersion(f"discriminator version {version} is not held; held: [2, 3]")
        return state_checksum(self.state), self.state

    async def newest(self) -> int:
        return 3

    async def alive(self) -> None:
        pass


class Handle:
    """Calls of a replica in this process, as a Serve handle makes them."""

    def __init__(self, replica: Any) -> None:
        self.replica = replica

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(
            remote=lambda *given: asyncio.ensure_future(getattr(self.replica, name)(*given))
        )


@pytest.fixture(scope="module")
def replica(tiny_model: Path) -> Any:
    config = DiscriminatorConfig(device="cpu", compute_dtype="float32")
    module = load_discriminator(config, str(tiny_model), device="cpu", dtype=torch.float32, seed=3)
    state = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    made = ScoringReplica.func_or_class  # type: ignore[attr-defined]
    return made(config, str(tiny_model), "float32", OneVersion(state), 1)


def talk(app: Any, conversation: Callable[[httpx.AsyncClient], Awaitable[Any]]) -> Any:
    """The answer of a conversation with an application in this process."""

    async def run() -> Any:
        transport = httpx.ASGITransport(app, raise_app_exceptions=True)
        async with httpx.AsyncClient(transport=transport, base_url="http://endpoint") as client:
            return await conversation(client)

    return asyncio.run(run())


def ask(app: Any, **request: Any) -> httpx.Response:
    answer: httpx.Response = talk(
        app, lambda client: client.post("/v1/score", **({"headers": AUTHORIZED} | request))
    )
    return answer


def test_scores_are_those_of_the_run_itself(replica: Any) -> None:
    answer = ask(endpoint_app(Handle(replica), 1, TOKEN), json=ASKED)
    assert answer.status_code == 200
    texts = [(text, True) for text in ASKED["responses"]]
    [expected] = replica.scorer.score(3, [ASKED["prompt"]], [texts])
    assert answer.json()["disc_version"] == 3
    assert answer.json()["scores"] == pytest.approx([e.scores[-1] for e in expected], abs=1e-5)
    assert ask(endpoint_app(Handle(replica), 1, TOKEN), json=ASKED | {"disc_version": 2}).status_code == 404
    assert replica.scorer.versions() == [3], "a request from outside changes no version that is held"


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        (b'{"x": NaN}', 422, "Field required"),
        (b'{"prompt": "a", "responses": ["b"], "x": NaN}', 200, "disc_version"),
        (b"\x9f", 422, "Invalid JSON"),
        (b'{"prompt": "\\ud83d", "responses": ["b"]}', 422, "hex escape"),
        (b'{"prompt": 1, "responses": ["b"]}', 422, "valid string"),
        (b'{"prompt": "a", "responses": []}', 422, "at least 1"),
        (b'{"prompt": "a", "responses": ["b"], "disc_version": -1}', 422, "greater than or equal"),
        (b'{"prompt": "a", "responses": ["b"], "disc_version": 1e400}', 422, "disc_version"),
        (b'{"prompt": "a", "responses": ["b"], "disc_version": 9' + b"9" * 40 + b"}", 404, "not held"),
        (b"[" * 100_000, 422, "Invalid JSON"),
        (b"", 422, "Invalid JSON"),
        (b" " * (BODY_BYTES + 1), 413, "larger than 1048576"),
    ],
)
def test_what_is_wrong_with_a_request_is_said(body: bytes, status: int, says: str, replica: Any) -> None:
    answer = ask(endpoint_app(Handle(replica), 1, TOKEN), content=body)
    assert (answer.status_code, says in answer.text) == (status, True), answer.text
    answer.json()


def test_other_doors_are_closed(replica: Any) -> None:
    app = endpoint_app(Handle(replica), 1, TOKEN)
    for path, status in (("/docs", 404), ("/openapi.json", 404), ("/v1/score", 405), ("/v1/health", 200)):
        given = talk(app, lambda client, path=path: client.get(path, headers=AUTHORIZED))
        assert (given.status_code, "json" in given.headers["content-type"]) == (status, True)
        without = talk(app, lambda client, path=path: client.get(path))
        assert without.status_code == (200 if path == "/v1/health" else 401)


@pytest.mark.parametrize("token", ["", "wrong", TOKEN + " ", "\u00e4"])
def test_without_the_token_nothing_is_read(token: str, replica: Any) -> None:
    read: list[int] = []

    async def body() -> Any:
        for _ in range(10):
            read.append(1)
            yield b" " * 1000

    headers = [(b"Authorization", f"Bearer {token}".encode("latin-1"))]
    answer = ask(endpoint_app(Handle(replica), 1, TOKEN), content=body(), headers=headers)
    assert answer.status_code == 401
    assert not read
    with pytest.raises(ValueError, match="needs a bearer token"):
        endpoint_app(Handle(replica), 1, "")


def test_overload_is_said_at_once_and_the_rest_is_answered(replica: Any) -> None:
    class Slow:
        async def score_outside(self, *given: Any) -> tuple[int, list[float]]:
            await asyncio.sleep(0.01)
            return 3, [0.0]

    async def crowd(client: httpx.AsyncClient) -> list[httpx.Response]:
        calls = [client.post("/v1/score", json=ASKED, headers=AUTHORIZED) for _ in range(3 * OPEN_REQUESTS)]
        return await asyncio.gather(*calls)

    answers = talk(endpoint_app(Handle(Slow()), 1, TOKEN), crowd)
    statuses = [answer.status_code for answer in answers]
    assert statuses.count(200) >= OPEN_REQUESTS
    assert statuses.count(503) > 0
    assert {answer.headers.get("retry-after") for answer in answers if answer.is_error} == {"1"}


def test_no_answer_in_time_is_an_overload_and_the_replica_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    given_up: list[bool] = []

    class Hangs:
        async def score_outside(self, *given: Any) -> None:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                given_up.append(True)
                raise

    monkeypatch.setattr(services.endpoint, "ANSWER_S", 0.1)
    answer = ask(endpoint_app(Handle(Hangs()), 1, TOKEN), json=ASKED)
    assert (answer.status_code, answer.headers["retry-after"], given_up) == (503, "1", [True])


HEAD = f"POST /v1/score HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n".encode()
BODY = json.dumps(ASKED).encode()
WHOLE = HEAD + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY


def test_who_sends_slowly_or_endlessly_is_closed(replica: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    monkeypatch.setattr(services.endpoint, "REQUEST_S", 0.5)

    async def closed(port: int, first: bytes, trickle: bytes = b"") -> tuple[bytes, float]:
        """What the server sends until it closes, and when; `trickle` goes out every tenth of a second."""
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        began, answer = time.monotonic(), b""
        writer.write(first)
        while time.monotonic() - began < 20:
            try:
                more = await asyncio.wait_for(reader.read(2**16), 0.1)
            except TimeoutError:
                writer.write(trickle)
                continue
            except ConnectionResetError:
                more = b""
            answer += more
            if not more:
                break
        writer.close()
        return answer, time.monotonic() - began

    async def all_of_them() -> list[tuple[bytes, float]]:
        listening = socket.create_server(("127.0.0.1", 0))
        port = listening.getsockname()[1]
        server = asyncio.ensure_future(serve_on(listening, endpoint_app(Handle(replica), 1, TOKEN)))
        await asyncio.sleep(0.1)
        answers = await asyncio.gather(
            closed(port, b""),
            closed(port, b"POST /v1/sc", b"o"),
            closed(port, HEAD, b"X-More: x\r\n"),
            closed(port, HEAD + b"Content-Length: 100\r\n\r\n{", b" "),
            closed(port, HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
            closed(port, b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999\r\n\r\n", b" " * 1000),
            closed(port, WHOLE),
            closed(port, WHOLE, WHOLE[:9]),
        )
        server.cancel()
        return answers

    answers = asyncio.run(all_of_them())
    assert [answer[9:12] for answer, _ in answers] == [b"", b"", b"", b"408", b"408", b"401", b"200", b"200"]
    assert all(seconds < 8 for _, seconds in answers), [seconds for _, seconds in answers]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)
TEXTS = JSON | st.lists(st.text(st.characters(), max_size=40) | JSON, max_size=5)
REQUESTS = st.fixed_dictionaries(
    {},
    optional={
        "prompt": TEXTS,
        "responses": TEXTS,
        "complete": JSON,
        "disc_version": JSON | st.integers(0, 4),
    },
)
SPELLED = st.builds(
    lambda value, ascii_: json.dumps(value, ensure_ascii=ascii_), REQUESTS | JSON, st.booleans()
)
BODIES = st.binary(max_size=200) | SPELLED.map(lambda text: text.encode("utf-8", "surrogatepass"))
TORN = st.builds(
    lambda body, at, byte: body[:at] + byte + body[at:], BODIES, st.integers(0, 50), st.binary(max_size=2)
)
HEADERS = st.lists(
    st.tuples(
        st.sampled_from(
            [b"content-length", b"content-type", b"authorization", b"x-request-id", b"transfer-encoding"]
        ),
        st.binary(max_size=12),
    ),
    max_size=2,
)


def fuzzed(
    app: Any, method: str, path: str, headers: list[tuple[bytes, bytes]], body: bytes, valid: bool
) -> None:
    """One request as the application gets it from a server; JSON and no failure of the endpoint's own."""
    given = [*headers, *([(b"authorization", f"Bearer {TOKEN}".encode())] if valid else [])]
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "scheme": "http",
        "path": path, "raw_path": path.encode("utf-8", "surrogatepass"), "query_string": b"", "root_path": "",
        "headers": given, "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2),
    }  # fmt: skip
    incoming = [{"type": "http.request", "body": body, "more_body": False}]
    sent: list[Any] = []

    async def receive() -> Any:
        return incoming.pop() if incoming else {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(app(scope, receive, send))
    status = sent[0]["status"]
    answer = b"".join(message.get("body", b"") for message in sent[1:])
    assert status in (200, 503) or 400 <= status < 500
    assert method == "HEAD" or isinstance(json.loads(answer), dict)
    assert b"Traceback" not in answer


METHODS = st.just("POST") | st.sampled_from(["GET", "PUT", "HEAD", "OPTIONS", "\u00e9"])
PATHS = st.just("/v1/score") | st.sampled_from(
    ["/", "/docs", "/v1/health", "/v1/score/", "//v1/score", "/\udcff"]
)


@pytest.mark.parametrize("cases", [120, pytest.param(12_000, marks=pytest.mark.slow)])
def test_whatever_comes_is_answered_in_json(cases: int, replica: Any) -> None:
    app = endpoint_app(Handle(replica), 1, TOKEN)

    @settings(max_examples=cases, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(METHODS, PATHS, HEADERS, BODIES | TORN, st.booleans() | st.just(True))
    def run(method: str, path: str, headers: Any, body: bytes, valid: bool) -> None:
        fuzzed(app, method, path, headers, body, valid)

    run()


def test_the_run_goes_before_requests_from_outside() -> None:
    turns, order = Turns(), []

    async def outside(name: str) -> None:
        for part in range(2):
            async with turns.outside():
                order.append(f"{name}{part}")
                await asyncio.sleep(0.01)

    async def own() -> None:
        await asyncio.sleep(0.005)  # while the first part of a request from outside is worked on
        with turns.own():
            await asyncio.sleep(0.05)
            order.append("own")

    async def both() -> None:
        await asyncio.gather(outside("a"), outside("b"), own())

    asyncio.run(both())
    assert order[:2] == ["a0", "own"]
    assert sorted(order[2:]) == ["a1", "b0", "b1"]


def test_a_request_from_outside_is_scored_in_parts() -> None:
    texts = [(text, True) for text in ("a" * 30, "b" * 50, "c" * 30, "d" * 200, "e")]
    parts = [[text[0] for text, _ in part] for part in parts_of(texts, 100)]
    assert parts == [["a", "b"], ["c"], ["d"], ["e"]]
