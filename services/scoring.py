"""The scoring service: a Ray Serve deployment that scores prompt groups with a named discriminator version.

Invariant: a request names its `disc_version`, all responses of a group are in one request, and the replica
either answers with exactly that version or fails, and then no request for another version with it; it fetches
versions it lacks from the version store and keeps two. A request brings up to `scoring.max_batch_groups`
groups, since each costs a round trip, and requests that arrive together are scored in one forward pass, up to
the same number.

Two kinds of requests: the run's own, `await handle.score.remote(version, [(prompt_text, responses), ...])`,
and those from outside the cluster (`services.endpoint`). The latter wait while one of the former is here, are
worked on in small parts, and never change which versions a run's replica holds.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Protocol

import ray
from ray import serve
from ray.exceptions import ActorDiedError
from ray.serve.handle import DeploymentHandle

from discriminator.canonical import Encoded
from discriminator.config import DiscriminatorConfig
from discriminator.scorer import Scorer
from discriminator.versions import UnknownVersion
from learner.environment import worker_environment
from learner.memory import memory_mib
from rollout.stacks import show_stacks_on_signal

Group = tuple[str, list[tuple[str, bool]]]
"""A prompt's text and its responses, each (text, complete)."""
Request = tuple[int, list[list[Encoded]]]
"""A version and the encoded groups that it is to score."""
Answer = list[list[dict[str, Any]]]
"""Scores and spans of a request's responses, group by group."""

DEPLOYMENT = "scoring"
"""Name of the replicas' deployment within its application."""
PART_CHARACTERS = 4096
"""Characters of responses from outside that are scored without a look whether the run waits."""


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
        """See `Versions`. The application of a run that was killed ends itself: no other knows its name."""
        try:
            await asyncio.wait_for(self.store.versions.remote(), self.timeout_s)
        except ActorDiedError:
            await asyncio.to_thread(serve.delete, serve.get_replica_context().app_name, _blocking=False)
            raise


def group_count(requests: list[Request]) -> int:
    """Size of a batch of requests, in the unit of `scoring.max_batch_groups`."""
    return sum(len(groups) for _, groups in requests)


class Turns:
    """Lets requests from outside go on one at a time, and only while none of the run's own is here."""

    def __init__(self) -> None:
        self._own = 0
        self._none_own = asyncio.Event()
        self._none_own.set()
        self._outside = asyncio.Lock()

    @contextmanager
    def own(self) -> Iterator[None]:
        """While a request of the run is here."""
        self._own += 1
        self._none_own.clear()
        try:
            yield
        finally:
            self._own -= 1
            if not self._own:
                self._none_own.set()

    @asynccontextmanager
    async def outside(self) -> AsyncIterator[None]:
        """For one part of a request from outside."""
        async with self._outside:
            while self._own:
                await self._none_own.wait()
            yield


def parts_of(texts: list[tuple[str, bool]], characters: int) -> Iterator[list[tuple[str, bool]]]:
    """Consecutive texts of up to so many characters together, one at the least."""
    part: list[tuple[str, bool]] = []
    for text in texts:
        if part and sum(len(t) for t, _ in part) + len(text[0]) > characters:
            yield part
            part = []
        part.append(text)
    yield part


@serve.deployment(name=DEPLOYMENT)
class ScoringReplica:
    """One scoring replica."""

    def __init__(
        self, config: DiscriminatorConfig, model: str, model_dtype: str, versions: Versions, threads: int
    ) -> None:
        import torch

        show_stacks_on_signal()
        torch.set_num_threads(threads)
        self.scorer = Scorer(config, model, model_dtype=model_dtype)
        self.versions = versions
        self.turns = Turns()
        self._score_batch.set_max_batch_size(config.scoring.max_batch_groups)  # type: ignore[attr-defined]
        self._score_batch.set_batch_wait_timeout_s(config.scoring.batch_wait_s)  # type: ignore[attr-defined]

    async def score(self, version: int, groups: list[Group]) -> Answer:
        """Per-token scores of groups, at most `scoring.max_batch_groups` of them, by exactly `version`."""
        with self.turns.own():
            encoded = await asyncio.to_thread(lambda: [self.scorer.encode(*group) for group in groups])
            answer: Answer | Exception = await self._score_batch((version, encoded))
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
            except Exception as error:  # Serve would raise it in all of the batch
                answers |= dict.fromkeys(numbers, error)
            else:
                answers |= {i: [next(scored) for _ in requests[i][1]] for i in numbers}
        return [answers[i] for i in range(len(requests))]

    def _score(self, version: int, groups: list[list[Encoded]]) -> Answer:
        self.scorer.ensure(version, self.versions.fetch)
        scored = self.scorer.score_encoded(version, groups)
        return [[{"scores": item.scores, "spans": item.spans} for item in group] for group in scored]

    async def score_outside(
        self, version: int | None, prompt: str, texts: list[tuple[str, bool]]
    ) -> tuple[int, list[float]]:
        """Version and sequence scores of a request from outside: by the newest version held where it names
        none.

        Raises:
            UnknownVersion: the version named is not held, or there is none yet.
        """
        named = await self._held(version)
        scores: list[float] = []
        for part in parts_of(texts, PART_CHARACTERS):
            async with self.turns.outside():
                [scored] = await asyncio.to_thread(self.scorer.score, named, [prompt], [part])
            scores += [float(item.scores[-1]) for item in scored]
        return named, scores

    async def _held(self, version: int | None) -> int:
        """A version that is held; only a replica that the run has not asked yet fetches one."""
        held = self.scorer.versions()
        if not held:
            wanted = await self.versions.newest() if version is None else version
            await asyncio.to_thread(self.scorer.ensure, wanted, self.versions.fetch)
            return wanted
        if version is not None and version not in held:
            raise UnknownVersion(f"discriminator version {version} is not held; held: {held}")
        return max(held) if version is None else version

    async def newest(self) -> int:
        """The newest version there is. Raises UnknownVersion before the first."""
        return await self.versions.newest()

    async def check_health(self) -> None:
        """Serve's health probe: the source of versions must answer."""
        await self.versions.alive()


def scoring_app(
    config: DiscriminatorConfig,
    model: str,
    model_dtype: str,
    versions: Versions,
    *,
    threads: int,
    use_gpu: bool,
) -> serve.Application:
    """The deployment that `config.scoring` asks for, bound to its source of versions."""
    scoring = config.scoring
    bound: serve.Application = ScoringReplica.options(  # type: ignore[attr-defined]
        num_replicas=scoring.replicas,
        max_ongoing_requests=4 * scoring.max_batch_groups,
        ray_actor_options={
            "num_cpus": scoring.cpus,
            "num_gpus": 1 if use_gpu else 0,
            "runtime_env": {"env_vars": worker_environment() | {"OMP_NUM_THREADS": str(threads)}},
        },
    ).bind(config, model, model_dtype, versions, threads)
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
    """Start the deployment under a name that is unique on the cluster (blocking); returns its handle."""
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve.start(
        proxy_location="Disabled",
        logging_config={"log_level": "WARNING", "enable_access_log": False},
    )
    versions = PublishedVersions(store, config.scoring.timeout_s)
    app = scoring_app(config, model, model_dtype, versions, threads=threads, use_gpu=use_gpu)
    return serve.run(app, name=name, route_prefix=None)
