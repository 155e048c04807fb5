"""Runs on the known-modes language in one process: the system's own functions, without Ray and vLLM."""
