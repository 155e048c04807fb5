"""Human answers as token rows, for their likelihood under the policy. Read only, never trained on."""

import pyarrow as pa

from rollout.templates import Renderer


def human_answers(split: pa.Table, renderer: Renderer, max_tokens: int) -> pa.Table:
    """Columns group_id, prompt_ids, response_ids: each response with its end token, cut to `max_tokens`."""
    encoded = renderer.tokenizer(split["response"].to_pylist(), add_special_tokens=False)["input_ids"]
    responses = [[*ids, renderer.end_id][:max_tokens] for ids in encoded]
    prompts = [renderer.encode(text) for text in split["prompt_text"].to_pylist()]
    return pa.table(
        {
            "group_id": split["prompt_id"],
            "prompt_ids": pa.array(prompts, pa.list_(pa.int32())),
            "response_ids": pa.array(responses, pa.list_(pa.int32())),
        }
    )
