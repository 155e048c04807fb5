"""The discriminator as the judge of soft samples (see `learner.gumbel_update.Judge`).

Layout: the canonical prompt, then one position for each sampled token, its end token standing for the
discriminator's EOS; a response cut by the limit has none, and is judged as cut. That is what
`discriminator.canonical` makes of the response's text whenever decoding and encoding give the sampled tokens
back, and for such a response the score of the hard sample is the scorer's score. For any other the soft
sequence would be scored in a spelling that the discriminator never trains on, and its gradient would teach
the policy spelling: `prompt_of` refuses those. What also differs: soft mass on a special token stays what it
is, although a hard one would vanish in decoding.

A version is fetched, and checked, as a scoring replica does it (`discriminator.scorer`).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from discriminator.config import DiscriminatorConfig, Level
from discriminator.model import Discriminator, batches_of
from discriminator.scorer import Fetch, Scorer
from learner.packing import Group, PackedBatch
from rollout.config import PolicyConfig
from rollout.engine import decoder
from rollout.templates import end_of_response_id, eos_ids, load_tokenizer

ONE_BATCH = 2**40
"""More tokens than any batch has."""


class SoftJudge:
    """Scores embedded responses of one policy with the discriminator version that it was told to hold.

        judge = SoftJudge(config, policy.model, policy, fetch)
        judge.hold(3)
        judge.scores(judge.batch(groups), rows @ judge.table())

    Args:
        config: the discriminator's configuration.
        model: hub name or folder of the body.
        policy: whose tokens are judged.
        fetch: gives checksum and state of a version.

    Raises:
        ValueError: the policy has another tokenizer than the discriminator, or the body is bidirectional.
    """

    level: Level
    vocabulary: int
    end_ids: frozenset[int]

    def __init__(self, config: DiscriminatorConfig, model: str, policy: PolicyConfig, fetch: Fetch) -> None:
        from transformers import AutoConfig

        self.level = config.level
        self.config = config
        self.fetch = fetch
        self.scorer = Scorer(config, model, model_dtype=policy.dtype, kept=1)
        self.canonical = self.scorer.canonical
        tokenizer = load_tokenizer(policy)
        if tokenizer.get_vocab() != self.canonical.tokenizer.get_vocab():
            raise ValueError(
                f"learner.gumbel: {model} and {policy.model} have different tokenizers, so the discriminator "
                "cannot read the policy's soft tokens; leave discriminator.model empty"
            )
        shape = AutoConfig.from_pretrained(model, trust_remote_code=config.trust_remote_code)
        self.vocabulary = int(shape.get_text_config().vocab_size)
        self.end_ids = frozenset({end_of_response_id(tokenizer, policy), *eos_ids(shape, model, tokenizer)})
        self._decode = decoder(tokenizer)
        self._module: Discriminator | None = None

    def hold(self, version: int) -> None:
        """Judge with exactly this version from now on.

        Raises:
            ChecksumMismatch, ValueError: see `Scorer.ensure`.
        """
        self.scorer.ensure(version, self.fetch)
        self._module = self.scorer.module(version)
        if self._module.kind != "causal":
            raise ValueError("learner.gumbel: a bidirectional discriminator has no place for soft tokens")

    @property
    def module(self) -> Discriminator:
        assert self._module is not None, "hold() first"
        return self._module

    @torch.no_grad()
    def table(self) -> Tensor:
        """[V, H] embedding of each policy token as the body gets it; all end tokens have that of EOS."""
        ids = torch.arange(self.vocabulary, device=self.scorer.device)
        table = self.module.body.get_input_embeddings()(ids)  # type: ignore[operator]
        table[sorted(self.end_ids)] = table[self.canonical.eos_id].clone()
        return table

    def prompt_of(self, prompt_text: str, response_ids: Sequence[int], *, ended: bool) -> list[int] | None:
        """Canonical ids of the prompt, or None when the response's canonical ids are not the sampled ones."""
        text = self._decode(list(response_ids))
        coded = self.canonical.encode(prompt_text, text, complete=ended)
        sampled = [*response_ids[:-1], self.canonical.eos_id] if ended else list(response_ids)
        return coded.prompt_ids if coded.response_ids == sampled and coded.complete == ended else None

    def batch(self, groups: Sequence[Group]) -> PackedBatch:
        """All these responses as one batch, packed like the scorer's."""
        (batch,) = batches_of(
            groups,
            "causal",
            packing=self.config.packing,
            pack_length=self.config.pack_length,
            micro_batch_tokens=ONE_BATCH,
        )
        return batch

    def scores(self, batch: PackedBatch, embedded: Tensor) -> Tensor:
        """fp32 [N] scores of responses with these embeddings [N, H]."""
        return self.module.scores_of(batch, embedded)


def soft_judge(
    config: DiscriminatorConfig, model: str, policy: PolicyConfig, versions: Any, timeout_s: float
) -> SoftJudge:
    """A judge that fetches from the version store's actor, waiting at most `timeout_s` for each answer."""
    import ray

    def fetch(version: int) -> tuple[str, Any]:
        checksum, payload = ray.get(versions.fetch.remote(version), timeout=timeout_s)
        return checksum, ray.get(payload[0], timeout=timeout_s)

    return SoftJudge(config, model, policy, fetch)
