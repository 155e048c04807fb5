"""`POST /v1/score` in front of the scoring replicas, for callers outside the cluster.

Invariant: nothing of a request is read before its bearer token is known to be right, and what is read, waits
or is scored has a bound in bytes, number and time. Whatever comes, the answer is JSON: 200, a 4xx that says
what is wrong with the request, or 503 with `Retry-After`. A replica answers the run's own requests first
(`services.scoring`), and then one part of a request from here at a time.

A run in training opens its own port, in a process of its own that yields the processor to the others. A
finished run's discriminator is served through Ray Serve's proxies (`services.serving`), which hold whole
bodies before a replica sees a header; `proxy_middleware` puts the same limits into them.
"""

import asyncio
import hmac
import logging
import os
import socket
import time
from collections.abc import Awaitable
from typing import Any

import h11
import ray
import uvicorn
from pydantic import BaseModel, Field, NonNegativeInt, ValidationError
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from discriminator.config import ScoringConfig
from discriminator.versions import UnknownVersion

BODY_BYTES = 2**20
"""Largest body."""
REQUEST_S = 10.0
"""Within which a request must have come, wherever in it the client stops."""
ANSWER_S = 30.0
"""Within which an admitted request is answered or refused."""
OPEN_REQUESTS = 64
"""Requests with the right token that are read, wait or are scored."""
REPLICA_REQUESTS = 8
"""Of these, the requests at each replica, which works on their parts in turn."""
CONNECTIONS = 512
"""Connections of an endpoint with a port of its own."""
WITHOUT_TOKEN = ("/v1/health", "/-/healthz", "/-/routes")
"""What probes ask; answered without reading a body."""


class ScoreRequest(BaseModel):
    """Body of `POST /v1/score`."""

    prompt: str
    """Prompt text, after the chat template."""
    responses: list[str] = Field(min_length=1, max_length=256)
    """Responses to that prompt."""
    complete: bool = True
    """False when the responses were cut by a length limit."""
    disc_version: NonNegativeInt | None = None
    """Discriminator version to score with; the newest that a replica holds when left out."""


def refusal(status: int, detail: Any, *, close: bool = False) -> Response:
    """A JSON answer to a request that is not served."""
    headers = {401: {"WWW-Authenticate": "Bearer"}, 503: {"Retry-After": "1"}}.get(status, {})
    if close:
        headers = headers | {"Connection": "close"}
    return JSONResponse({"detail": detail}, status, headers)


