import pytest
import torch

from discriminator.versions import ChecksumMismatch, UnknownVersion, VersionStore, state_checksum


def test_keeps_the_last_two_and_names_them() -> None:
    store = VersionStore()
    for version in range(4):
        store.publish(version, f"sum{version}", {"payload": version})
    assert store.fetch(3) == ("sum3", {"payload": 3})
    assert store.versions() == [2, 3]
    with pytest.raises(UnknownVersion, match=r"version 1 is not held; held: \[2, 3\]"):
        store.fetch(1)


def test_publishing_again_is_harmless_but_not_with_other_weights() -> None:
    store = VersionStore()
    store.publish(0, "a", 1)
    store.publish(0, "a", 2)
    assert store.fetch(0) == ("a", 1)
    with pytest.raises(ChecksumMismatch):
        store.publish(0, "b", 1)


def test_versions_only_grow() -> None:
    store = VersionStore()
    with pytest.raises(UnknownVersion):
        store.newest()
    store.publish(5, "a", None)
    with pytest.raises(ValueError, match="older"):
        store.publish(4, "b", None)


def test_checksum_sees_names_shapes_dtypes_and_every_bit_but_not_order() -> None:
    state = {"a": torch.arange(6.0), "b": torch.ones(2, 3, dtype=torch.bfloat16)}
    base = state_checksum(state)
    assert state_checksum(dict(reversed(state.items()))) == base
    changed = torch.arange(6.0)
    changed[4] = torch.nextafter(changed[4], torch.tensor(9.0))
    others = [
        {**state, "a": changed},
        {**state, "a": torch.arange(6.0).reshape(2, 3)},
        {"c": state["a"], "b": state["b"]},
        {**state, "b": torch.ones(2, 3, dtype=torch.float16)},
    ]
    assert len({base, *(state_checksum(other) for other in others)}) == 5
