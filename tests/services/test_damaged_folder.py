"""Fuzzer: whatever is damaged in a run's folder, a resume works or is refused in a sentence, and nothing is
written, least of all outside the folder.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from run_folders import checkpointed

from services.checkpoint import CONFIG, MANIFEST, STATE, seal
from services.config import Config, ConfigError, load
from services.jobs.resumption import find_checkpoint
from services.lease import LEASE
from services.metrics import MetricsLog, read_metrics
from services.run_folder import BEST_RECORD, check_folder, check_resume, read_best
from services.watching.alarms import AlarmBounds, Alarms

NEWEST = "checkpoints/step-000004"
FILES = {
    "summary.json": b'{"steps": 2, "method": "rlgaf", "wall_seconds": 1.5}',
    LEASE: b'{"host": "h", "space": "s", "pid": 7, "token": "t", "time": 1.5}',
    BEST_RECORD: b'{"step": 2, "key": 0.25, "nll": 2.5}',
}
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([10**30, -(10**30), 10**400, 2**63, 1e308, float("nan"), float("inf")])
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["../x", "/etc/passwd", "\0", "step", "steps", "files", "x" * 5000]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
Damage = Callable[[bytes], bytes | None]


def flipped(bits: list[int]) -> Damage:
    def damage(content: bytes) -> bytes:
        changed = bytearray(content)
        for bit in bits if changed else ():
            changed[(bit >> 3) % len(changed)] ^= 1 << (bit & 7)
        return bytes(changed)

    return damage


def cut(keep: int, tail: bytes) -> Damage:
    return lambda content: content[: keep % (len(content) + 1)] + tail


def nested(depth: int) -> Damage:
    return lambda content: (b"a = " if b"[run]\n" in content else b"") + b"[" * depth + b"]" * depth


def replaced(place: int, value: Any) -> Damage:
    """One value somewhere in the first JSON object, or line of objects, is another."""

    def damage(content: bytes) -> bytes:
        head, newline, rest = content.partition(b"\n") if content.count(b"}\n{") else (content, b"", b"")
        try:
            document = json.loads(head)
        except ValueError:
            return content + repr(value).encode()
        node = document
        for turn in range(8):
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            key = keys[(place >> 4 * turn) % len(keys)]
            if not isinstance(node[key], dict | list) or not node[key] or turn == 7 or place >> 4 * turn & 8:
                node[key] = value
                break
            node = node[key]
        return json.dumps(document).encode(errors="surrogatepass") + newline + rest

    return damage


DAMAGE: st.SearchStrategy[Damage] = st.one_of(
    st.builds(flipped, st.lists(st.integers(0, 2**20), min_size=1, max_size=4)),
    st.builds(cut, st.integers(0, 2**20), st.sampled_from([b"", b"\0" * 40, b"\xff", b"\n", b'{"step": 1}'])),
    st.builds(nested, st.sampled_from([1, 200, 100_000])),
    st.builds(replaced, st.integers(0, 2**32), JSON),
    st.builds(lambda value: lambda _: json.dumps(value).encode(errors="surrogatepass"), JSON),
    st.sampled_from([lambda _: None, lambda _: b""]),
)


def whole_run(folder: Path) -> Config:
    words = ["--policy.model=m", "--data.demonstrations=d", "--run.steps=6", f"--run.output={folder}"]
    config = load(None, words)
    for step in (2, 4):
        cursor = {"epoch": 0, "position": 3, "seed": 0, "prompts": "ab"}
        checkpointed(config, step, prompts=cursor, ledger={"submitted": 4}, early={"looks": 1})
    for name, content in FILES.items():
        (config.folder / name).parent.mkdir(exist_ok=True)
        (config.folder / name).write_bytes(content)
    return config


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    stats = {path: path.lstat() for path in folder.rglob("*")}
    return {str(path): (stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()}


def resume(config: Config) -> None:
    """All that is read of a folder before its run goes on."""
    check_folder(config, resume=True, auto=False)
    found = find_checkpoint(config, auto=False, step=None, say=lambda line: None)
    assert found is not None
    check_resume(config, found, lambda line: None)
    copy = config.folder.parent / "copy"
    copy.mkdir()
    shutil.copy(config.folder / "metrics.jsonl", copy)
    log = MetricsLog(copy, tensorboard=False)
    log.truncate_after(found.step)
    log.log(found.step + 1, {"reward": {"mean": 0.5}})
    log.close()
    Alarms(AlarmBounds()).check(read_metrics(log.path))
    read_best(config.folder)


@contextmanager
def damaged(file: Path, damage: Damage, reseal: bool) -> Iterator[None]:
    """The file is damaged, or a folder is in its place; to `reseal` is to have the manifest agree."""
    manifest = file.with_name(MANIFEST)
    whole = {path: path.read_bytes() for path in (file, manifest) if path.exists()}
    content = damage(whole[file])
    file.unlink()
    if content is None:
        file.mkdir()
    else:
        file.write_bytes(content)
    if reseal and content is not None:
        manifest.unlink()
        seal(file.parent, 4)
    yield
    if file.is_dir():
        file.rmdir()
    for path, before in whole.items():
        path.write_bytes(before)


def said_of(config: Config) -> str:
    try:
        resume(config)
    except ConfigError as error:
        return str(error)
    return "works"


def fuzz(place: Path, cases: int) -> None:
    config = whole_run(place)
    sealed = [f"{NEWEST}/{name}" for name in (MANIFEST, STATE, CONFIG, "weights")]
    count = 0

    @settings(
        max_examples=cases, deadline=None, database=None, derandomize=cases < 10_000, print_blob=False,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.sampled_from([*sealed, *FILES, "metrics.jsonl"]), DAMAGE, st.booleans())
    def each(name: str, damage: Damage, reseal: bool) -> None:
        nonlocal count
        count += 1
        with damaged(config.folder / name, damage, reseal and name in sealed[1:3]):
            before = listing(place)
            lines = said_of(config).split("\n")
            shutil.rmtree(place / "copy", ignore_errors=True)
            assert listing(place) == before
        assert len(lines) < 20
        assert all(line and line.isprintable() and len(line) < 1000 for line in lines), lines

    each()
    assert count >= cases
    assert said_of(config) == "works"


def test_damage_is_passed_over_or_said(tmp_path):
    fuzz(tmp_path / "runs", 150)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_damage_is_passed_over_or_said_in_ten_thousand_cases(tmp_path):
    fuzz(tmp_path / "runs", 10_000)
