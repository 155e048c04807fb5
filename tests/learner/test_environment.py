"""The environment of processes that compute: which allocator they get."""

import os
import subprocess
import sys

import pytest

from learner import environment

MAPPED = "print('libjemalloc' in open('/proc/self/maps').read())"


@pytest.mark.skipif(environment.jemalloc() is None, reason="this build of Ray brings no libjemalloc.so")
def test_a_process_started_with_it_allocates_with_jemalloc():
    command = [sys.executable, "-c", MAPPED]
    chosen = os.environ | environment.worker_environment()
    ran = subprocess.run(command, env=chosen, capture_output=True, text=True, check=True, timeout=60)
    assert ran.stdout.strip() == "True"
    assert not ran.stderr


AGAIN = """
import resource
import numpy as np

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    kept = [np.ones(300_000, np.float32) for _ in range(40)]  # 48 MB, as a step's activations
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(*[faults() for _ in range(5)])
"""


@pytest.mark.skipif(environment.jemalloc() is None, reason="this build of Ray brings no libjemalloc.so")
def test_what_a_step_freed_is_not_faulted_in_again():
    command = [sys.executable, "-c", AGAIN]
    chosen = os.environ | environment.worker_environment()
    ran = subprocess.run(command, env=chosen, capture_output=True, text=True, check=True, timeout=60)
    *_, last = map(int, ran.stdout.split())
    assert last < 1_000  # of 11,700 pages


def test_what_is_preloaded_already_stays_in_front(monkeypatch, tmp_path):
    library = tmp_path / "libjemalloc.so"
    monkeypatch.setattr(environment, "jemalloc", lambda: library)
    monkeypatch.setenv("LD_PRELOAD", "/lib/mine.so")
    assert environment.worker_environment()["LD_PRELOAD"] == f"/lib/mine.so {library}"


def test_without_the_library_glibc_keeps_its_memory(monkeypatch):
    monkeypatch.setattr(environment, "jemalloc", lambda: None)
    given = environment.worker_environment()
    assert given["MALLOC_ARENA_MAX"] == "1"
    assert "LD_PRELOAD" not in given
