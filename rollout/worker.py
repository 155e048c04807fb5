"""A rollout worker: a vLLM engine that turns prompts into trajectories and takes new weights while it runs.

Protocol of a sync, driven by the learner's rank 0: pause, start_weight_update, update_weights,
finish_weight_update(version), resume. Requests in flight are kept and continue with the new weights; new
ones wait. A worker whose update broke after it began holds half of two policies: it refuses everything and
is to be restarted. A worker that missed a sync is stale: `generate(min_version=...)` refuses until a later
sync brings it up to date.

    worker = ray.remote(RolloutWorker).options(num_cpus=...).remote(0, rollout, policy, sampling, ...)
    info = ray.get(worker.start.remote())
    table = ray.get(worker.generate.remote(requests, min_version=3))
"""

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import psutil
import pyarrow as pa

from rollout.config import PolicyConfig, RolloutConfig, SamplingConfig
from rollout.engine import (
    Device,
    check_vllm_version,
    decoder,
    end_token_id,
    engine_args,
    engine_environment,
    sampling_params,
)
from rollout.plugin import PARENT_VARIABLE
from rollout.stacks import show_stacks_on_signal
from rollout.trajectory import (
    REQUEST_SCHEMA,
    check_table,
    sample_seed,
    text_and_token_ends,
    trajectories,
    trajectory_id,
)

T = TypeVar("T")


class WorkerError(RuntimeError):
    """Something went wrong in a rollout worker; the text begins with the worker's name."""


class StaleWorkerError(WorkerError):
    """The worker has older weights than the caller accepts; it needs a sync."""


class BrokenWorkerError(WorkerError):
    """A weight update broke midway; the worker must be restarted."""


