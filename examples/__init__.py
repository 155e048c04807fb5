"""Examples that are code; run them from the repository root with `python -m`."""
