"""`helm test`: the run's TOML is valid in this image, its folder can be written, and the endpoint answers.

check.py [CONFIG.toml OVERRIDES.json] [--url URL]
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from urllib.request import urlopen

from services.config import ConfigError, load


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path, nargs="*")
    parser.add_argument("--url")
    arguments = parser.parse_args()
    if arguments.run:
        toml, overrides = arguments.run
        os.environ.setdefault("RLGAF_SCORE_TOKEN", "the head has it")  # this pod serves nothing
        try:
            config = load(toml, json.loads(overrides.read_text()))
        except ConfigError as error:
            sys.exit("\n".join(f"rlgaf: {line}" for line in str(error).splitlines()))
        print(f"the configuration is valid; the run is in {config.folder}")
    with tempfile.TemporaryFile(dir="/runs"):
        print("/runs can be written")
    if arguments.url:
        with urlopen(arguments.url, timeout=30) as answer:
            print(f"{arguments.url} answers {answer.status}")


if __name__ == "__main__":
    main()
