"""`rlgaf evaluate` and `rlgaf generate`: a rollout worker in this process, without Ray or training."""

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from rollout.data import load_data, prompt_id, read_prompts
from rollout.engine import check_vllm_version
from rollout.prompts import evaluation_requests
from rollout.templates import Renderer, check_model, load_tokenizer
from rollout.worker import RolloutWorker
from services.answers import first_prompts, human_answers
from services.config import Config, ConfigError
from services.evaluation.extra_measures import Answers, load_extra_measures, with_extra_measures
from services.plan import local_gpus, resource_plan


def evaluate_model(config: Config, json_out: Path | None) -> None:
    """Measure `policy.model` against the test split of `data.demonstrations`; print the table, write JSON."""
    from services.evaluation.embed import make_embedder
    from services.evaluation.evaluate import evaluate_texts, human_row
    from services.report import closing_table, make_console

    if json_out is not None and json_out.exists():
        raise ConfigError(f"{json_out} exists already; nothing was overwritten")
    measures = load_extra_measures(config.evaluation.extra_measures)
    config = resource_plan(config, gpus=local_gpus()).settle(config)
    renderer = _renderer(config)
    splits = load_data(config.data, renderer)
    settings = config.evaluation
    human = first_prompts(splits.test, settings.test_prompts)
    requests = evaluation_requests(human, renderer.encode, 1, 0, settings.seed)
    sampling = {"temperature": settings.temperature, "top_p": settings.top_p}
    responses = asyncio.run(_sample(config, requests, sampling))
    answers = dict(
        zip(responses["prompt_id"].to_pylist(), responses["response_text"].to_pylist(), strict=True)
    )
    identifiers, texts = human["prompt_id"].to_pylist(), human["response"].to_pylist()
    nll = _human_nll(config, renderer, human)
    embed = make_embedder(settings.embedding_model, config.policy.model, threads=settings.embedding_threads)
    train = splits.train["response"].to_pylist()
    row = evaluate_texts(identifiers, [answers[i] for i in identifiers], texts, train, nll, settings, embed)
    floor = human_row(identifiers, texts, train, nll, settings, embed)
    if measures is not None:
        prompts = [renderer.shown(prompt) for prompt in human["prompt"].to_pylist()]
        tokens = human_answers(human, renderer, config.sampling.max_tokens)["response_ids"]
        length = pc.mean(pc.list_value_length(tokens)).as_py()
        model = [answers[i] for i in identifiers]
        row = with_extra_measures(row, measures, Answers(prompts, texts, model, train, nll, length))
        floor = with_extra_measures(floor, measures, Answers(prompts, texts, texts, train, nll, length))
    make_console().print(closing_table({"last": row, "human": floor}))
    if json_out is not None:
        json_out.write_text(
            json.dumps({"model": config.policy.model, "evaluation": row, "human": floor}, indent=2)
        )


def generate_answers(config: Config, prompts: list[str], file: Path | None) -> None:
    """Print one JSON object (prompt, response, finish_reason) per prompt."""
    config = resource_plan(config, gpus=local_gpus()).settle(config)
    renderer = _renderer(config)
    chat = config.data.prompt_format == "chat"
    texts = [renderer.render(json.dumps(prompt) if chat else prompt) for prompt in prompts]
    table = pa.table({"prompt_id": [prompt_id(text) for text in texts], "prompt_text": texts})
    if file is not None:
        read, _ = read_prompts(file, config.data, renderer)
        table = pa.concat_tables([table, read.select(["prompt_id", "prompt_text"])]) if texts else read
    requests = evaluation_requests(table, renderer.encode, 1, 0, config.evaluation.seed)
    sampling = {"temperature": config.evaluation.temperature, "top_p": config.evaluation.top_p}
    answers = {row["prompt_id"]: row for row in asyncio.run(_sample(config, requests, sampling)).to_pylist()}
    for identifier, text in zip(
        table["prompt_id"].to_pylist(), table["prompt_text"].to_pylist(), strict=True
    ):
        row = answers[identifier]
        answer = {"prompt": text, "response": row["response_text"], "finish_reason": row["finish_reason"]}
        print(json.dumps(answer, ensure_ascii=False))


def _renderer(config: Config) -> Renderer:
    try:
        check_vllm_version()
    except RuntimeError as error:
        raise ConfigError(str(error)) from None
    tokenizer = load_tokenizer(config.policy)
    check_model(config.policy, config.data, config.sampling, tokenizer)
    return Renderer(tokenizer, config.data, config.policy)


async def _sample(config: Config, requests: pa.Table, sampling: dict[str, Any]) -> pa.Table:
    plan = resource_plan(config, gpus=local_gpus())
    worker = RolloutWorker(
        0,
        config.rollout,
        config.policy,
        config.sampling,
        model=config.policy.model,
        device=plan.devices["rollout"],
        max_model_len=config.max_model_len,
        threads=os.cpu_count() or 1,
        seed=config.evaluation.seed,
    )
    await worker.start()
    try:
        return await worker.sample(requests, sampling)
    finally:
        await worker.shutdown()


def _human_nll(config: Config, renderer: Renderer, human: pa.Table) -> float:
    """Mean negative log-likelihood of the human answers, nats per token, with plain transformers and packed
    prompts.
    """
    from learner.pretrained import mean_nll

    table = human_answers(human, renderer, config.sampling.max_tokens)
    return mean_nll(config.policy, config.learner, table, temperature=config.sampling.temperature)
