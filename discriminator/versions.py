"""Published discriminator versions: a store of the last two and the checksum that travels with each.

Protocol: versions only grow. Publishing the same version with the same checksum again is harmless; with
another checksum it is an error. A version that has left the store is gone, and the error says which ones
exist.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

KEPT = 2


class UnknownVersion(LookupError):
    """The version asked for is not held; the message names those that are."""


class ChecksumMismatch(ValueError):
    """Bytes that do not belong to the version they are said to be."""


def state_checksum(state: "Mapping[str, torch.Tensor]") -> str:
    """SHA-256 over names, dtypes, shapes and bytes of CPU tensors, in name order; hex digits."""
    import torch

    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class VersionStore:
    """Holds the last two published versions; payloads are opaque to it (an object reference or a state
    dict)."""

    def __init__(self, kept: int = KEPT) -> None:
        self.kept = kept
        self._held: OrderedDict[int, tuple[str, Any]] = OrderedDict()

    def publish(self, version: int, checksum: str, payload: Any) -> None:
        """Take a version in and drop the oldest beyond two.

        Raises:
            ChecksumMismatch: the version is held with another checksum.
            ValueError: the version is older than the newest one held.
        """
        if version in self._held:
            if self._held[version][0] != checksum:
                raise ChecksumMismatch(
                    f"discriminator version {version} was published before with other weights"
                )
            return
        if self._held and version < self.newest():
            raise ValueError(f"discriminator version {version} is older than the published {self.newest()}")
        self._held[version] = (checksum, payload)
        while len(self._held) > self.kept:
            self._held.popitem(last=False)

    def fetch(self, version: int) -> tuple[str, Any]:
        """Checksum and payload of a version.

        Raises:
            UnknownVersion: not held.
        """
        if version not in self._held:
            raise UnknownVersion(
                f"discriminator version {version} is not held; held: {self.versions() or 'none'}"
            )
        return self._held[version]

    def versions(self) -> list[int]:
        """The versions held, oldest first."""
        return list(self._held)

    def newest(self) -> int:
        """The newest version held.

        Raises:
            UnknownVersion: nothing has been published.
        """
        if not self._held:
            raise UnknownVersion("no discriminator version has been published")
        return next(reversed(self._held))
