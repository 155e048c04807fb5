"""Configuration of the evaluation: how often, on how many prompts, and with which instruments."""

from typing import Annotated

from pydantic import Field, PositiveFloat, PositiveInt, field_validator

from discriminator.user_function import SPELLING, names_a_function
from rollout.config import Section, Seed


class EvaluationConfig(Section):
    """When and how the policy is compared with the human answers."""

    every: PositiveInt = 20
    """Steps between two evaluations on the selection split (the first is before step 1)."""

    look_every: PositiveInt | None = None
    """Steps between two looks at the likelihood of the selection prompts' human answers, on which the alarm
    `mode_dropping` rests (none: evaluations look). A look is a forward pass over them; nothing is sampled."""

    prompts: Annotated[int, Field(ge=8)] = 200
    """Selection prompts an evaluation reads (all of them when the split is smaller)."""

    test_prompts: Annotated[int, Field(ge=8)] = 500
    """Test prompts read for base, best and last at the end (all of them when the split is smaller)."""

    samples_per_prompt: PositiveInt = 1
    """Responses per prompt. Classifier and diversity read the first one, the others average over all."""

    temperature: PositiveFloat | None = None
    """Sampling temperature of evaluation responses (none: sampling.temperature, which measures the
    distribution that is trained)."""

    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus of evaluation responses; below 1 the table measures another distribution than is trained."""

    embedding_model: str = ""
    """Frozen encoder of the embedding classifier: hub name or folder, e.g. all-MiniLM-L6-v2.
    Empty: the untrained policy model's mean-pooled hidden states. "none": n-gram classifier only."""

    embedding_threads: PositiveInt = 1
    """Torch threads while texts are embedded."""

    embedding_max_tokens: PositiveInt = 256
    """Texts are cut to this many tokens before they are embedded, on both sides alike."""

    folds: Annotated[int, Field(ge=2)] = 5
    """Cross-validation folds, by prompt, of the classifier two-sample test."""

    bootstrap: Annotated[int, Field(ge=100)] = 1000
    """Bootstrap resamples, by prompt, behind the 95 % interval."""

    self_bleu_texts: Annotated[int, Field(ge=2)] = 100
    """Texts that self-BLEU compares pairwise (its cost grows with the square)."""

    coverage_neighbours: PositiveInt = 5
    """k of the nearest-neighbour balls behind the coverage measure."""

    shown_samples: Annotated[int, Field(ge=0)] = 4
    """Responses shown beside their demonstrations at every evaluation."""

    extra_measures: str = ""
    """A function of your own whose measures join every evaluation row: "path/to/file.py:function" or
    "package.module:function". It takes one services.evaluation.extra_measures.Answers and returns a
    dictionary of numbers. Empty: none."""

    seed: Seed = 0
    """Seed of sampling, folds, bootstrap and subsampling in evaluations."""

    @field_validator("extra_measures")
    @classmethod
    def _names_a_function(cls, reference: str) -> str:
        if reference and not names_a_function(reference):
            raise ValueError(f"write {SPELLING}")
        return reference
