"""The workload as the Arrow tables that rlgaf's parts take."""

from typing import Any

import pyarrow as pa

from benchmarks.speed.workload import Workload
from rollout.trajectory import REQUEST_SCHEMA, group_id, trajectory_id


def request_table(workload: Workload, turn: int) -> pa.Table:
    """One generation request per prompt (REQUEST_SCHEMA)."""
    rows = [
        {
            "group_id": group_id(turn, index),
            "prompt_id": f"prompt-{index}",
            "step": turn,
            "prompt_text": text,
            "prompt_ids": ids,
            "n": workload.group_size,
            "seed": None,
        }
        for index, (text, ids) in enumerate(zip(workload.prompts, workload.prompt_ids, strict=True))
    ]
    return pa.Table.from_pylist(rows, schema=REQUEST_SCHEMA)


def sampling_overrides(workload: Workload) -> dict[str, Any]:
    """Exactly `response_tokens` tokens, so that all contenders do the same work."""
    return {"max_tokens": workload.response_tokens, "min_tokens": workload.response_tokens}


def scored_table(workload: Workload) -> pa.Table:
    """The fixed random responses as scored trajectories with reward 1 on their last token."""
    rows = []
    for index, (ids, group) in enumerate(zip(workload.prompt_ids, workload.responses, strict=True)):
        for sample, response in enumerate(group):
            rows.append(
                {
                    "trajectory_id": trajectory_id(group_id(0, index), sample),
                    "group_id": group_id(0, index),
                    "prompt_ids": ids,
                    "response_ids": response,
                    "response_logprobs": [-10.0] * len(response),
                    "token_rewards": last_token_rewards(len(response)),
                }
            )
    return pa.Table.from_pylist(rows)


def last_token_rewards(tokens: int) -> list[float]:
    """A constant reward of 1 for the whole response."""
    return [0.0] * (tokens - 1) + [1.0]
