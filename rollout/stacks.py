"""Stack traces of a process that hangs, on request: a signal writes those of all its threads to its log."""

import faulthandler
import signal

STACKS = signal.SIGUSR2
"""Ray Tune and Serve's proxy have uses for SIGUSR1."""


def show_stacks_on_signal() -> None:
    """Write the stacks of all threads to standard error whenever STACKS arrives. May be called repeatedly."""
    faulthandler.register(STACKS, file=2, all_threads=True)
