"""Where Ray will listen and which token it will ask for; tests/e2e/test_run_scaled.py looks at the ports."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from services import ray_access
from services.config import ConfigError
from services.ray_access import MODE, ON_LOOPBACK, TOKEN, TOKEN_PATH, guard, host_of, own_folder, private


@pytest.fixture(autouse=True)
def home(tmp_path: Path) -> Iterator[Path]:
    """A home without a token, in an environment that comes back as it was."""
    with pytest.MonkeyPatch.context() as patch:
        for name in (TOKEN, TOKEN_PATH, MODE, "RAY_TMPDIR", *ON_LOOPBACK):
            patch.setenv(name, "")  # so that it is taken back, whatever the test sets
            patch.delenv(name)
        patch.setenv("HOME", str(tmp_path))
        yield tmp_path
    ray_access.reread()


def token_in(home: Path) -> None:
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").write_text("t" * 64)


@pytest.mark.parametrize("mode", [None, "disabled"])
def test_a_ray_of_its_own_is_on_loopback_with_a_token_that_nobody_else_has(home, mode):
    from ray._private.authentication.authentication_utils import is_token_auth_enabled
    from ray.util import get_node_ip_address

    token_in(home)
    os.environ |= {MODE: mode} if mode else {}
    made = set()
    for _ in range(2):
        guard(None)
        made.add(os.environ[TOKEN])
    assert len(made) == 2
    assert {len(token) for token in made} == {64}
    assert "t" * 64 not in made
    assert is_token_auth_enabled()
    assert get_node_ip_address() == "127.0.0.1"
    assert os.environ["RAY_TMPDIR"] == str(own_folder())


@pytest.mark.parametrize("address", ["127.0.0.1:6379", "localhost:6379", "ray://[::1]:10001"])
def test_a_cluster_here_is_joined_with_the_token_that_is_here(home, address):
    guard(address)
    assert os.environ.items() >= ON_LOOPBACK.items()
    assert MODE not in os.environ
    token_in(home)
    guard(address)
    assert os.environ[MODE] == "token"
    assert TOKEN not in os.environ


def test_a_cluster_elsewhere_gets_no_token_unasked(home):
    token_in(home)
    guard("head.example:6379")
    assert not {TOKEN, MODE, *ON_LOOPBACK} & set(os.environ)


def test_a_token_that_is_not_there_is_one_sentence(home):
    os.environ[MODE] = "token"
    with pytest.raises(ConfigError, match=rf"no token for head:6379: put it into {TOKEN} or .*auth_token"):
        guard("head:6379")


def test_a_folder_that_others_can_enter_holds_no_sessions(monkeypatch):
    folder = Path("/tmp/rlgaf-424242")
    monkeypatch.setattr(os, "getuid", lambda: 424242)
    try:
        with pytest.raises(ConfigError, match=f"{folder} must be a folder that only you can enter"):
            own_folder()  # this user's, who is another one
    finally:
        folder.rmdir()
    folder.symlink_to("/tmp")
    try:
        with pytest.raises(ConfigError, match="only you can enter"):
            own_folder()
    finally:
        folder.unlink()


@pytest.mark.parametrize(
    ("address", "host"),
    [("node:6379", "node"), ("ray://[::1]:10001", "::1"), ("auto", ""), ("10.0.0.7:1", "10.0.0.7")],
)
def test_hosts(address, host):
    assert host_of(address) == host


@pytest.mark.parametrize(
    ("url", "is_private"),
    [
        ("http://127.0.0.1:8265", True),
        ("http://localhost:8265", True),
        ("http://[::1]:8265", True),
        ("https://head.example:8265", True),
        ("http://head.example:8265", False),
        ("http://127.0.0.1.head.example:8265", False),
        ("http://192.0.2.77:8265", False),
    ],
)
def test_a_token_goes_by_https_or_to_this_machine(url, is_private):
    assert private(url) == is_private
