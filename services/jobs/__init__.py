"""Runs as jobs of a Ray cluster: start one here, submit, follow, stop, go on."""
