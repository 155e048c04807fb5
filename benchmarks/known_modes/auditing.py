"""What the shortcut auditor says of planted demonstrations before a run."""

import asyncio
from typing import Any

import pyarrow as pa

from benchmarks.known_modes.artefacts import Plant
from discriminator.audit import AuditReport, audit
from discriminator.config import CanonicalConfig
from discriminator.model import load_canonicaliser
from discriminator.probes import canonical_responses, raw_responses
from services.config import Config


def audit_sides(system: Any, config: Config, plant: Plant, *, guard: bool) -> AuditReport:
    """The audit with planted ids as the demonstrations' raw side, before training, on as many base samples as
    a run draws. With `guard` the discriminator reads the canonical sides, else the raw ones; what
    canonicalisation would do to them is compared all the same, as by the auditor of a run.
    """
    settings = config.discriminator.audit
    samples = asyncio.run(system.base_samples(settings.base_samples))
    demonstrations = system.demonstrations.train.slice(0, settings.base_samples)
    renderer = system.renderer
    # As they came: `system.demonstrations` are normalised already.
    texts = system.splits.train["response"].slice(0, settings.base_samples).to_pylist()
    encoded = renderer.tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    ids = [plant.ids([*row, renderer.end_id]) for row in encoded]
    column = demonstrations.schema.get_field_index("response_text")
    planted = demonstrations.set_column(column, "response_text", pa.array(texts, pa.string()))
    planted = planted.append_column("response_ids", pa.array(ids, pa.list_(pa.int32())))
    raw = tuple(raw_responses(side, renderer.tokenizer, renderer.end_id) for side in (planted, samples))
    path = config.discriminator.model_copy(update={"canonical": CanonicalConfig()})
    canonicaliser = system.judge.canonical if guard else load_canonicaliser(path, config.policy.model)
    canonical = tuple(canonical_responses(side, canonicaliser) for side in (demonstrations, samples))
    return audit(
        (raw[0], raw[1]),
        (canonical[0], canonical[1]),
        canonicalisation=guard,
        config=settings,
        seed=config.run.seed,
    )
