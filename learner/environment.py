"""What a process that computes with torch needs in its environment before it starts."""

import os
from importlib.util import find_spec
from pathlib import Path

# A step allocates and frees large tensors of ever other sizes. glibc gives them back to the kernel and faults
# every page in again; told not to, it cuts its one arena into ever smaller pieces, searches them longer each
# step, and grows. jemalloc does neither.
_JEMALLOC = {
    # Large blocks too stay after they are freed; the kernel may still take what is free. Otherwise a step's
    # memory is given back and faulted in again, which is a fifth of its time.
    "MALLOC_CONF": "oversize_threshold:0,muzzy_decay_ms:-1",
}
_GLIBC = {
    "MALLOC_ARENA_MAX": "1",  # only the main arena can keep large blocks, and Ray works on another thread
    "MALLOC_MMAP_THRESHOLD_": str(4 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(32 << 30),
}


def jemalloc() -> Path | None:
    """The library that comes with Ray on Linux; None where there is none."""
    ray = find_spec("ray")
    library = Path(ray.origin).parent / "core" / "libjemalloc.so" if ray and ray.origin else None
    return library if library and library.is_file() else None


def worker_environment() -> dict[str, str]:
    """Environment of every process that computes with torch. What this process preloads stays in front."""
    library = jemalloc()
    allocator = _GLIBC
    if library:
        preloaded = os.environ.get("LD_PRELOAD", "")
        allocator = _JEMALLOC | {"LD_PRELOAD": f"{preloaded} {library}".strip()}
    return allocator | {
        # Several processes share a machine's cores, and OpenMP threads that wait for one another in a
        # spinning loop take from other processes the core that the awaited thread needs.
        "OMP_WAIT_POLICY": "PASSIVE",
    }