class Guard:
    """ASGI middleware: token, then length, then a place, then the body within its deadline.

    Args:
        app: what gets requests that passed, each with its whole body.
        token: bearer token that each must bring; None where `app` asks for it.
    """

    def __init__(self, app: ASGIApp, token: str | None) -> None:
        self.app = app
        self.token = token
        self.open = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the ASGI specification."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        elif scope["type"] != "http" or scope["path"] in WITHOUT_TOKEN:
            await self.app(scope, receive, send)
        elif refused := self._refused(Headers(scope=scope)):
            await refused(scope, receive, send)
        else:
            self.open += 1
            try:
                await self._admitted(scope, receive, send)
            finally:
                self.open -= 1

    def _refused(self, headers: Headers) -> Response | None:
        given = headers.get("authorization", "").encode("latin-1")
        if self.token is not None and not hmac.compare_digest(given, f"Bearer {self.token}".encode()):
            return refusal(401, "missing or wrong bearer token")
        length = headers.get("content-length", "0")
        if not (length.isascii() and length.isdigit()):
            return refusal(400, "Content-Length is not a number", close=True)
        if len(length) > 9 or int(length) > BODY_BYTES:
            return refusal(413, f"the body is larger than {BODY_BYTES} bytes", close=True)
        if self.open >= OPEN_REQUESTS:
            return refusal(503, f"{self.open} requests are being answered; try again later")
        return None

    async def _admitted(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with asyncio.timeout(REQUEST_S):
                body = await _body(receive)
        except TimeoutError:
            late = refusal(408, f"the body did not come within {REQUEST_S:g} s", close=True)
            await late(scope, receive, send)
            return
        except _TooLarge:
            large = refusal(413, f"the body is larger than {BODY_BYTES} bytes", close=True)
            await large(scope, receive, send)
            return
        if body is not None:
            whole = [{"type": "http.request", "body": body, "more_body": False}]

            async def again() -> Message:
                return whole.pop() if whole else await receive()

            await self.app(scope, again, send)


class _TooLarge(Exception):
    """A body that does not say its length, or lies about it."""


async def _body(receive: Receive) -> bytes | None:
    """The whole body; None when the client has gone."""
    parts = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts += message.get("body", b"")
        if len(parts) > BODY_BYTES:
            raise _TooLarge
        if not message.get("more_body", False):
            return bytes(parts)


class Endpoint:
    """The two routes, in front of a handle to the scoring deployment."""

    def __init__(self, scoring: Any, replicas: int) -> None:
        self.scoring = scoring
        self._places = asyncio.Semaphore(REPLICA_REQUESTS * replicas)
        self._asking = asyncio.Lock()
        self._newest = (-1.0, 0)

    async def score(self, request: Request) -> Response:
        """Score responses to one prompt."""
        try:
            asked = ScoreRequest.model_validate_json(await request.body())
        except ValidationError as error:
            problems = error.errors(include_url=False, include_context=False, include_input=False)
            return refusal(422, problems)
        texts = [(text, asked.complete) for text in asked.responses]
        try:
            async with asyncio.timeout(ANSWER_S), self._places:
                call = self.scoring.score_outside.remote(asked.disc_version, asked.prompt, texts)
                version, scores = await _answer(call)
        except UnknownVersion as error:
            return refusal(503 if asked.disc_version is None else 404, str(error.args[0]))
        except TimeoutError:
            return refusal(503, f"no answer within {ANSWER_S:g} s; the replicas are busy with other work")
        except (RayError, RayServeException):
            return refusal(503, "no scoring replica can answer at the moment")
        return JSONResponse({"disc_version": version, "scores": scores})

    async def health(self, request: Request) -> Response:
        """Newest version and liveness; the replicas are asked once a second at most."""
        try:
            async with asyncio.timeout(REQUEST_S), self._asking:
                if time.monotonic() > self._newest[0]:
                    newest = await _answer(self.scoring.newest.remote())
                    self._newest = (time.monotonic() + 1.0, newest)
        except UnknownVersion as error:
            return refusal(503, str(error.args[0]))
        except (TimeoutError, RayError, RayServeException):
            return refusal(503, "no scoring replica can answer at the moment")
        return JSONResponse({"disc_version": self._newest[1]})


async def _answer(call: Any) -> Any:
    """What a Serve response resolves to; the replica gives up when the caller does."""
    try:
        return await call
    except asyncio.CancelledError:
        call.cancel()
        raise


async def _problem(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        return refusal(error.status_code, error.detail)
    return refusal(500, "internal error; the endpoint's log has more")


def endpoint_app(scoring: Any, replicas: int, token: str) -> ASGIApp:
    """The ASGI application in front of a handle to `replicas` scoring replicas.

    Raises:
        ValueError: an empty token, which anybody could bring.
    """
    if not token:
        raise ValueError("the scoring endpoint needs a bearer token")
    endpoint = Endpoint(scoring, replicas)
    app = Starlette(
        routes=[
            Route("/v1/score", endpoint.score, methods=["POST"]),
            Route("/v1/health", endpoint.health, methods=["GET"]),
        ],
        middleware=[Middleware(Guard, token=token)],
        exception_handlers={HTTPException: _problem, Exception: _problem},
    )
    app.router.redirect_slashes = False
    return app


def proxy_middleware() -> list[Middleware]:
    """The limits inside of Ray Serve's proxies: `RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH` names this. A
    proxy whose environment has no token leaves that to the endpoint behind it."""
    return [Middleware(Guard, token=os.environ.get(ScoringConfig().http_token) or None)]


_FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
)


class _Connection(H11Protocol):
    """A connection that is closed when no whole request comes in time: uvicorn waits for headers for ever."""

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > CONNECTIONS:
            transport.write(_FULL)
            transport.close()
        else:
            self._expect()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._expect()

    def _expect(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = self.loop.call_later(REQUEST_S + 1, self._check)

    def _check(self) -> None:
        if self.conn.their_state in (h11.IDLE, h11.SEND_BODY):
            self.transport.abort()


class Door:
    """The process that listens: an actor of one run, on the head node."""

    async def open(self, scoring: Any, replicas: int, host: str, port: int, token: str) -> int:
        """Listen; returns the port.

        Raises:
            RuntimeError: nobody can listen there.
        """
        os.nice(10)  # of this thread: the run's processes come first where they share processors
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((host, port))
        except OSError as error:
            raise RuntimeError(
                f"the scoring endpoint cannot listen on {host}:{port}: {error.strerror}; "
                "change discriminator.scoring.http_port or http_host"
            ) from None
        app = endpoint_app(scoring, replicas, token)
        self.server = serve_on(listening, app)
        return int(listening.getsockname()[1])


def serve_on(listening: socket.socket, app: ASGIApp) -> Awaitable[None]:
    """Answer connections of a bound socket until the returned task is cancelled."""
    config = uvicorn.Config(
        app,
        http=_Connection,
        ws="none",
        lifespan="off",
        timeout_keep_alive=5,
        h11_max_incomplete_event_size=2**15,
        proxy_headers=False,
        server_header=False,
        access_log=False,
        log_config=None,
        log_level="critical",
    )
    return asyncio.ensure_future(uvicorn.Server(config).serve(sockets=[listening]))


def open_door(scoring: Any, config: ScoringConfig) -> tuple[Any, str]:
    """Open a run's endpoint in a process of its own (blocking); returns the actor that ends it and its URL.

    Raises:
        RuntimeError: nobody can listen there.
    """
    head = {"node:__internal_head__": 0.001}
    door = ray.remote(Door).options(num_cpus=0, resources=head).remote()
    token = os.environ.get(config.http_token, "")
    host = config.http_host
    try:
        opening = door.open.remote(scoring, config.replicas, host, config.http_port, token)  # type: ignore[attr-defined]
        port = ray.get(opening, timeout=config.timeout_s)
    except ray.exceptions.RayTaskError as error:
        raise RuntimeError(str(error.cause)) from None
    return door, f"http://{f'[{host}]' if ':' in host else host}:{port}/v1/score"
