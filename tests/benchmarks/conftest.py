"""An untrained base of the known-modes language, and assets as the benchmark expects them."""

import json
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """known-modes/base with random weights and known-modes/facts.json."""
    from examples.known_modes.base_model import new_model, save_base

    folder = tmp_path_factory.mktemp("assets")
    save_base(new_model("plain", 0), "plain", folder / "known-modes" / "base")
    (folder / "known-modes" / "facts.json").write_text(json.dumps({"training": {"steps": 0}}))
    return folder
