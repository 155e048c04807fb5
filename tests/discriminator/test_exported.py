"""A trained discriminator as a folder: what is written comes back, and damage is said in a sentence."""

import pytest
import torch

from discriminator.config import DiscriminatorConfig
from discriminator.exported import DESCRIPTION, exported_state, read_exported, write_exported
from discriminator.trainer import Published


def test_what_was_written_comes_back_and_damage_is_said(tmp_path):
    folder = tmp_path / "discriminator"
    config = DiscriminatorConfig(level="token", loss="bradley_terry", score_centring=0.1)
    for version in (3, 4):
        write_exported(folder, Published(version, {"w": torch.ones(3)}, "abc"), config, "m", "float32")
    found = read_exported(folder)
    assert (found.version, found.checksum, found.model, found.model_dtype) == (4, "abc", "m", "float32")
    assert found.config == config
    assert torch.equal(exported_state(folder)["w"], torch.ones(3))
    assert [path.name for path in tmp_path.iterdir()] == ["discriminator"]
    for damage in ("[1]", "{", '{"version": "x"}'):
        (folder / DESCRIPTION).write_text(damage)
        with pytest.raises(ValueError, match=r"discriminator\.json is damaged"):
            read_exported(folder)
