"""Checkpoints are whole or absent: killed at any moment, altered, pruned."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from services.checkpoint import MANIFEST, CheckpointError, Checkpoints, verify

ROOT = Path(__file__).parents[2]


def write(checkpoints: Checkpoints, step: int, text: str = "weights") -> Path:
    folder = checkpoints.begin(step)
    (folder / "learner").mkdir()
    (folder / "learner" / "model.bin").write_text(f"{text} {step}")
    (folder / "buffer.parquet").write_bytes(bytes(range(256)) * 4)
    return checkpoints.commit(step, {"step": step, "clock": [step, step + 1]})


def test_what_was_written_comes_back(tmp_path):
    folder = write(Checkpoints(tmp_path / "checkpoints", keep=2), 7)
    assert folder == tmp_path / "checkpoints" / "step-000007"
    assert verify(folder) == {"step": 7, "clock": [7, 8]}
    assert (folder / "learner" / "model.bin").read_text() == "weights 7"
    assert Checkpoints(tmp_path / "checkpoints", keep=2).newest() == folder


def test_none_yet(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    assert checkpoints.steps() == []
    assert checkpoints.newest() is None


def test_only_the_newest_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (5, 10, 15, 20):
        write(checkpoints, step)
    assert checkpoints.steps() == [15, 20]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000015", "step-000020"]


def test_order_is_by_number_beyond_six_digits(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=3)
    for step in (999_999, 1_000_000):
        write(checkpoints, step)
    assert checkpoints.newest() == tmp_path / "step-1000000"


def test_unfinished_attempt_is_no_checkpoint_and_goes_away(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    write(checkpoints, 5)
    for step in (8, 10):
        (checkpoints.begin(step) / "half").write_text("written")
    assert checkpoints.steps() == [5]
    assert not (tmp_path / ".partial-step-000008").exists(), "an abandoned attempt takes space for ever"
    folder = write(checkpoints, 10)
    assert not (folder / "half").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000005", "step-000010"]


def test_the_same_step_again_replaces_it(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    write(checkpoints, 5, "old")
    folder = write(checkpoints, 5, "new")
    assert (folder / "learner" / "model.bin").read_text() == "new 5"
    assert verify(folder)["step"] == 5


KILLED = """
import os, pathlib, shutil, sys
from services import checkpoint
from services.checkpoint import Checkpoints

calls = 0
def watched(function):
    def call(*args, **kwargs):
        global calls
        calls += 1
        if calls == int(sys.argv[2]):
            os._exit(9)
        return function(*args, **kwargs)
    return call

checkpoints = Checkpoints(pathlib.Path(sys.argv[1]), keep=1)
moments = ((pathlib.Path, "write_text"), (pathlib.Path, "rename"),
           (os, "fsync"), (shutil, "rmtree"), (os, "unlink"))
for owner, name in moments:
    setattr(owner, name, watched(getattr(owner, name)))
folder = checkpoints.begin(10)
(folder / "learner").mkdir()
(folder / "learner" / "model.bin").write_text("weights 10")
(folder / "buffer.parquet").write_text("rows")
checkpoints.commit(10, {"step": 10})
print(calls)
"""


def test_killed_at_any_moment_the_old_or_the_new_one_is_whole(tmp_path):
    """Killed before the first, the second, ... write, rename, sync or deletion, until none is left."""
    outcomes = []
    for moment in range(1, 40):
        root = tmp_path / str(moment)
        write(Checkpoints(root, keep=1), 5)
        done = subprocess.run(
            [sys.executable, "-c", KILLED, str(root), str(moment)], cwd=ROOT, capture_output=True, text=True
        )
        newest = Checkpoints(root, keep=1).newest()
        assert newest is not None, f"no checkpoint after a kill at moment {moment}"
        outcomes.append(verify(newest)["step"])
        for step in Checkpoints(root, keep=1).steps():
            assert verify(root / f"step-{step:06d}")["step"] == step
        if done.returncode == 0:
            break
        assert done.returncode == 9, done.stderr
    assert done.returncode == 0
    assert outcomes == sorted(outcomes)
    assert outcomes.count(5) >= 4
    assert outcomes.count(10) >= 2


@pytest.mark.parametrize("name", ["learner/model.bin", "buffer.parquet", "state.json"])
@pytest.mark.parametrize("harm", ["flip", "cut", "remove", "empty"])
def test_an_altered_file_is_refused_by_name(tmp_path, name, harm):
    folder = write(Checkpoints(tmp_path, keep=2), 5)
    file = folder / name
    content = bytearray(file.read_bytes())
    if harm == "flip":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif harm == "cut":
        file.write_bytes(content[:-1])
    elif harm == "empty":
        file.write_bytes(b"")
    else:
        file.unlink()
    with pytest.raises(CheckpointError, match=name) as refused:
        verify(folder)
    assert str(folder) in str(refused.value)


def test_a_folder_without_manifest_is_no_checkpoint(tmp_path):
    folder = write(Checkpoints(tmp_path, keep=2), 5)
    (folder / MANIFEST).unlink()
    assert Checkpoints(tmp_path, keep=2).newest() is None
    with pytest.raises(CheckpointError, match="no finished checkpoint"):
        verify(folder)


def test_a_damaged_manifest_or_another_format_is_refused(tmp_path):
    folder = write(Checkpoints(tmp_path, keep=2), 5)
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | {"format": 99}))
    with pytest.raises(CheckpointError, match="format 99"):
        verify(folder)
    (folder / MANIFEST).write_text(json.dumps(manifest)[:-10])
    with pytest.raises(CheckpointError, match=MANIFEST):
        verify(folder)


def test_a_checkpoint_can_be_moved(tmp_path):
    folder = write(Checkpoints(tmp_path / "a", keep=2), 5)
    (tmp_path / "b").mkdir()
    shutil.copytree(folder, tmp_path / "b" / "step-000005")
    os.rename(tmp_path / "a", tmp_path / "c")
    newest = Checkpoints(tmp_path / "b", keep=2).newest()
    assert newest is not None
    assert verify(newest)["step"] == 5
