"""What a process that computes with torch needs in its environment before it starts."""

WORKER_ENVIRONMENT = {
    # A step allocates and frees the same large tensors each time. glibc would give them back to the kernel
    # and fault every page in again, up to half of a CPU step's time. One arena, because Ray runs the work on
    # another thread than the main one, and only the main arena can keep large blocks.
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(4 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(32 << 30),
    # Several processes share a machine's cores, and OpenMP threads that wait for one another in a spinning
    # loop take from other processes the core that the awaited thread needs.
    "OMP_WAIT_POLICY": "PASSIVE",
}
"""Environment of every process that computes with torch."""
