"""Scoring by version: what a scoring replica holds and does.

Protocol: `ensure(version, fetch)` makes a version present, and `score(version, ...)` answers with that
version or not at all. Two versions are held, so requests that name the previous one are still served while
the next one arrives. The weights are checked against their checksum before they are used. A response's scores
do not depend on what else is scored with it. Texts are encoded beside the forward pass of others.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from discriminator.canonical import Encoded, Span
from discriminator.config import DiscriminatorConfig
from discriminator.model import (
    Discriminator,
    batches_of,
    collect,
    group_encoded,
    load_canonicaliser,
    load_discriminator,
)
from discriminator.versions import KEPT, ChecksumMismatch, UnknownVersion, state_checksum
from learner.engine import resolve_device, resolve_dtype

State = Mapping[str, torch.Tensor]
Fetch = Callable[[int], tuple[str, State]]


@dataclass(frozen=True)
class ScoredResponse:
    """Scores (float32) of one response's canonical tokens, the last one being the sequence score, and their
    spans in the raw response text. An encoder gives its one score to every token."""

    scores: NDArray[np.float32]
    spans: list[Span]


class Scorer:
    """Holds up to two discriminator versions and scores with the one that is named.

        scorer = Scorer(config, model="path/of/the/body")
        scorer.ensure(3, store.fetch)
        scorer.score(3, ["say cat: "], [[("the cat", True), ("the c", False)]])

    Args:
        config: the discriminator's configuration.
        model: hub name or folder of the body, the one the trainer started from.
        model_dtype: dtype that `compute_dtype = "auto"` follows.
        kept: versions held at most.
    """

    def __init__(
        self, config: DiscriminatorConfig, model: str, *, model_dtype: str = "bfloat16", kept: int = KEPT
    ) -> None:
        self.config = config
        self.kept = kept
        self.model = model
        self.device = resolve_device(config.device)
        self.dtype = resolve_dtype(config.compute_dtype, model_dtype, self.device)
        self.canonical = load_canonicaliser(config, model)
        self._modules: OrderedDict[int, Discriminator] = OrderedDict()
        self._lock = threading.RLock()

    def versions(self) -> list[int]:
        """The versions held, oldest first."""
        return list(self._modules)

    def module(self, version: int) -> Discriminator:
        """The frozen module of a version, in evaluation mode.

        Raises:
            UnknownVersion: the version is not held; no other one answers for it.
        """
        if version not in self._modules:
            raise UnknownVersion(
                f"discriminator version {version} is not held; held: {self.versions() or 'none'}"
            )
        return self._modules[version]

    def ensure(self, version: int, fetch: Fetch) -> None:
        """Hold a version, fetching it when it is not here; the oldest of two makes room.

        Args:
            version: wanted version.
            fetch: gives checksum and state (CPU tensors) of a version.

        Raises:
            ChecksumMismatch: the state is not what was published.
            ValueError: the state belongs to another architecture.
        """
        with self._lock:
            if version in self._modules:
                return
            checksum, state = fetch(version)
            if (found := state_checksum(state)) != checksum:
                raise ChecksumMismatch(
                    f"discriminator version {version} arrived with checksum {found[:12]}, "
                    f"published was {checksum[:12]}"
                )
            if len(self._modules) < self.kept:
                module = load_discriminator(
                    self.config, self.model, device=str(self.device), dtype=self.dtype, lora=False
                )
                module = module.to(self.device).eval().requires_grad_(False)
            else:
                module = self._modules.popitem(last=False)[1]
            _load(module, state, version)
            self._modules[version] = module

    def score(
        self, version: int, prompts: Sequence[str], responses: Sequence[Sequence[tuple[str, bool]]]
    ) -> list[list[ScoredResponse]]:
        """Scores of each prompt's responses, each given as (text, complete).

        Raises:
            UnknownVersion: the version is not held; no other one answers for it.
            ValueError: as many response lists as prompts are needed.
        """
        if len(prompts) != len(responses):
            raise ValueError(f"{len(prompts)} prompts with {len(responses)} lists of responses")
        groups = [self.encode(prompt, answers) for prompt, answers in zip(prompts, responses, strict=True)]
        return self.score_encoded(version, groups)

    def encode(self, prompt: str, responses: Sequence[tuple[str, bool]]) -> list[Encoded]:
        """Canonical tokens of a prompt's responses, each given as (text, complete)."""
        return [self.canonical.encode(prompt, text, complete=complete) for text, complete in responses]

    def score_encoded(self, version: int, groups: Sequence[list[Encoded]]) -> list[list[ScoredResponse]]:
        """Scores of groups from `encode`.

        Raises:
            UnknownVersion: the version is not held; no other one answers for it.
        """
        with self._lock:
            scored = iter(self._scores(self.module(version), [item for group in groups for item in group]))
        return [[next(scored) for _ in group] for group in groups]

    def _scores(self, module: Discriminator, encoded: list[Encoded]) -> list[ScoredResponse]:
        if not encoded:
            return []
        batches = batches_of(
            group_encoded(encoded),
            module.kind,
            packing=self.config.packing,
            pack_length=self.config.pack_length,
            micro_batch_tokens=self.config.scoring.max_batch_tokens,
        )
        with torch.inference_mode():
            values = [module(batch.to(self.device)) for batch in batches]
        arrays = collect(batches, values, encoded)
        return [ScoredResponse(array, e.spans) for array, e in zip(arrays, encoded, strict=True)]


def _load(module: Discriminator, state: State, version: int) -> None:
    """Copy a published state into a module; every parameter must be in it and nothing else."""
    wanted = {name for name, _ in module.named_parameters()}
    if wanted != set(state):
        odd = sorted(wanted ^ set(state))
        raise ValueError(
            f"discriminator version {version} belongs to another architecture: {len(odd)} weights differ, "
            f"e.g. {odd[0]}"
        )
    for name, parameter in module.named_parameters():
        if parameter.shape != state[name].shape:
            raise ValueError(
                f"discriminator version {version}: {name} has shape {tuple(state[name].shape)}, "
                f"the body asks for {tuple(parameter.shape)}"
            )
        parameter.copy_(state[name])
