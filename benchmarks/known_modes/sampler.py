"""A rollout worker's place in one process: responses from the learner's own module, token by token with a
cache.

Invariant: what comes out is what a worker gives, the trajectory schema with sampled ids and the
log-probability of each under the distribution it was drawn from (temperature included). There are no weights
of its own: it reads those of the module at the moment of the call.
"""

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import pyarrow as pa
import torch
from transformers import PreTrainedModel

from rollout.trajectory import TRAJECTORY_SCHEMA, text_and_token_ends, trajectory_id


class TorchSampler:
    """Draws responses for tables of requests.

        sampler = TorchSampler(model, decode, end_id=0, max_tokens=14)
        table = sampler(requests, version=3, temperature=1.0)

    Args:
        model: a causal language model on the CPU.
        decode: ids to text, special tokens skipped (`rollout.engine.decoder`).
        end_id: the token that ends a response, and is part of it.
        max_tokens: most tokens of a response; one without end token by then has the finish reason "length".
    """

    def __init__(
        self, model: PreTrainedModel, decode: Callable[[list[int]], str], *, end_id: int, max_tokens: int
    ) -> None:
        self.model = model
        self.end_id = end_id
        self.max_tokens = max_tokens
        # Windows of one to three tokens, which a small vocabulary has few of, are decoded again and again.
        known = lru_cache(maxsize=1 << 16)(lambda ids: decode(list(ids)))
        self._decode: Callable[[list[int]], str] = lambda ids: known(tuple(ids))

    def __call__(self, requests: pa.Table, *, version: int, temperature: float = 1.0) -> pa.Table:
        """`n` responses to each request (REQUEST_SCHEMA), as TRAJECTORY_SCHEMA in order of their ids.

        The draw depends on the weights, the requests and the first one's seed alone. Raises ValueError for
        prompts of different lengths, which this sampler does not pad.
        """
        ordered = requests.sort_by("group_id")
        counts = ordered["n"].to_numpy()
        prompts = ordered["prompt_ids"].to_pylist()
        if len({len(prompt) for prompt in prompts}) > 1:
            raise ValueError("the sampler takes prompts of one length; these have several")
        rows = np.repeat(np.arange(len(prompts)), counts)
        seed = ordered["seed"][0].as_py()
        ids, logprobs = self._draw(torch.tensor(prompts)[torch.from_numpy(rows)], seed, temperature)
        return self._table(ordered, rows, ids, logprobs, version)

    @torch.inference_mode()
    def _draw(
        self, prompts: torch.Tensor, seed: int, temperature: float
    ) -> tuple[list[list[int]], list[list[float]]]:
        """Sampled ids and log-probabilities [rows][max_tokens]; behind an end token they mean nothing."""
        generator = torch.Generator().manual_seed(seed)
        training = self.model.training
        self.model.eval()
        ended = torch.zeros(len(prompts), dtype=torch.bool)
        inputs, cache = prompts, None
        ids, logprobs = [], []
        for _ in range(self.max_tokens):
            out = self.model(input_ids=inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = out.past_key_values
            log_p = (out.logits[:, -1].float() / temperature).log_softmax(-1)
            inputs = torch.multinomial(log_p.exp(), 1, generator=generator)
            ids.append(inputs[:, 0])
            logprobs.append(log_p.gather(1, inputs)[:, 0])
            ended |= inputs[:, 0] == self.end_id
            if ended.all():
                break
        self.model.train(training)
        return torch.stack(ids, 1).tolist(), torch.stack(logprobs, 1).tolist()

    def _table(
        self,
        requests: pa.Table,
        rows: np.ndarray,
        ids: list[list[int]],
        logprobs: list[list[float]],
        version: int,
    ) -> pa.Table:
        groups = requests["group_id"].to_pylist()
        counts = np.bincount(rows, minlength=len(groups))
        samples = np.concatenate([np.arange(count) for count in counts])
        complete = [self.end_id in row for row in ids]
        responses = [
            row[: row.index(self.end_id) + 1] if whole else row
            for row, whole in zip(ids, complete, strict=True)
        ]
        spelled = [text_and_token_ends(row, self._decode) for row in responses]
        taken = requests.take(pa.array(rows))
        constant = np.full(len(rows), version)
        columns = {
            "trajectory_id": [
                trajectory_id(groups[row], int(s)) for row, s in zip(rows, samples, strict=True)
            ],
            **{name: taken[name] for name in ("group_id", "prompt_id", "step", "prompt_text", "prompt_ids")},
            "sample": samples,
            "response_ids": responses,
            "response_logprobs": [
                row[: len(response)] for row, response in zip(logprobs, responses, strict=True)
            ],
            "response_text": [text for text, _ in spelled],
            "token_ends": [ends for _, ends in spelled],
            "finish_reason": ["stop" if whole else "length" for whole in complete],
            "policy_version": constant,
            "policy_version_end": constant,
            "worker": np.zeros(len(rows), dtype=np.int32),
        }
        return pa.table(
            {
                field.name: value.combine_chunks()
                if isinstance(value := columns[field.name], pa.ChunkedArray)
                else pa.array(value, field.type)
                for field in TRAJECTORY_SCHEMA
            },
            schema=TRAJECTORY_SCHEMA,
        )
