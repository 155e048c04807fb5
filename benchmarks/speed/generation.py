"""Generation: rlgaf's rollout worker against vLLM alone, same prompts.

vLLM alone gets one request with n samples per prompt and does not detokenise; the worker queues each
sample by itself and delivers texts, token ends and an Arrow table besides. Two forms have the worker's own
engine settings, so that only the worker's work is compared; one has vLLM's defaults for a CPU, whose blocks
of 128 tokens share no prompt shorter than that. Prefix caches are emptied before every turn.
"""

import asyncio
import os
from typing import Any

from benchmarks.speed.contender import Result, Timer
from benchmarks.speed.tables import request_table, sampling_overrides
from benchmarks.speed.workload import Workload
from rollout.config import PolicyConfig, RolloutConfig, SamplingConfig
from rollout.engine import engine_args, engine_environment
from rollout.worker import RolloutWorker


def make_worker(workload: Workload) -> RolloutWorker:
    """A rollout worker that is not yet started, and no Ray actor."""
    return RolloutWorker(0, **worker_arguments(workload))


def worker_arguments(workload: Workload) -> dict[str, Any]:
    """Constructor arguments of the benchmark's rollout worker."""
    return {
        "rollout": RolloutConfig(start_timeout_s=600, generate_timeout_s=3600),
        "policy": PolicyConfig(model=workload.model, dtype=workload.dtype),
        "sampling": SamplingConfig(group_size=workload.group_size, max_tokens=workload.response_tokens),
        "model": workload.model,
        "device": "cpu",
        "max_model_len": workload.max_model_len,
        "threads": workload.threads,
    }


def _rate(workload: Workload, seconds: float, tokens: int) -> Result:
    if tokens != workload.new_tokens:
        raise RuntimeError(f"{tokens} tokens were generated instead of {workload.new_tokens}")
    return {"seconds": seconds, "tokens_per_s": tokens / seconds}


class Ours:
    """`RolloutWorker.sample` in this process (vLLM's engine has its own)."""

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        self.runner = asyncio.Runner()
        self.worker = make_worker(workload)
        self.runner.run(self.worker.start())

    def turn(self, number: int) -> Result:
        return self.runner.run(self._turn(number))

    async def _turn(self, number: int) -> Result:
        await self.worker.pause()  # empties the prefix cache, as every sync does
        await self.worker.resume()
        requests = request_table(self.workload, number)
        with Timer() as timer:
            table = await self.worker.sample(requests, sampling_overrides(self.workload))
        return _rate(self.workload, timer.seconds, sum(map(len, table["response_ids"].to_pylist())))

    def close(self) -> None:
        self.runner.run(self.worker.shutdown())
        self.runner.close()


TUNED = ("block_size", "enable_chunked_prefill", "max_num_batched_tokens")
"""Engine arguments in which a worker's CPU engine differs from vLLM's defaults."""


def _bare_settings(workload: Workload, *, tuned: bool) -> dict[str, Any]:
    """Engine arguments; `tuned`: those in `TUNED` are the worker's, else vLLM's defaults."""
    rollout = RolloutConfig()
    os.environ.update(engine_environment(rollout, "cpu", workload.threads))
    worker = engine_args(
        rollout,
        PolicyConfig(model=workload.model, dtype=workload.dtype),
        model=workload.model,
        device="cpu",
        max_model_len=workload.max_model_len,
        worker="benchmark",
    )
    same = (
        "model",
        "dtype",
        "max_model_len",
        "max_num_seqs",
        "enforce_eager",
        "enable_prefix_caching",
        "logprobs_mode",
        "disable_log_stats",
    )
    return {name: getattr(worker, name) for name in (*same, *(TUNED if tuned else ()))}


def _bare_params(workload: Workload) -> list[Any]:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return [
        SamplingParams(
            n=workload.group_size,
            temperature=1.0,
            logprobs=0,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            **sampling_overrides(workload),
        )
        for _ in workload.prompts
    ]


class BareAsync:
    """`AsyncLLM.generate` with the worker's settings, one task per prompt."""

    tuned = True

    def __init__(self, workload: Workload) -> None:
        settings = _bare_settings(workload, tuned=self.tuned)
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        self.workload = workload
        self.runner = asyncio.Runner()

        async def build() -> AsyncLLM:
            return AsyncLLM.from_engine_args(AsyncEngineArgs(**settings))

        self.engine = self.runner.run(build())

    def turn(self, number: int) -> Result:
        return self.runner.run(self._turn(number))

    async def _turn(self, number: int) -> Result:
        from vllm.inputs import tokens_input

        await self.engine.reset_prefix_cache()
        params = _bare_params(self.workload)

        async def one(index: int) -> int:
            prompt = tokens_input(self.workload.prompt_ids[index])
            async for output in self.engine.generate(prompt, params[index], f"{number}-{index}"):
                final = output
            return sum(len(completion.token_ids) for completion in final.outputs)

        with Timer() as timer:
            counts = await asyncio.gather(*map(one, range(len(params))))
        return _rate(self.workload, timer.seconds, sum(counts))

    def close(self) -> None:
        self.engine.shutdown()


class DefaultAsync(BareAsync):
    """The same with vLLM's defaults."""

    tuned = False


class BareOffline:
    """`LLM.generate` with the worker's settings, the whole engine in this process."""

    def __init__(self, workload: Workload) -> None:
        settings = _bare_settings(workload, tuned=True)
        from vllm import LLM

        self.workload = workload
        self.llm = LLM(**settings)

    def turn(self, number: int) -> Result:
        from vllm.inputs import tokens_input

        self.llm.reset_prefix_cache()
        prompts: Any = [tokens_input(ids) for ids in self.workload.prompt_ids]
        params = _bare_params(self.workload)
        with Timer() as timer:
            outputs = self.llm.generate(prompts, params, use_tqdm=False)
        tokens = sum(len(completion.token_ids) for output in outputs for completion in output.outputs)
        return _rate(self.workload, timer.seconds, tokens)

    def close(self) -> None:
        del self.llm
