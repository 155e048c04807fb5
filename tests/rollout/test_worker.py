"""What a rollout worker says of itself without an engine."""

import subprocess
import sys

from rollout.worker import resident_mib

HOLDER = "held = bytearray(b'x') * (100 << 20); print('held', flush=True); input()"
NESTED = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {HOLDER!r}])"


def test_resident_memory_counts_the_processes_below() -> None:
    """vLLM's engine is a child, and the ranks of a tensor-parallel one are the engine's."""
    before = resident_mib()
    command = [sys.executable, "-c", NESTED]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        assert 100 < resident_mib() - before < 200
        process.communicate("\n")
    assert resident_mib() - before < 50
