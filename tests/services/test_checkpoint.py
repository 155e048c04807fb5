"""Checkpoints are whole or absent: killed at any moment, altered, pruned."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from services.checkpoint import MANIFEST, CheckpointError, Checkpoints, read_manifest, verify

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
    assert checkpoints.newest_whole() is None


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


@pytest.mark.parametrize(
    "name", ["step-000006.bak", "step-6", "step-0000006", "step-00000٦", "step-", "step-x"]
)
def test_a_folder_of_another_name_is_nobodys(tmp_path, name):
    checkpoints = Checkpoints(tmp_path, keep=1)
    shutil.copytree(write(checkpoints, 6), tmp_path / name)
    write(checkpoints, 8)
    assert checkpoints.steps() == [8]
    assert (tmp_path / name / MANIFEST).exists()


def test_the_newest_whole_one_is_found_and_the_others_are_named(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=4)
    for step in (2, 4, 6, 8):
        write(checkpoints, step)
    (tmp_path / "step-000008" / MANIFEST).unlink()
    (tmp_path / "step-000006" / "buffer.parquet").write_bytes(b"cut")
    found = checkpoints.newest_whole()
    assert found is not None
    assert (found.step, found.folder, found.state["step"]) == (4, tmp_path / "step-000004", 4)
    assert [reason.split(":")[0] for reason in found.skipped] == [
        f"{tmp_path}/step-000008 has no manifest.json",
        f"{tmp_path}/step-000006",
    ]
    older = checkpoints.newest_whole(2)
    assert older is not None
    assert (older.step, older.skipped) == (2, [])
    assert checkpoints.newest_whole(3) is None
    with pytest.raises(CheckpointError, match=r"step-000006: buffer\.parquet differs"):
        checkpoints.newest_whole(6)


def test_what_a_run_did_not_go_on_from_is_out_of_sight_and_goes_with_the_next_one(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (4, 6):
        write(checkpoints, step)
    assert checkpoints.supersede(4) == [6]
    assert checkpoints.steps() == [4]
    assert (tmp_path / ".superseded-step-000006" / MANIFEST).exists(), "nothing is lost before there is more"
    write(checkpoints, 5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000004", "step-000005"]


def test_a_manifest_names_only_files_of_its_folder(tmp_path):
    folder = write(Checkpoints(tmp_path, keep=2), 5)
    (tmp_path / "secret").write_text("s")
    (folder / "link").symlink_to(tmp_path)
    manifest = json.loads((folder / MANIFEST).read_text())
    for name in ("../secret", "link/secret", str(tmp_path / "secret"), "a\0b", "a/../../../secret"):
        files = {name: {"bytes": 1, "crc32": 0}} | manifest["files"]
        (folder / MANIFEST).write_text(json.dumps(manifest | {"files": files}))
        with pytest.raises(CheckpointError, match="leads out of"):
            verify(folder)


def test_a_checkpoint_says_which_code_wrote_it(tmp_path):
    code = read_manifest(write(Checkpoints(tmp_path, keep=2), 5)).code
    assert code["torch"] == importlib.metadata.version("torch")
    assert len(code["rlgaf"].partition("+")[2]) == 12


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
    assert [path.name for path in tmp_path.iterdir()] == ["step-000005"]


KILLED = """
import os, pathlib, signal, sys
from services.checkpoint import Checkpoints

root, step, moment = pathlib.Path(sys.argv[1]), int(sys.argv[2]), 0
TOUCHES = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree", "os.fsync")
checkpoints = Checkpoints(root / "0", keep=1)

def touched(event, arguments):
    global moment
    if event in TOUCHES and armed:
        moment -= 1
        if moment == 0:
            os.kill(os.getpid(), signal.SIGKILL)

def synced(descriptor, fsync=os.fsync):
    sys.audit("os.fsync", descriptor)
    fsync(descriptor)

armed, os.fsync = False, synced
sys.addaudithook(touched)
for chosen in range(1, 400):
    checkpoints = Checkpoints(root / str(chosen), keep=1)
    folder = checkpoints.begin(5)
    (folder / "learner").mkdir()
    (folder / "learner" / "model.bin").write_text("old")
    checkpoints.commit(5, {"step": 5, "of": "old"})
    child = os.fork()
    if child == 0:
        armed, moment = True, chosen
        folder = checkpoints.begin(step)
        (folder / "learner").mkdir()
        (folder / "learner" / "model.bin").write_text("new")
        checkpoints.commit(step, {"step": step, "of": "new"})
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        break
print(chosen)
"""


@pytest.mark.parametrize("step", [10, 5])
def test_killed_at_any_moment_the_old_or_the_new_one_is_whole(tmp_path, step):
    """A child is killed before its first, second, ... touch of the disk, until none is left; it writes the
    next step, or the same one again."""
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), str(step)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = []
    for moment in range(1, int(done.stdout) + 1):
        checkpoints = Checkpoints(tmp_path / str(moment), keep=1)
        newest = checkpoints.newest_whole()
        assert newest is not None, f"no checkpoint after a kill at moment {moment}"
        assert newest.skipped == [], f"a broken one lies about after a kill at moment {moment}"
        assert (newest.folder / "learner" / "model.bin").read_text() == newest.state["of"]
        found.append(newest.state["of"])
        write(checkpoints, 15)
        assert [path.name for path in checkpoints.root.iterdir()] == ["step-000015"], (
            "what was left is cleared"
        )
    assert found == sorted(found, reverse=True), "once the new one is there, it stays"
    assert found.count("old") >= 10
    assert found.count("new") >= 5


def test_at_each_renaming_everything_is_on_disk(tmp_path, monkeypatch):
    """A power cut keeps what was synced: when a name becomes visible, the files, the folders and the manifest
    under it have been synced since they were last changed, and the name itself is synced next."""
    synced: dict[int, int] = {}
    order: list[tuple[str, Path]] = []
    fsync = os.fsync

    def remember(descriptor: int) -> None:
        fsync(descriptor)
        stat = os.fstat(descriptor)
        synced[stat.st_ino] = stat.st_mtime_ns
        order.append(("sync", Path(os.readlink(f"/proc/self/fd/{descriptor}"))))

    def watched(rename: Callable[..., None]) -> Callable[..., None]:
        def renames(source: Path, target: Path) -> None:
            order.append(("rename", target))
            if target.name.startswith("step-") or target.name == MANIFEST:
                parts = [source, *source.rglob("*")] if source.is_dir() else [source]
                late.extend(
                    part for part in parts if synced.get(part.stat().st_ino) != part.stat().st_mtime_ns
                )
            rename(source, target)

        return renames

    late: list[Path] = []
    monkeypatch.setattr(os, "fsync", remember)
    monkeypatch.setattr(os, "rename", watched(os.rename))
    monkeypatch.setattr(os, "replace", watched(os.replace))
    for step in (5, 10, 10):
        write(Checkpoints(tmp_path, keep=2), step)
    assert late == []
    assert len([target for what, target in order if what == "rename"]) >= 6
    for place, (what, target) in enumerate(order):
        if what == "rename" and (target.name.startswith("step-") or target.name == MANIFEST):
            assert ("sync", target.parent) in order[place:], f"the renaming to {target} may be lost"


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
