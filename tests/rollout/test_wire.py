"""Checksums, packing, the checking loader, the gloo wire, and the arithmetic of the transfer group."""

import threading
import time

import psutil
import pytest
import torch

from rollout.wire import (
    ALIGNMENT,
    CHECKSUM_PREFIX,
    CHUNK,
    CheckedLoader,
    Entry,
    GlooGroup,
    WireError,
    checksum,
    hex_checksum,
    local_address,
    pack,
    plan_buckets,
    receive,
    unpack,
    with_checksums,
)

MASK = 2**64 - 1


def splitmix64(state: int) -> int:
    z = state & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def slow_checksum(data: bytes) -> str:
    """The same sum with Python's integers."""

    def weight(index: int, salt: int) -> int:
        return splitmix64((index + 1 + (salt << 40)) * 0x9E3779B97F4A7C15) | 1

    total = len(data) * weight(0, 1)
    padded = data + bytes(-len(data) % 4)
    words = [int.from_bytes(padded[i : i + 4], "little", signed=True) for i in range(0, len(padded), 4)]
    for chunk in range(0, len(words), CHUNK):
        inner = sum(word * weight(i, 0) for i, word in enumerate(words[chunk : chunk + CHUNK]))
        total += inner * weight(chunk // CHUNK, 1)
    return f"{total & MASK:016x}"


@pytest.mark.parametrize("count", [0, 1, 5, 1000, CHUNK - 1, CHUNK, 2 * CHUNK + 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_checksum_equals_python_integers(count: int, dtype: torch.dtype) -> None:
    tensor = torch.randn(count, generator=torch.Generator().manual_seed(1)).to(dtype)
    data = tensor.view(torch.uint8).numpy().tobytes() if count else b""
    assert hex_checksum(checksum(tensor)) == slow_checksum(data)


def test_checksum_does_not_depend_on_strides_or_alignment() -> None:
    tensor = torch.randn(6, 10)
    assert torch.equal(checksum(tensor.T.contiguous().T), checksum(tensor))
    shifted = torch.zeros(7, dtype=torch.bfloat16)[1:].copy_(torch.arange(6))
    assert torch.equal(checksum(shifted), checksum(torch.arange(6).bfloat16()))
    assert checksum(torch.tensor(1.0)).shape == (8,)


def test_checksum_notices_single_bits_exchanges_and_length() -> None:
    tensor = torch.randn(300)
    sums = {hex_checksum(checksum(tensor))}
    words = tensor.view(torch.int32)
    for position in (0, 1, 150, 299):
        for bit in range(32):
            changed = words.clone()
            changed[position] ^= torch.tensor(-(2**31) if bit == 31 else 2**bit, dtype=torch.int32)
            sums.add(hex_checksum(checksum(changed)))
    assert len(sums) == 1 + 4 * 32
    signs = torch.ones(300)
    signs[7] = -1.0
    moved = torch.ones(300)
    moved[8] = -1.0
    assert not torch.equal(checksum(signs), checksum(moved))
    assert not torch.equal(checksum(torch.zeros(3)), checksum(torch.zeros(4)))
    distant = torch.randn(2 * CHUNK)
    exchanged = torch.cat([distant[CHUNK:], distant[:CHUNK]])
    assert not torch.equal(checksum(distant), checksum(exchanged))


def weights() -> list[tuple[str, torch.Tensor]]:
    torch.manual_seed(0)
    return [
        ("a", torch.randn(3, 5)),
        ("b", torch.randn(7).bfloat16()),
        ("c", torch.randn(64, 64)),
        ("d", torch.tensor(2.5)),
    ]


def entries_of(pairs: list[tuple[str, torch.Tensor]]) -> list[Entry]:
    return [Entry(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in pairs]


@pytest.mark.parametrize("bucket_bytes", [1, 100, 5000, 10**6])
def test_buckets_cover_every_tensor_once_in_order_and_aligned(bucket_bytes: int) -> None:
    pairs = list(with_checksums(weights()))
    entries = entries_of(pairs)
    buckets = plan_buckets(entries, bucket_bytes)
    assert [b.first for b in buckets] == [
        sum(len(x.offsets) for x in buckets[:i]) for i in range(len(buckets))
    ]
    assert sum(len(b.offsets) for b in buckets) == len(entries)
    assert all(offset % ALIGNMENT == 0 for b in buckets for offset in b.offsets)
    assert all(b.nbytes <= bucket_bytes or len(b.offsets) == 1 for b in buckets)
    stream = iter(pairs)
    for bucket in buckets:
        for name, tensor in unpack(bucket, entries, pack(bucket, entries, stream)):
            assert torch.equal(tensor, dict(pairs)[name])
    assert next(stream, None) is None


def test_a_source_that_departs_from_its_metadata_is_named() -> None:
    entries = entries_of(weights())
    (bucket,) = plan_buckets(entries, 10**6)
    with pytest.raises(WireError, match=r"declared b torch.bfloat16 \(7,\) and yielded c"):
        pack(bucket, entries, iter([weights()[0], weights()[2]]))
    with pytest.raises(WireError, match="yielded None"):
        pack(bucket, entries, iter([]))


class Store:
    """A model's load_weights."""

    def __init__(self) -> None:
        self.loaded: dict[str, torch.Tensor] = {}

    def __call__(self, pairs: list[tuple[str, torch.Tensor]]) -> set[str]:
        self.loaded.update(pairs)
        return {name for name, _ in pairs}


def test_loader_passes_on_what_is_right() -> None:
    store = Store()
    loader = CheckedLoader(store, "worker 1", "abcd")
    for pair in with_checksums(weights()):
        loader([pair])
    loader.finish()
    assert {name: tensor.tolist() for name, tensor in store.loaded.items()} == {
        name: tensor.tolist() for name, tensor in weights()
    }


def test_loader_names_the_corrupted_tensor_and_loads_nothing_after_it() -> None:
    store = Store()
    pairs = list(with_checksums(weights()))
    expected, got = checksum(pairs[3][1]), pairs[3][1].clone()
    got[0] += 1
    pairs[3] = ("b", got)
    loader = CheckedLoader(store, "worker 1")
    loader(pairs[:2])
    loader(pairs[2:4])
    loader(pairs[4:])
    sums = f"checksum expected {hex_checksum(expected)}, got {hex_checksum(checksum(got))}"
    with pytest.raises(WireError, match=f"worker 1: tensor b is corrupted: {sums}"):
        loader.finish()
    assert set(store.loaded) == {"a"}


def test_loader_refuses_what_is_unannounced_or_missing() -> None:
    loader = CheckedLoader(Store(), "worker 1")
    loader(weights())
    with pytest.raises(WireError, match="worker 1: tensor a arrived without its checksum"):
        loader.finish()
    loader = CheckedLoader(Store(), "worker 1")
    loader([(CHECKSUM_PREFIX + "a", checksum(torch.zeros(1)))])
    with pytest.raises(WireError, match="worker 1: tensor a was announced and never arrived"):
        loader.finish()
    loader = CheckedLoader(Store(), "worker 1", ["a", "b", "e"])
    loader(with_checksums(weights()[:2]))
    with pytest.raises(WireError, match="worker 1: 1 parameters got no weights, among them e"):
        loader.finish()


def run_wire(size: int, deadline_s: float, silent: int | None = None) -> tuple[list[object], float]:
    """Rank 0 sends the weights over threads' gloo groups; rank `silent` joins and then never receives."""
    outcome: list[object] = [None] * size
    store = GlooGroup.store("127.0.0.1", deadline_s)
    entries = entries_of(list(with_checksums(weights())))
    done = threading.Event()

    def send() -> None:
        group = GlooGroup(store, 0, size, deadline_s)
        pairs = with_checksums(weights())
        try:
            for bucket in plan_buckets(entries, 5000):
                group.broadcast(pack(bucket, entries, pairs)).wait()
            outcome[0] = "sent"
        except RuntimeError as error:
            outcome[0] = error
        finally:
            done.set()

    def listen(rank: int) -> None:
        group = GlooGroup(GlooGroup.store("127.0.0.1", deadline_s, store.port), rank, size, deadline_s)
        if rank == silent:
            group.close()
            done.wait()
            return
        target = Store()
        loader = CheckedLoader(target, f"worker {rank}", "abcd")
        try:
            receive(group, entries, 5000, loader)
            loader.finish()
            outcome[rank] = target.loaded
        except RuntimeError as error:
            outcome[rank] = error

    threads = [
        threading.Thread(target=send),
        *(threading.Thread(target=listen, args=(r,)) for r in range(1, size)),
    ]
    started = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcome, time.monotonic() - started


def test_gloo_wire_delivers_to_every_rank() -> None:
    outcome, _ = run_wire(3, 30.0)
    assert outcome[0] == "sent"
    for loaded in outcome[1:]:
        assert isinstance(loaded, dict)
        assert all(torch.equal(loaded[name], tensor) for name, tensor in weights())


def test_gloo_wire_with_a_dead_peer_errs_within_the_deadline() -> None:
    outcome, seconds = run_wire(2, 5.0, silent=1)
    assert isinstance(outcome[0], RuntimeError)
    assert seconds < 8


def test_the_address_towards_this_machine_is_the_loopback() -> None:
    assert local_address("127.0.0.1", 1) == "127.0.0.1"


@pytest.mark.parametrize("workers", range(1, 9))
@pytest.mark.parametrize("tensor_parallel", [1, 2, 4])
def test_rank_offsets_leave_no_gap_and_no_overlap(workers: int, tensor_parallel: int) -> None:
    from learner.weight_client import rank_offsets

    offsets = rank_offsets([tensor_parallel] * workers)
    ranks = [offset + rank for offset in offsets for rank in range(tensor_parallel)]
    assert ranks == list(range(1, 1 + workers * tensor_parallel))


def test_rank_offsets_of_unequal_workers() -> None:
    from learner.weight_client import rank_offsets

    assert rank_offsets([2, 1, 4]) == [1, 3, 4]
    assert rank_offsets([]) == []


@pytest.mark.parametrize("arriving", [3, 2])
def test_ranks_go_on_together_or_not_at_all(arriving: int) -> None:
    store = GlooGroup.store("127.0.0.1", 5.0)
    heard: list[bool] = []
    threads = [
        threading.Thread(
            target=lambda r=rank: heard.append(
                GlooGroup.arrive(GlooGroup.store("127.0.0.1", 5.0, store.port), r)
            )
        )
        for rank in range(1, 1 + arriving)
    ]
    for thread in threads:
        thread.start()
    gone_at = time.monotonic() + 0.5
    complete = GlooGroup.meet(store, 4, 5.0, lambda: arriving < 3 and time.monotonic() > gone_at)
    for thread in threads:
        thread.join()
    assert complete is (arriving == 3)
    assert heard == [complete] * arriving
    assert time.monotonic() - gone_at < 2


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2"])
def test_a_store_listens_where_it_is_told_to_and_nowhere_else(host):
    store = GlooGroup.store(host, 5.0)
    at_the_port = [
        connection.laddr.ip
        for connection in psutil.Process().net_connections("inet")
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == store.port
    ]
    assert at_the_port == [host]
    GlooGroup.store(host, 5.0, store.port).set("key", "value")
    assert store.get("key") == b"value"
