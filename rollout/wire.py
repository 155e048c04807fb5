"""The weight wire: tensors packed in buckets, each preceded by its checksum, over a gloo group of its own.

Both ends derive the buckets from the same list of (name, dtype, shape), so nothing but bytes travels. Every
tensor NAME is preceded by a tensor `rlgaf.checksum::NAME` of eight bytes. The receiver recomputes the sum
from the bytes that arrived and refuses to load a tensor whose sums differ. A refusal does not stop the
receiver from draining the wire: the sender must come to its end to hear the reason, a receiver that stops
listening would leave it hanging.
"""

import math
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist

CHECKSUM_PREFIX = "rlgaf.checksum::"
CHECKSUM_BYTES = 8
ALIGNMENT = 16
CHUNK = 1 << 16  # 32-bit words; a chunk, its weights and its products stay near a core's caches
CUDA_ROWS = 1 << 10
MEET_INTERVAL_S = 0.02
AHEAD = 2
"""Buckets that a receiver has asked for while it loads one."""

Pair = tuple[str, torch.Tensor]


class WireError(RuntimeError):
    """A weight sync broke on the wire or in loading; the text names worker and tensor."""


def _shifted(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical right shift of int64 (torch's own copies the sign)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(x: int) -> int:
    return x - (1 << 64) if x >= 1 << 63 else x


@lru_cache(maxsize=8)
def _weights(size: int, salt: int, device: torch.device) -> torch.Tensor:
    """Odd 64-bit pseudo-random weights, int64 [size]: splitmix64 (Steele, Lea, Flood 2014) of the
    position.
    """
    z = (torch.arange(1, size + 1, dtype=torch.int64) + (salt << 40)) * _signed(0x9E3779B97F4A7C15)
    z = (z ^ _shifted(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shifted(z, 27)) * _signed(0x94D049BB133111EB)
    return ((z ^ _shifted(z, 31)) | 1).to(device)


def checksum(tensor: torch.Tensor) -> torch.Tensor:
    """Position-weighted sum of a tensor's bytes, uint8 [8] on its device (an int64, native byte order).

    sum_c v_c * sum_i w_i x_ci + v_0 * nbytes (mod 2^64), x the 32-bit words in chunks of CHUNK, w and v
    odd. A single changed word always changes the sum: |difference| < 2^32 times an odd number is never 0
    mod 2^64. Exchanged words i, j go unnoticed only when 2^33 divides w_i - w_j: words of 32 bits in 64-bit
    sums, for a sum of 64-bit words would miss two words exchanged that differ in their sign bit. It finds
    accidents, not attacks.
    """
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    nbytes = data.numel()
    if data.data_ptr() % 4 or data.storage_offset() % 4:
        data = data.clone()
    if nbytes % 4:
        padded = torch.zeros(nbytes // 4 * 4 + 4, dtype=torch.uint8, device=data.device)
        padded[:nbytes] = data
        data = padded
    words = data.view(torch.int32)
    weights = _weights(CHUNK, 0, words.device)
    full = words.numel() // CHUNK
    rows = words[: full * CHUNK].view(full, CHUNK)
    step = CUDA_ROWS if words.is_cuda else 1
    sums = [(rows[i : i + step] * weights).sum(1) for i in range(0, full, step)]
    rest = words[full * CHUNK :]
    sums.append((rest * weights[: rest.numel()]).sum().view(1))
    chunks = torch.cat(sums)
    outer = _weights(1 << max(10, chunks.numel().bit_length()), 1, words.device)[: chunks.numel()]
    total = (chunks * outer).sum() + nbytes * outer[0]
    return total.view(1).view(torch.uint8)


def hex_checksum(value: torch.Tensor) -> str:
    """The sum as 16 hexadecimal digits, for messages."""
    return f"{int(value.cpu().clone().view(torch.int64)) & (2**64 - 1):016x}"


def with_checksums(pairs: Iterable[Pair]) -> Iterator[Pair]:
    """Put before each (name, tensor) its checksum pair."""
    for name, tensor in pairs:
        yield CHECKSUM_PREFIX + name, checksum(tensor)
        yield name, tensor


@dataclass(frozen=True)
class Entry:
    """What a tensor on the wire looks like."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Bucket:
    """Entries [first, first + len(offsets)) in one buffer of `nbytes`; `offsets` are byte positions in it."""

    first: int
    offsets: tuple[int, ...]
    nbytes: int


def plan_buckets(entries: Sequence[Entry], bucket_bytes: int) -> list[Bucket]:
    """Cut the entries, in order, into buffers of at most `bucket_bytes` (a larger tensor gets one of its
    own).

    Each tensor starts at a multiple of ALIGNMENT, so that views of any dtype are legal.
    """
    buckets: list[Bucket] = []
    offsets: list[int] = []
    first = used = 0
    for index, entry in enumerate(entries):
        size = -(-entry.nbytes // ALIGNMENT) * ALIGNMENT
        if offsets and used + size > bucket_bytes:
            buckets.append(Bucket(first, tuple(offsets), used))
            first, offsets, used = index, [], 0
        offsets.append(used)
        used += size
    if offsets:
        buckets.append(Bucket(first, tuple(offsets), used))
    return buckets


def pack(bucket: Bucket, entries: Sequence[Entry], pairs: Iterator[Pair]) -> torch.Tensor:
    """Take the bucket's tensors from `pairs` and copy them into one CPU buffer, uint8 [bucket.nbytes].

    Raises WireError, naming the tensor, when the stream does not follow the entries.
    """
    buffer = torch.zeros(bucket.nbytes, dtype=torch.uint8)
    for entry, offset in zip(
        entries[bucket.first : bucket.first + len(bucket.offsets)], bucket.offsets, strict=True
    ):
        name, tensor = next(pairs, (None, torch.empty(0)))
        if name != entry.name or tensor.dtype != entry.dtype or tuple(tensor.shape) != entry.shape:
            raise WireError(
                f"the weight source declared {entry.name} {entry.dtype} {entry.shape} "
                f"and yielded {name} {tensor.dtype} {tuple(tensor.shape)}"
            )
        buffer[offset : offset + entry.nbytes].view(entry.dtype).view(entry.shape).copy_(tensor.detach())
    return buffer


def unpack(bucket: Bucket, entries: Sequence[Entry], buffer: torch.Tensor) -> list[Pair]:
    """Views of the bucket's tensors; they share the buffer's memory."""
    stop = bucket.first + len(bucket.offsets)
    return [
        (entry.name, buffer[offset : offset + entry.nbytes].view(entry.dtype).view(entry.shape))
        for entry, offset in zip(entries[bucket.first : stop], bucket.offsets, strict=True)
    ]


class CheckedLoader:
    """Verify each tensor against the checksum that came before it, then hand the tensors to `load`.

    Calling it never raises: after the first error it ignores what still arrives, and `finish` raises that
    error, so the caller can drain the wire first.

        loader = CheckedLoader(model.load_weights, "rollout worker 1", expected=names)
        for pairs in wire: loader(pairs)
        loader.finish()
    """

    def __init__(
        self, load: Callable[[list[Pair]], set[str] | None], receiver: str, parameters: Iterable[str] = ()
    ) -> None:
        self.checksum_s = 0.0
        self.load_s = 0.0
        self._load = load
        self._receiver = receiver
        self._missing = set(parameters)
        self._announced: dict[str, torch.Tensor] = {}
        self._error: Exception | None = None

    def __call__(self, pairs: Iterable[Pair]) -> None:
        """Check and load one bucket; a checksum and its tensor may lie in different buckets."""
        if self._error is not None:
            return
        try:
            started = time.perf_counter()
            weights = self._verified(pairs)
            checked = time.perf_counter()
            self.checksum_s += checked - started
            if weights:
                loaded = self._load(weights)
                self._missing = self._missing - loaded if loaded is not None else set()
                self.load_s += time.perf_counter() - checked
        except (
            Exception
        ) as error:  # kept for finish(): raising here would leave the sender hanging on a full wire
            self._error = error

    def _verified(self, pairs: Iterable[Pair]) -> list[Pair]:
        weights: list[Pair] = []
        expected: list[torch.Tensor] = []
        for name, tensor in pairs:
            if name.startswith(CHECKSUM_PREFIX):
                self._announced[name.removeprefix(CHECKSUM_PREFIX)] = tensor
                continue
            if name not in self._announced:
                raise WireError(f"{self._receiver}: tensor {name} arrived without its checksum")
            weights.append((name, tensor))
            expected.append(self._announced.pop(name))
        if not weights:
            return []
        # One comparison for the bucket: on a GPU each would be a synchronisation of its own.
        got = torch.stack([checksum(tensor) for _, tensor in weights])
        want = torch.stack(expected)
        wrong = (got != want).any(1).nonzero()
        if wrong.numel():
            i = int(wrong[0])
            sums = f"checksum expected {hex_checksum(want[i])}, got {hex_checksum(got[i])}"
            raise WireError(f"{self._receiver}: tensor {weights[i][0]} is corrupted: {sums}")
        return weights

    def finish(self) -> None:
        """Raise the first error, or WireError when a tensor was announced and never came or a parameter got
        none.
        """
        if self._error is not None:
            raise self._error
        if self._announced:
            raise WireError(
                f"{self._receiver}: tensor {next(iter(self._announced))} was announced and never arrived"
            )
        if self._missing:
            raise WireError(
                f"{self._receiver}: {len(self._missing)} parameters got no weights, "
                f"among them {min(self._missing)}"
            )


def local_address(host: str, port: int) -> str:
    """The address under which this machine reaches `host`: the interface that a gloo group with it must
    use.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, port))
        return str(probe.getsockname()[0])


def listening_store(host: str, timeout: timedelta, port: int = 0) -> dist.TCPStore:
    """Serve a store at `host`, which must be an address of this machine, and at no other; port 0: a free one.

    The store answers everyone, and torch would listen on all addresses.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, port), family=family) as server:
        port = server.getsockname()[1]
        descriptor = server.detach()
    return dist.TCPStore(
        host, port, is_master=True, timeout=timeout, wait_for_workers=False, master_listen_fd=descriptor
    )


class GlooGroup:
    """A gloo group beside torch's default group: rank 0 sends, every operation has a deadline.

    Rank 0 opens the store with `GlooGroup.store(host)` and publishes its port. Constructing the group blocks
    until the last rank does so or the deadline, so ranks that may fail before that call `arrive` first, and
    rank 0 calls `meet`: all construct the group, or none.
    """

    def __init__(self, store: dist.TCPStore, rank: int, size: int, timeout_s: float) -> None:
        self.rank = rank
        self._store = store
        # torch publishes the class without its constructor options and collectives.
        gloo: Any = dist.ProcessGroupGloo
        options = gloo._Options()
        options._timeout = timedelta(seconds=timeout_s)
        address = local_address(store.host, store.port)
        options._devices = [gloo.create_device(hostname=address, lazy_init=False)]
        self._group = gloo(dist.PrefixStore("rlgaf-weights", store), rank, size, options)

    @staticmethod
    def store(host: str, timeout_s: float, port: int = 0) -> dist.TCPStore:
        """Rank 0 (port 0): serve a store on a free port. Other ranks: connect to it."""
        timeout = timedelta(seconds=timeout_s)
        if port == 0:
            return listening_store(host, timeout)
        return dist.TCPStore(host, port, is_master=False, timeout=timeout, wait_for_workers=False)

    @staticmethod
    def arrive(store: dist.TCPStore, rank: int) -> bool:
        """Other ranks: report to rank 0 and return its word, True for a complete group."""
        store.set(f"arrived/{rank}", "yes")
        return bool(store.get("complete") == b"yes")

    @staticmethod
    def meet(store: dist.TCPStore, size: int, timeout_s: float, give_up: Callable[[], bool]) -> bool:
        """Rank 0: wait until all others have arrived, and tell them; False when `give_up` or the deadline
        came first.
        """
        keys = [f"arrived/{rank}" for rank in range(1, size)]
        expires = time.monotonic() + timeout_s
        while not (complete := store.check(keys)) and not give_up() and time.monotonic() < expires:
            time.sleep(MEET_INTERVAL_S)
        store.set("complete", "yes" if complete else "no")
        return complete

    def broadcast(self, buffer: torch.Tensor) -> dist.Work:
        """Start sending (rank 0) or receiving; `wait()` on the result raises RuntimeError at the deadline."""
        options = dist.BroadcastOptions()
        options.rootRank = 0
        return self._group.broadcast([buffer], options)

    def close(self) -> None:
        """Break the connections: peers that wait in an operation get an error at once."""
        self._group.abort()


def receive(group: GlooGroup, entries: Sequence[Entry], bucket_bytes: int, loader: CheckedLoader) -> float:
    """Receive every bucket and give it to the loader; return the seconds spent waiting for bytes.

    `AHEAD` more buckets are asked for before one is loaded, so loading does not hold up the wire. Each bucket
    has a buffer of its own because vLLM keeps references to tensors until their layer is complete.
    """
    waited = 0.0
    coming = iter(plan_buckets(entries, bucket_bytes))

    def ask(bucket: Bucket) -> tuple[Bucket, torch.Tensor, dist.Work]:
        buffer = torch.empty(bucket.nbytes, dtype=torch.uint8)
        return bucket, buffer, group.broadcast(buffer)

    pending = deque(ask(bucket) for bucket in islice(coming, 1 + AHEAD))
    while pending:
        bucket, buffer, work = pending.popleft()
        started = time.perf_counter()
        work.wait()
        waited += time.perf_counter() - started
        pending.extend(ask(following) for following in islice(coming, 1))
        loader(unpack(bucket, entries, buffer))
    return waited
