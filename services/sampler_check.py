"""Whether a rollout worker computes what the learner does: the log-probabilities of the same few tokens.

Checksums say that every weight arrived. What an engine makes of a weight, packed or derived, shows only in
its numbers. Invariant: the comparison goes the way of training, from a worker's sampled tokens and their
log-probabilities to the learner's pass over them, so whatever it finds would be in every step's loss.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pyarrow as pa

from rollout.engine import Device
from rollout.prompts import evaluation_requests
from rollout.trajectory import REQUEST_SCHEMA, group_id
from services.answers import first_prompts
from services.config import Config

SEQUENCES = 8
PROMPT_TOKENS = 8
RESPONSE_TOKENS = 7
"""With a prompt's, less than the smallest block of a prefix cache: a check leaves nothing there that a later
request finds, so an exact run gives the same numbers with it and without."""

CAUSES = {
    "as loaded": "vLLM computes this model otherwise than transformers does",
    "after a weight sync": "vLLM does not take this model's weights over as they are sent",
}


class SamplerError(RuntimeError):
    """A rollout worker samples from another distribution than the learner learns from."""


def bound(config: Config, devices: Mapping[str, Device]) -> float:
    """Mean |difference| of log-probabilities, nats, above which rounding is no explanation.

    Two passes in float32 on CPUs differ by the order of their sums: 2^-24 relative, below 1e-5 nats even
    where a hundred layers and logits of 30 amplify it, and below 1e-4 where vLLM's kernels approximate a soft
    cap. bfloat16 keeps 8 bits: a large model's logits of 16 to 32 lie 1/8 apart, so rounding alone puts each
    off by 1/32 on average, and hidden states rounded in every layer may double that. GPU kernels may multiply
    float32 as TF32. A layer that holds other weights is off by tenths of a nat and more.
    """
    both = {devices["rollout"], devices["learner"]}
    dtypes = {config.policy.dtype, config.learner.compute_dtype} - {"auto"}
    return 1e-3 if dtypes == {"float32"} and both == {"cpu"} else 0.1


def check_requests(split: pa.Table, encode: Callable[[str], list[int]], workers: int) -> pa.Table:
    """The ends of a few prompts as REQUEST_SCHEMA: the same ones, with the same seeds, for every worker of a
    fleet that deals rows out in turn."""
    rows = evaluation_requests(first_prompts(split, SEQUENCES), encode, 1, step=0, seed=0).to_pylist()
    dealt = [
        row
        | {
            "group_id": group_id(0, i * workers + worker),
            "prompt_ids": row["prompt_ids"][-PROMPT_TOKENS:],
            "n": -(-SEQUENCES // len(rows)),
        }
        for i, row in enumerate(rows)
        for worker in range(workers)
    ]
    return pa.Table.from_pylist(dealt, schema=REQUEST_SCHEMA)


def check_answers(
    answers: pa.Table, logprobs: Sequence[np.ndarray], when: str, config: Config, most: float
) -> None:
    """Compare the workers' log-probabilities in `answers` (TRAJECTORY_SCHEMA) with the learner's, by row.

    Raises:
        SamplerError: one's mean difference is above `most` or not finite; `when` is a key of CAUSES.
    """
    pairs = zip(answers["response_logprobs"].to_pylist(), logprobs, strict=True)
    apart = [np.abs(np.subtract(theirs, ours)) for theirs, ours in pairs]
    workers = answers["worker"].to_numpy()
    for worker in np.unique(workers):
        off = np.concatenate([apart[row] for row in np.flatnonzero(workers == worker)])
        if not off.mean() <= most:  # nor is NaN
            raise SamplerError(
                f"rollout worker {worker} is not the learner's policy {when}: log-probabilities of the same "
                f"{len(off)} tokens differ by {off.mean():.3g} nats on average ({off.max():.3g} at most), "
                f"where rounding explains {most:g}; {CAUSES[when]}: use another model than policy.model = "
                f"{config.policy.model}, or another release of vLLM"
            )
