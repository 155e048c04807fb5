"""The scoring service: a Ray Serve deployment that scores prompt groups with a named discriminator version.

Invariant: a request names its `disc_version`, all responses of a group are in one request, and the replica
either answers with exactly that version or fails, and then no request for another version with it; it fetches
versions it lacks from the version store and keeps two. A request brings up to `scoring.max_batch_groups`
groups, since each costs a round trip, and requests that arrive together are scored in one forward pass, up to
the same number.

Inside the cluster: `await handle.score.remote(version, [(prompt_text, responses), ...])`.
Outside, when asked for: `POST /v1/score` with a bearer token.
"""

import asyncio
import hmac
import logging
import os
from typing import Any, Protocol

import ray
from fastapi import FastAPI, Header, HTTPException
from pydantic import BaseModel, Field
from ray import serve
from ray.serve.handle import DeploymentHandle

from discriminator.config import DiscriminatorConfig
from discriminator.scorer import Scorer
from discriminator.versions import UnknownVersion
from learner.environment import worker_environment
from learner.memory import memory_mib
from rollout.stacks import show_stacks_on_signal

Group = tuple[str, list[tuple[str, bool]]]
"""A prompt's text and its responses, each (text, complete)."""
Request = tuple[int, list[Group]]
"""A version and the groups that it is to score."""
Answer = list[list[dict[str, Any]]]
"""Scores and spans of a request's responses, group by group."""

HTTP = FastAPI(title="rlgaf discriminator", version="1")


class ScoreRequest(BaseModel):
    """Body of `POST /v1/score`."""

    prompt: str
    """Prompt text, after the chat template."""
    responses: list[str] = Field(min_length=1, max_length=256)
    """Responses to that prompt."""
    complete: bool = True
    """False when the responses were cut by a length limit."""
    disc_version: int | None = None
    """Discriminator version to score with; the newest when left out."""


class ScoreResponse(BaseModel):
    """Answer of `POST /v1/score`: logits, larger is more human."""

    disc_version: int
    scores: list[float]


class Versions(Protocol):
    """Where a replica gets the versions it lacks."""

    def fetch(self, version: int) -> tuple[str, Any]:
        """Checksum and state (CPU tensors) of a version; blocks. Raises UnknownVersion."""

    async def newest(self) -> int:
        """The newest version there is. Raises UnknownVersion before the first."""

    async def alive(self) -> None:
        """Raises when the source does not answer in time; it may have no version yet."""


class PublishedVersions:
    """The versions of a run in training, from its version store's actor."""

    def __init__(self, store: Any, timeout_s: float) -> None:
        self.store = store
        self.timeout_s = timeout_s

    def fetch(self, version: int) -> tuple[str, Any]:
        """See `Versions`."""
        checksum, payload = ray.get(self.store.fetch.remote(version), timeout=self.timeout_s)
        return checksum, ray.get(payload[0], timeout=self.timeout_s)

    async def newest(self) -> int:
        """See `Versions`."""
        newest: int = await asyncio.wait_for(self.store.newest.remote(), self.timeout_s)
        return newest

    async def alive(self) -> None:
        """See `Versions`."""
        await asyncio.wait_for(self.store.versions.remote(), self.timeout_s)


def group_count(requests: list[Request]) -> int:
    """Size of a batch of requests, in the unit of `scoring.max_batch_groups`."""
    return sum(len(groups) for _, groups in requests)