class RolloutWorker:
    """One engine. All methods are coroutines for an async Ray actor and may run concurrently.

    index: the worker's number. model: local folder or hub name whose weights are policy version `version`.
    max_model_len: longest prompt plus response in tokens. threads: OMP threads (CPU). release_together:
    queue all requests of a call while the scheduler is paused and release them at once, so that batches,
    and with request seeds the sampled tokens, do not depend on arrival times (exact mode).
    """

    def __init__(
        self,
        index: int,
        rollout: RolloutConfig,
        policy: PolicyConfig,
        sampling: SamplingConfig,
        *,
        model: str,
        device: Device,
        max_model_len: int,
        threads: int = 1,
        seed: int = 0,
        version: int = 0,
        release_together: bool = False,
    ) -> None:
        self.index = index
        self.name = f"rollout worker {index}"
        self.version = version
        self._rollout = rollout
        self._policy = policy
        self._sampling = sampling
        self._model = model
        self._device = device
        self._max_model_len = max_model_len
        self._threads = threads
        self._seed = seed
        self._release_together = release_together

        self._engine: Any = None
        self._decode: Callable[[list[int]], str] = str
        self._end_token = -1
        self._requests = 0
        self._broken = ""
        self._running = asyncio.Event()
        self._admission = asyncio.Lock()

    # Life

    async def start(self) -> dict[str, Any]:
        """Build the engine and answer one request, so that everything compiles here.

        Returns index, pid, node_ip, world_size (TP x PP), version, vllm. WorkerError at start_timeout_s.
        """
        show_stacks_on_signal()
        vllm_version = check_vllm_version()
        os.environ.update(engine_environment(self._rollout, self._device, self._threads))
        os.environ[PARENT_VARIABLE] = str(os.getpid())
        await self._deadline(self._build(), self._rollout.start_timeout_s, "start")
        import ray.util

        return {
            "index": self.index,
            "pid": os.getpid(),
            "node_ip": ray.util.get_node_ip_address(),
            "world_size": self._rollout.tensor_parallel,
            "version": self.version,
            "vllm": vllm_version,
        }

    async def _build(self) -> None:
        from transformers import AutoTokenizer
        from vllm.v1.engine.async_llm import AsyncLLM

        tokenizer: Any = AutoTokenizer.from_pretrained(
            self._model, trust_remote_code=self._policy.trust_remote_code
        )
        self._end_token = end_token_id(tokenizer, self._policy.end_of_response)
        self._decode = decoder(tokenizer)
        args = engine_args(
            self._rollout,
            self._policy,
            model=self._model,
            device=self._device,
            max_model_len=self._max_model_len,
            worker=self.name,
            seed=self._seed,
        )
        self._engine = AsyncLLM.from_engine_args(args)
        await self._engine.update_weight_version(str(self.version))
        self._running.set()
        await self._complete([([self._end_token], self._params(None, {"max_tokens": 2}))])

    async def shutdown(self) -> None:
        """End the engine and its processes. The worker cannot be started again."""
        engine, self._engine = self._engine, None
        self._running.clear()
        if engine is not None:
            engine.shutdown(timeout=10.0)

    # Generation

    async def generate(self, requests: pa.Table, min_version: int = 0) -> pa.Table:
        """`n` responses to each prompt of a REQUEST_SCHEMA table, as TRAJECTORY_SCHEMA ordered by
        trajectory id.

        Raises StaleWorkerError below `min_version`, BrokenWorkerError, ValueError for a prompt that leaves
        no room for max_tokens, WorkerError at generate_timeout_s.
        """
        return await self._sample(requests, {}, min_version)

    async def sample(self, requests: pa.Table, overrides: dict[str, Any], min_version: int = 0) -> pa.Table:
        """Like `generate` with other sampling settings, truncating ones included: for evaluation, not
        training.
        """
        return await self._sample(requests, overrides, min_version)

    async def _sample(self, requests: pa.Table, overrides: dict[str, Any], min_version: int) -> pa.Table:
        self._check_usable()
        if self.version < min_version:
            raise StaleWorkerError(
                f"{self.name} is stale: it has policy version {self.version}, {min_version} is required"
            )
        check_table(requests, REQUEST_SCHEMA, f"{self.name}: generation request")
        room = self._max_model_len - overrides.get("max_tokens", self._sampling.max_tokens)
        rows: list[dict[str, Any]] = []
        prompts = []
        for request in requests.sort_by("group_id").to_pylist():
            if not 0 < len(request["prompt_ids"]) <= room:
                raise ValueError(
                    f"{self.name}: prompt {request['prompt_id']} has {len(request['prompt_ids'])} tokens; "
                    f"1 to {room} fit into {self._max_model_len} together with the response"
                )
            for sample in range(request["n"]):
                params = self._params(sample_seed(request["seed"], sample), overrides)
                prompts.append((request["prompt_ids"], params))
                rows.append({**request, "sample": sample})
        outputs = await self._complete(prompts)
        return trajectories([self._row(row, output) for row, output in zip(rows, outputs, strict=True)])

    def _row(self, row: dict[str, Any], output: Any) -> dict[str, Any]:
        """A trajectory from a request row and vLLM's RequestOutput."""
        completion = output.outputs[0]
        ids = list(completion.token_ids)
        text, ends = text_and_token_ends(ids, self._decode)
        versions = [int(span.version) for span in completion.weight_versions]
        return {
            "trajectory_id": trajectory_id(row["group_id"], row["sample"]),
            "group_id": row["group_id"],
            "prompt_id": row["prompt_id"],
            "step": row["step"],
            "sample": row["sample"],
            "prompt_text": row["prompt_text"],
            "prompt_ids": row["prompt_ids"],
            "response_ids": ids,
            "response_logprobs": _sampled_logprobs(completion),
            "response_text": text,
            "token_ends": ends,
            "finish_reason": completion.finish_reason,
            "policy_version": min(versions),
            "policy_version_end": max(versions),
            "worker": self.index,
        }

    async def probe(self, ids: list[list[int]], max_tokens: int) -> list[tuple[list[int], list[float]]]:
        """Greedy continuation of each prompt: (token ids, their log-probabilities), for comparing weights."""
        self._check_usable()
        params = self._params(None, {"temperature": 0.0, "max_tokens": max_tokens})
        outputs = await self._complete([(prompt, params) for prompt in ids])
        return [
            (list(output.outputs[0].token_ids), _sampled_logprobs(output.outputs[0])) for output in outputs
        ]

    def _params(self, seed: int | None, overrides: dict[str, Any]) -> Any:
        return sampling_params(self._sampling, self._end_token, seed, overrides)

    async def _complete(self, prompts: list[tuple[list[int], Any]]) -> list[Any]:
        """Final RequestOutputs in the order of `prompts`; on failure nothing stays queued."""
        collectors: list[Any] = []
        work = self._queue_and_collect(prompts, collectors)
        try:
            return await self._deadline(work, self._rollout.generate_timeout_s, "generate")
        except BaseException:
            if self._engine is not None and not self._engine.errored:
                await self._engine.abort([c.request_id for c in collectors], internal=True)
            raise

    async def _queue_and_collect(
        self, prompts: list[tuple[list[int], Any]], collectors: list[Any]
    ) -> list[Any]:
        """Queue in order, one after the other: the scheduler's order must not depend on task switching."""
        if not self._release_together:
            await self._queue(prompts, collectors)
        else:
            async with self._admission:  # a sync's pause must not fall between this pause and its release
                await self._running.wait()
                await self._engine.pause_generation(mode="keep", clear_cache=False)
                try:
                    await self._queue(prompts, collectors)
                finally:
                    await self._engine.resume_generation()
        return [await collector.get() for collector in collectors]

    async def _queue(self, prompts: list[tuple[list[int], Any]], collectors: list[Any]) -> None:
        from vllm.inputs import tokens_input

        for ids, params in prompts:
            self._requests += 1
            request_id = f"{self.index}-{self._requests}"
            collectors.append(await self._engine.add_request(request_id, tokens_input(ids), params))

    # Weight sync

    async def pause(self) -> None:
        """Stop scheduling, keep requests in flight, and drop the prefix cache: its entries are the old
        policy's.
        """
        self._check_usable()
        async with self._admission:
            self._running.clear()
            await self._sync_call("pause", self._engine.pause_generation(mode="keep", clear_cache=True))

    async def resume(self) -> None:
        """Continue requests in flight and admit new ones."""
        self._check_usable()
        await self._sync_call("resume", self._engine.resume_generation())
        self._running.set()

    async def init_weight_transfer(self, init_info: dict[str, Any]) -> None:
        """Join the learner's weight-transfer group; a former group is left."""
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        self._check_usable()
        request = WeightTransferInitRequest(init_info=init_info)
        await self._sync_call("init_weight_transfer", self._engine.init_weight_transfer_engine(request))

    async def start_weight_update(self) -> None:
        """From here until finish_weight_update the weights are neither version; a failure breaks the
        worker.
        """
        self._check_usable()
        if self._running.is_set():
            raise WorkerError(f"{self.name}: start_weight_update without pause")
        await self._update_call("start_weight_update", self._engine.start_weight_update())

    async def update_weights(self, update_info: dict[str, Any]) -> None:
        """Receive, check and load the weights that the learner broadcasts."""
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        self._check_usable()
        request = WeightTransferUpdateRequest(update_info=update_info)
        await self._update_call("update_weights", self._engine.update_weights(request))

    async def finish_weight_update(self, version: int) -> None:
        """Process what is left to process; tokens sampled from now on carry `version`."""
        self._check_usable()
        await self._update_call("finish_weight_update", self._engine.finish_weight_update(str(version)))
        self.version = version

    async def sync_timings(self) -> dict[str, float]:
        """Seconds of the last sync: wire_s, checksum_s, load_s, finalize_s; the slowest rank's where there
        are more. And memory_mib, resident in this process and its engine's, which costs no call of its own.
        """
        ranks = await self._sync_call("sync_timings", self._engine.collective_rpc("rlgaf_sync_timings"))
        timings = {key: max(rank[key] for rank in ranks) for key in ranks[0]}
        return timings | {"memory_mib": resident_mib()}

    async def policy_version(self) -> int:
        """The version that the engine itself reports."""
        return int(await self._sync_call("policy_version", self._engine.get_weight_version()))

    async def _update_call(self, what: str, call: Awaitable[T]) -> T:
        try:
            return await self._sync_call(what, call)
        except BaseException as error:
            self._broken = f"{what} failed: {error}"
            raise

    async def _sync_call(self, what: str, call: Awaitable[T]) -> T:
        return await self._deadline(call, self._rollout.sync_timeout_s, what)

    def _check_usable(self) -> None:
        if self._broken:
            raise BrokenWorkerError(
                f"{self.name} must be restarted, its last weight update broke: {self._broken}"
            )
        if self._engine is None:
            raise WorkerError(f"{self.name} is not running")

    async def _deadline(self, call: Awaitable[T], seconds: float, what: str) -> T:
        """Await with a deadline; every error from the engine comes out as a WorkerError with the worker's
        name.
        """
        try:
            return await asyncio.wait_for(call, seconds)
        except TimeoutError:
            raise WorkerError(f"{self.name}: {what} took longer than {seconds:g} s") from None
        except WorkerError:
            raise
        except Exception as error:
            raise WorkerError(f"{self.name}: {what} failed: {type(error).__name__}: {error}") from None


def resident_mib() -> float:
    """Resident memory of this process and all below it, in MiB: vLLM's engine and ranks are its children."""
    own = psutil.Process()
    total = 0
    for process in [own, *own.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):  # one that ended meanwhile holds nothing
            total += process.memory_info().rss
    return total / 2**20


def _sampled_logprobs(completion: Any) -> list[float]:
    """Log-probability of each sampled token of a vLLM completion."""
    return [
        entry[token].logprob for token, entry in zip(completion.token_ids, completion.logprobs, strict=True)
    ]
