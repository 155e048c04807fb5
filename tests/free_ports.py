"""Ports for servers that tests start."""

import contextlib
import socket


def free_ports(count: int) -> list[int]:
    """Different ports of this machine on which nothing listens."""
    with contextlib.ExitStack() as probes:
        found = [probes.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [probe.getsockname()[1] for probe in found]
