"""Which of a step's metrics a result keeps, and under which short names."""

from collections.abc import Mapping
from typing import Any

RECORDED = {
    "reward": "reward/mean",
    "reward_std": "reward/std",
    "length": "response/length_mean",
    "accuracy": "discriminator/accuracy_heldout",
    "margin": "discriminator/margin_heldout",
    "disc_steps": "discriminator/steps",
    "entropy": "policy/entropy",
    "kl": "policy/kl",
    "nll": "selection/nll",
    "nll_tail": "monitor/nll_tail",
}


def recorded(row: Mapping[str, Any]) -> dict[str, Any]:
    """Short name to value, of a flat metrics row."""
    return {name: row[key] for name, key in RECORDED.items() if row.get(key) is not None}
