"""Entrypoint of the job: `rlgaf train --auto-resume`, which starts the run or goes on with it.

start.py CONFIG.toml OVERRIDES.json
"""

import json
import os
import sys
from pathlib import Path


def command(toml: Path, overrides: list[str]) -> list[str]:
    """The `rlgaf train` line."""
    return ["rlgaf", "train", str(toml), *overrides, "--auto-resume"]


def main(toml: Path, overrides: Path) -> None:
    """See the module's docstring."""
    line = command(toml, json.loads(overrides.read_text()))
    print(" ".join(line), flush=True)
    os.execvp(line[0], line)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
