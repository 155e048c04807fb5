"""`rlgaf evaluate` and `rlgaf generate`: a rollout worker in this process, without Ray or training."""

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from rollout.data import (
    DataError,
    identity,
    load_data,
    prompt_id,
    read_demonstrations,
    read_prompts,
)
from rollout.engine import check_vllm_version
from rollout.printable import printable
from rollout.prompts import evaluation_requests
from rollout.templates import Renderer, load_tokenizer
from rollout.worker import RolloutWorker
from services.answers import TEXTS, first_prompts, human_answers, side_by_side
from services.config import Config, ConfigError
from services.evaluation.extra_measures import Answers, load_extra_measures, with_extra_measures
from services.model_checks import Use, check_embedding_model, check_policy
from services.plan import local_gpus, resource_plan

LEAST_PROMPTS = 8
"""What the human floor needs: two halves of four."""


def evaluate_model(config: Config, json_out: Path | None, test_split: bool) -> None:
    """Measure `policy.model` against `data.demonstrations`, or against its test split alone; print the table,
    write JSON.
    """
    from learner.pretrained import mean_nll
    from services.evaluation.embed import make_embedder
    from services.evaluation.evaluate import evaluate_texts, human_row
    from services.report import closing_table, make_console

    if json_out is not None and json_out.exists():
        raise ConfigError(f"{json_out} exists already; nothing was overwritten")
    if json_out is not None and not json_out.absolute().parent.is_dir():
        raise ConfigError(f"--json {json_out}: there is no folder {json_out.absolute().parent}")
    settings, limit = config.evaluation, config.sampling.max_tokens
    measures = load_extra_measures(settings.extra_measures)
    config = resource_plan(config, gpus=local_gpus()).settle(config)
    renderer = _renderer(config, "evaluate")
    check_embedding_model(config)
    human, train = _demonstrations(config, renderer, test_split)
    requests = evaluation_requests(human, renderer.encode, settings.samples_per_prompt, 0, settings.seed)
    sampling = config.evaluation_sampling
    responses = asyncio.run(_sample(config, requests, sampling))
    texts = side_by_side(human, responses, renderer)
    identifiers, prompts, person, model = (texts[name].to_pylist() for name in TEXTS.names)
    tokens = human_answers(human, renderer, limit, config.discriminator.canonical)
    nll = mean_nll(config.policy, config.learner, tokens, temperature=config.sampling.temperature)
    embed = make_embedder(
        settings.embedding_model,
        config.policy.model,
        threads=settings.embedding_threads,
        max_tokens=settings.embedding_max_tokens,
        trust_remote_code=config.policy.trust_remote_code,
    )
    row = evaluate_texts(identifiers, model, person, train, nll, settings, embed)
    floor = human_row(identifiers, person, train, nll, settings, embed)
    if not train:
        unknown = {"copy_rate": None, "copy_ngram_rate": None}
        row, floor = row | unknown, floor | unknown
    if measures is not None:
        length = pc.mean(pc.list_value_length(tokens["response_ids"])).as_py()
        row = with_extra_measures(row, measures, Answers(prompts, person, model, train, nll, length))
        floor = with_extra_measures(floor, measures, Answers(prompts, person, person, train, nll, length))
    what = f"{row['prompts']} {'test ' if test_split else ''}prompts of {config.data.demonstrations}"
    make_console().print(closing_table({"last": row, "human": floor}, what))
    if json_out is not None:
        found = {"model": config.policy.model, "demonstrations": what, "evaluation": row, "human": floor}
        json_out.write_text(json.dumps(found, indent=2))


def _demonstrations(config: Config, renderer: Renderer, test_split: bool) -> tuple[pa.Table, list[str]]:
    """The demonstrations to compare with, up to `evaluation.test_prompts` prompts of the whole file or of its
    test split, and the answers that copying is measured against: the training split's, beside a test split.

    Raises:
        DataError: the file cannot be read, or there are too few prompts for a classifier.
    """
    data, train = config.data.model_copy(update={"prompts": "", "preferences": ""}), pa.table({})
    if test_split:
        splits = load_data(data, renderer)
        human, train = splits.test, splits.train
    else:
        human, _ = read_demonstrations(data.demonstrations, data, renderer)
    human = first_prompts(human, config.evaluation.test_prompts)
    prompts = pc.count_distinct(human["prompt_id"]).as_py()
    if prompts < LEAST_PROMPTS:
        where = f"the test split of {data.demonstrations}" if test_split else data.demonstrations
        raise DataError(f"{where} has {prompts} prompts; an evaluation needs at least {LEAST_PROMPTS}")
    return human, train["response"].to_pylist() if test_split else []


def generate_answers(config: Config, prompts: list[str], file: Path | None) -> None:
    """Print one JSON object (prompt, response, finish_reason) per prompt."""
    config = resource_plan(config, gpus=local_gpus()).settle(config)
    renderer = _renderer(config, "generate")
    chat = config.data.prompt_format == "chat"
    given = [json.dumps(prompt) if chat else prompt for prompt in prompts]
    texts = [renderer.render(prompt) for prompt in given]
    for number, complaint in enumerate(renderer.check_lengths(texts), 1):
        if complaint is not None:
            raise DataError(f"--prompt number {number}: {complaint}")
    ids = [prompt_id(identity(prompt, config.data)) for prompt in given]
    table = pa.table({"prompt_id": ids, "prompt_text": texts})
    if file is not None:
        read, _ = read_prompts(file, config.data, renderer)
        table = pa.concat_tables([table, read.select(["prompt_id", "prompt_text"])]) if texts else read
    requests = evaluation_requests(table, renderer.encode, 1, 0, config.evaluation.seed)
    sampling = config.evaluation_sampling
    answers = {row["prompt_id"]: row for row in asyncio.run(_sample(config, requests, sampling)).to_pylist()}
    for identifier, text in zip(
        table["prompt_id"].to_pylist(), table["prompt_text"].to_pylist(), strict=True
    ):
        row = answers[identifier]
        answer = {"prompt": text, "response": row["response_text"], "finish_reason": row["finish_reason"]}
        print(printable(json.dumps(answer, ensure_ascii=False)))


def _renderer(config: Config, use: Use) -> Renderer:
    try:
        check_vllm_version()
    except RuntimeError as error:
        raise ConfigError(str(error)) from None
    tokenizer = load_tokenizer(config.policy)
    check_policy(config, tokenizer, use)
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
