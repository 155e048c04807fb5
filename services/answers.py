"""The human answers an evaluation looks at, the policy's beside them, and the human ones' tokens for their
likelihood. Read only, but for the baseline `sft`, which trains on those of the training split.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from discriminator.canonical import normalise
from discriminator.config import CanonicalConfig
from rollout.templates import Renderer

TEXTS = pa.schema([(name, pa.string()) for name in ("prompt_id", "prompt", "human", "model")])


def human_answers(
    split: pa.Table, renderer: Renderer, max_tokens: int, canonical: CanonicalConfig
) -> pa.Table:
    """Columns group_id, prompt_ids, response_ids: each response in the spelling that the discriminator reads
    (where a special token is letters), with its end token, cut to `max_tokens`. Whitespace before a response
    stays as it is: there it belongs between prompt and response, and the policy writes it too.
    """
    spelled = [_spelled(text, canonical) for text in split["response"].to_pylist()]
    encoded = renderer.tokenizer(spelled, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    responses = [[*ids, renderer.end_id][:max_tokens] for ids in encoded]
    prompts = [renderer.encode(text) for text in split["prompt_text"].to_pylist()]
    return pa.table(
        {
            "group_id": split["prompt_id"],
            "prompt_ids": pa.array(prompts, pa.list_(pa.int32())),
            "response_ids": pa.array(responses, pa.list_(pa.int32())),
        }
    )


@dataclass(frozen=True)
class HumanNLL:
    """How unlikely human answers are to a policy: negative log-likelihoods, nats."""

    per_token: float
    """Mean over all tokens."""
    tail: float
    """Mean over the least likely tenth of the answers, per answer. A policy that drops some of the humans'
    ways to answer makes these unlikely first, while the mean over all may still fall."""

    @classmethod
    def of(cls, nll: NDArray[np.float64], answers: pa.Table) -> "HumanNLL":
        """From the nats of each of `human_answers`."""
        tokens = pc.sum(pc.list_value_length(answers["response_ids"])).as_py()
        tail = np.sort(nll)[-max(1, len(nll) // 10) :]
        return cls(per_token=float(nll.sum() / tokens), tail=float(tail.mean()))


def _spelled(text: str, canonical: CanonicalConfig) -> str:
    before = text[: len(text) - len(text.lstrip())]
    return before + normalise(text, canonical).text.lstrip()


def first_prompts(split: pa.Table, prompts: int) -> pa.Table:
    """Rows of the first `prompts` prompts of a split by prompt id (a hash, hence an arbitrary but fixed
    choice).
    """
    ordered = split.sort_by("prompt_id")
    wanted: dict[str, None] = {}
    keep = []
    for row, identifier in enumerate(ordered["prompt_id"].to_pylist()):
        if identifier in wanted or len(wanted) < prompts:
            wanted[identifier] = None
            keep.append(row)
    return ordered.take(keep)


def side_by_side(human: pa.Table, responses: pa.Table, renderer: Renderer) -> pa.Table:
    """TEXTS: one row for every human answer and every sample of its prompt among the trajectories."""
    answers: dict[str, list[str]] = {}
    for identifier, text in zip(
        responses["prompt_id"].to_pylist(), responses["response_text"].to_pylist(), strict=True
    ):
        answers.setdefault(identifier, []).append(text)
    rows = [
        {"prompt_id": identifier, "prompt": renderer.shown(prompt), "human": person, "model": text}
        for identifier, prompt, person in zip(
            *(human[name].to_pylist() for name in ("prompt_id", "prompt", "response")), strict=True
        )
        for text in answers[identifier]
    ]
    return pa.Table.from_pylist(rows, schema=TEXTS)