class _Replica:
    """One scoring replica."""

    def __init__(
        self,
        config: DiscriminatorConfig,
        model: str,
        model_dtype: str,
        versions: Versions,
        threads: int,
        token: str,
    ) -> None:
        import torch

        show_stacks_on_signal()
        torch.set_num_threads(threads)
        self.scorer = Scorer(config, model, model_dtype=model_dtype)
        self.versions = versions
        self.token = token
        self._score_batch.set_max_batch_size(config.scoring.max_batch_groups)  # type: ignore[attr-defined]
        self._score_batch.set_batch_wait_timeout_s(config.scoring.batch_wait_s)  # type: ignore[attr-defined]

    async def score(self, version: int, groups: list[Group]) -> Answer:
        """Per-token scores of groups, at most `scoring.max_batch_groups` of them, by exactly `version`."""
        answer: Answer | Exception = await self._score_batch((version, groups))
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def measured_score(self, version: int, groups: list[Group]) -> tuple[Answer, float]:
        """`score`, and this replica's resident memory in MiB."""
        return await self.score(version, groups), memory_mib()["rss"]

    @serve.batch(max_batch_size=64, batch_wait_timeout_s=0.005, batch_size_fn=group_count)
    async def _score_batch(self, requests: list[Request]) -> list[Answer | Exception]:
        answers: dict[int, Answer | Exception] = {}
        for version in sorted({request[0] for request in requests}):
            numbers = [i for i, request in enumerate(requests) if request[0] == version]
            groups = [group for i in numbers for group in requests[i][1]]
            try:
                scored = iter(await asyncio.to_thread(self._score, version, groups))
            except Exception as error:  # Serve would raise it in all of the batch: the run's requests too
                answers |= dict.fromkeys(numbers, error)
            else:
                answers |= {i: [next(scored) for _ in requests[i][1]] for i in numbers}
        return [answers[i] for i in range(len(requests))]

    def _score(self, version: int, groups: list[Group]) -> Answer:
        self.scorer.ensure(version, self.versions.fetch)
        scored = self.scorer.score(version, [prompt for prompt, _ in groups], [texts for _, texts in groups])
        return [[{"scores": item.scores, "spans": item.spans} for item in group] for group in scored]

    async def check_health(self) -> None:
        """Serve's health probe: the source of versions must answer."""
        await self.versions.alive()


@serve.deployment(name="scoring")
class ScoringReplica(_Replica):
    """In-cluster deployment: handle calls only."""


@serve.deployment(name="scoring")
@serve.ingress(HTTP)
class HttpScoringReplica(_Replica):
    """The same with `POST /v1/score` in front, guarded by a bearer token."""

    @HTTP.post("/v1/score")
    async def http_score(
        self, request: ScoreRequest, authorization: str = Header(default="")
    ) -> ScoreResponse:
        """Score responses to one prompt."""
        if not hmac.compare_digest(authorization.encode(), f"Bearer {self.token}".encode()):
            raise HTTPException(status_code=401, detail="missing or wrong bearer token")
        try:  # JSON can spell what no tokenizer takes, and it would fail with all that it is scored with
            "".join([request.prompt, *request.responses]).encode()
        except UnicodeEncodeError as error:
            raise HTTPException(status_code=422, detail=f"not Unicode text: {error.reason}") from None
        version = request.disc_version
        if version is None:
            version = await self.versions.newest()
        try:
            texts = [(text, request.complete) for text in request.responses]
            [scored] = await self.score(version, [(request.prompt, texts)])
        except UnknownVersion as error:
            raise HTTPException(status_code=404, detail=f"discriminator version {version}: {error}") from None
        return ScoreResponse(disc_version=version, scores=[float(item["scores"][-1]) for item in scored])

    @HTTP.get("/v1/health")
    async def http_health(self) -> dict[str, Any]:
        """Newest version and liveness."""
        return {"disc_version": await self.versions.newest()}


def scoring_app(
    config: DiscriminatorConfig,
    model: str,
    model_dtype: str,
    versions: Versions,
    *,
    threads: int,
    use_gpu: bool,
    token: str,
) -> serve.Application:
    """The deployment that `config.scoring` asks for, bound to its source of versions."""
    scoring = config.scoring
    replica: Any = HttpScoringReplica if scoring.http else ScoringReplica
    bound: serve.Application = replica.options(
        num_replicas=scoring.replicas,
        max_ongoing_requests=4 * scoring.max_batch_groups,
        ray_actor_options={
            "num_cpus": scoring.cpus,
            "num_gpus": 1 if use_gpu else 0,
            "runtime_env": {"env_vars": worker_environment() | {"OMP_NUM_THREADS": str(threads)}},
        },
    ).bind(config, model, model_dtype, versions, threads, token)
    return bound


def deploy(
    name: str,
    config: DiscriminatorConfig,
    model: str,
    model_dtype: str,
    store: Any,
    *,
    threads: int,
    use_gpu: bool,
) -> DeploymentHandle:
    """Start the deployment (blocking) and return its handle."""
    scoring = config.scoring
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve.start(
        proxy_location="HeadOnly" if scoring.http else "Disabled",
        http_options={"host": scoring.http_host, "port": scoring.http_port},
        logging_config={"log_level": "WARNING", "enable_access_log": False},
    )
    app = scoring_app(
        config,
        model,
        model_dtype,
        PublishedVersions(store, scoring.timeout_s),
        threads=threads,
        use_gpu=use_gpu,
        token=os.environ.get(scoring.http_token, ""),
    )
    return serve.run(app, name=name, route_prefix="/" if scoring.http else None)
