"""The copy of a run's folder: on a local file system, and on a real S3 service where one is named."""

import os
import shutil
import uuid
from pathlib import Path

import pytest

from services.checkpoint import Checkpoints, verify
from services.config import Config, ConfigError
from services.mirror import IDENTITY, Mirror, check_mirror, fetch_newer

S3 = os.environ.get("RLGAF_TEST_S3", "")


@pytest.fixture(params=["file", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A folder of its own in the storage."""
    if request.param == "file":
        return f"file://{tmp_path}/storage"
    if not S3:
        pytest.skip(
            "RLGAF_TEST_S3 names no bucket; start moto_server, make one, and set it to "
            "s3://BUCKET?region=us-east-1&scheme=http&endpoint_override=127.0.0.1:5000"
        )
    bucket, _, options = S3.partition("?")
    return f"{bucket}/{uuid.uuid4().hex}?{options}"


def _config(folder: Path, url: str) -> Config:
    return Config.model_validate(
        {
            "run": {"output": str(folder), "name": "r", "mirror": url},
            "policy": {"model": "m"},
            "data": {"demonstrations": "d.jsonl"},
        }
    )


def _checkpoint(folder: Path, step: int) -> None:
    checkpoints = Checkpoints(folder / "checkpoints", 2)
    (checkpoints.begin(step) / "weights.bin").write_bytes(os.urandom(1000) + bytes([step]))
    checkpoints.commit(step, {"step": step})


def _files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_what_is_pulled_is_what_was_pushed(tmp_path: Path, url: str) -> None:
    here, elsewhere = tmp_path / "here" / "r", tmp_path / "elsewhere" / "r"
    _checkpoint(here, 2)
    (here / "metrics.jsonl").write_text('{"step": 2}\n')
    (here / "ray").mkdir()
    (here / "ray" / "own").write_text("stays")
    (here / ".best.partial").mkdir()
    (here / ".best.partial" / "half").write_text("unfinished")
    mirror = Mirror(here, url)
    assert mirror.empty()
    assert mirror.steps() == []
    first = mirror.push()
    assert mirror.push() == 0, "nothing has changed"

    _checkpoint(here, 4)
    (here / "metrics.jsonl").write_text('{"step": 2}\n{"step": 4}\n')
    assert 0 < mirror.push() < 2 * first, "only the new checkpoint and the changed file"
    assert Mirror(elsewhere, url).steps()[-1] == 4

    assert fetch_newer(_config(elsewhere.parent, url)) == 4
    found = _files(elsewhere)
    sent = {
        name: data
        for name, data in _files(here).items()
        if name.startswith(("checkpoints/step-000004", "m", IDENTITY))
    }
    assert found == sent, "the newest checkpoint and all other files, without Ray's and unfinished ones"
    assert verify(elsewhere / "checkpoints" / "step-000004") == {"step": 4}
    assert fetch_newer(_config(elsewhere.parent, url)) is None, "the copy is no newer"


def test_pruned_checkpoints_go_from_the_copy(tmp_path: Path, url: str) -> None:
    here = tmp_path / "r"
    mirror = Mirror(here, url)
    for step in (1, 2, 3):
        _checkpoint(here, step)
        mirror.push()
    names = {name for name in mirror._listed() if name.endswith("manifest.json")}
    assert names == {"checkpoints/step-000002/manifest.json", "checkpoints/step-000003/manifest.json"}


def test_a_broken_push_leaves_no_half_checkpoint(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "r"
    _checkpoint(here, 1)
    Mirror(here, url).push()
    _checkpoint(here, 2)
    broken = Mirror(here, url)
    upload = broken._upload

    def fails_at_weights(path: Path, name: str) -> None:
        if name.endswith("step-000002/weights.bin"):
            raise OSError("connection lost")
        upload(path, name)

    monkeypatch.setattr(broken, "_upload", fails_at_weights)
    with pytest.raises(OSError, match="connection lost"):
        broken.push()
    assert Mirror(here, url).steps()[-1] == 1
    monkeypatch.undo()
    broken.push()
    assert Mirror(here, url).steps()[-1] == 2


def test_a_broken_push_pairs_no_new_model_with_an_old_record(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, elsewhere = tmp_path / "here" / "r", tmp_path / "elsewhere" / "r"

    def best(of: str) -> dict[str, bytes]:
        files = {"best/weights": of, "samples/test-best.parquet": of, "samples/best.json": of}
        for name, text in files.items():
            (here / name).parent.mkdir(parents=True, exist_ok=True)
            (here / name).write_text(text)
        return {name: text.encode() for name, text in files.items()}

    def pulled() -> dict[str, bytes]:
        shutil.rmtree(elsewhere, ignore_errors=True)
        assert fetch_newer(_config(elsewhere.parent, url)) is not None
        return {name: data for name, data in _files(elsewhere).items() if "best" in name}

    first = best("step 1")
    _checkpoint(here, 1)
    mirror = Mirror(here, url)
    mirror.push()
    assert pulled() == first

    second = best("step 22")
    _checkpoint(here, 2)
    upload, left = mirror._upload, 0

    def fails_later(path: Path, name: str) -> None:
        nonlocal left
        if left == 0:
            raise OSError("connection lost")
        left -= 1
        upload(path, name)

    monkeypatch.setattr(mirror, "_upload", fails_later)
    for uploads in range(1, 100):
        left = uploads
        try:
            mirror.push()
        except OSError:
            found = pulled()
            record = found.get("samples/best.json")
            assert record is None or found == {name: record for name in found}, f"after {uploads} uploads"
        else:
            break
    assert pulled() == second


def test_an_older_copy_is_not_fetched(tmp_path: Path, url: str) -> None:
    here = tmp_path / "r"
    _checkpoint(here, 1)
    Mirror(here, url).push()
    _checkpoint(here, 2)
    assert fetch_newer(_config(tmp_path, url)) is None
    assert Checkpoints(here / "checkpoints", 2).steps() == [1, 2]


def test_a_new_run_refuses_the_copy_of_another(tmp_path: Path, url: str) -> None:
    check_mirror(_config(tmp_path, url), new=True)
    _checkpoint(tmp_path / "r", 1)
    Mirror(tmp_path / "r", url).push()
    with pytest.raises(ConfigError, match="holds a run named r already"):
        check_mirror(_config(tmp_path, url), new=True)


@pytest.mark.parametrize("url", ["nonsense://bucket/x", "s3://bucket/x?regoin=here"])
def test_a_url_that_arrow_does_not_know_is_refused(tmp_path: Path, url: str) -> None:
    with pytest.raises(ConfigError, match=r"run\.mirror"):
        Mirror(tmp_path / "r", url)


def test_a_path_is_no_url(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no URL"):
        _config(tmp_path, str(tmp_path))


def test_a_url_is_no_folder_for_runs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"give the URL as run\.mirror"):
        Config.model_validate(
            {"run": {"output": "s3://bucket/runs"}, "policy": {"model": "m"}, "data": {"demonstrations": "d"}}
        )


def test_storage_that_does_not_answer_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    url = "s3://bucket/x?region=us-east-1&scheme=http&endpoint_override=127.0.0.1:9"
    with pytest.raises(ConfigError, match=r"run\.mirror .* cannot be read"):
        check_mirror(_config(tmp_path, url), new=True)


def test_of_a_copy_with_a_broken_newest_one_the_one_before_is_fetched(tmp_path: Path, url: str) -> None:
    here, elsewhere = tmp_path / "here" / "r", tmp_path / "elsewhere" / "r"
    for step in (1, 2):
        _checkpoint(here, step)
    Mirror(here, url).push()
    (here / "checkpoints" / "step-000002" / "weights.bin").write_bytes(b"torn")
    Mirror(here, url).push()
    assert fetch_newer(_config(elsewhere.parent, url)) == 1
    found = Checkpoints(elsewhere / "checkpoints", 2).newest_whole()
    assert found is not None
    assert (found.step, len(found.skipped)) == (1, 1)


def test_a_broken_newest_checkpoint_here_is_fetched_from_the_copy(tmp_path: Path, url: str) -> None:
    here = tmp_path / "r"
    for step in (1, 2):
        _checkpoint(here, step)
    Mirror(here, url).push()
    whole = _files(here)
    (here / "checkpoints" / "step-000002" / "weights.bin").write_bytes(b"torn")
    assert fetch_newer(_config(tmp_path, url)) == 2
    assert _files(here) == whole


def test_a_step_is_fetched_without_touching_what_is_newer_here(tmp_path: Path, url: str) -> None:
    here = tmp_path / "r"
    _checkpoint(here, 1)
    (here / "metrics.jsonl").write_text("1\n")
    Mirror(here, url).push()
    shutil.rmtree(here / "checkpoints")
    _checkpoint(here, 3)
    (here / "metrics.jsonl").write_text("1\n3\n")
    assert fetch_newer(_config(tmp_path, url), step=2) is None
    assert fetch_newer(_config(tmp_path, url), step=1) == 1
    assert fetch_newer(_config(tmp_path, url), step=1) is None
    assert Checkpoints(here / "checkpoints", 2).steps() == [1, 3]
    assert (here / "metrics.jsonl").read_text() == "1\n3\n"


@pytest.mark.parametrize(
    "name",
    ["../outside", "samples/../../outside", "/outside", "checkpoints/step-000001/../../../outside", "a\0b"],
)
def test_no_object_is_written_outside_the_runs_folder(tmp_path: Path, name: str) -> None:
    """Object stores take any name; a file system does not, so the list is made up here."""
    here, elsewhere = tmp_path / "here" / "r", tmp_path / "elsewhere" / "r"
    _checkpoint(here, 1)
    url = f"file://{tmp_path}/storage"
    Mirror(here, url).push()
    mirror = Mirror(elsewhere, url)
    names = mirror._listed()
    (tmp_path / "storage" / "outside").write_text("x")
    (tmp_path / "storage" / "r" / "samples").mkdir()
    mirror._listed = lambda: [name, *names]  # type: ignore[method-assign]
    elsewhere.mkdir(parents=True)
    before = {path for path in tmp_path.rglob("*") if not path.is_relative_to(elsewhere)}
    with pytest.raises(ValueError, match="leads out of"):
        mirror.pull(1)
    assert {path for path in tmp_path.rglob("*") if not path.is_relative_to(elsewhere)} == before | {
        elsewhere.parent
    }
    assert Checkpoints(elsewhere / "checkpoints", 1).newest_whole() is None


def test_hidden_files_and_rays_own_do_not_come_from_a_copy(tmp_path: Path, url: str) -> None:
    here, elsewhere = tmp_path / "here" / "r", tmp_path / "elsewhere" / "r"
    _checkpoint(here, 1)
    mirror = Mirror(here, url)
    mirror.push()
    for name in (".lease", ".best/samples/best.json", "ray/x", "samples/.x"):
        mirror._upload(here / "checkpoints" / "step-000001" / "state.json", name)
    assert fetch_newer(_config(elsewhere.parent, url)) == 1
    assert {name.split("/")[0] for name in _files(elsewhere)} == {"checkpoints", IDENTITY}


def test_a_copy_in_the_runs_own_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    for place in (tmp_path, tmp_path / "link", tmp_path / "r", tmp_path / "r" / "best"):
        with pytest.raises(ConfigError, match=r"run\.mirror .* the copy would lie in the run's own folder"):
            Mirror(tmp_path / "r", f"file://{place}")


def test_two_runs_of_one_name_do_not_touch_each_others_copy(tmp_path: Path, url: str) -> None:
    """Both began before there was a copy; what one has not, the other's push would remove."""
    first, second = tmp_path / "a" / "x", tmp_path / "b" / "x"
    _checkpoint(first, 1)
    _checkpoint(second, 2)
    Mirror(first, url).push()
    with pytest.raises(OSError, match="another run of this name is copied there"):
        Mirror(second, url).push()
    assert Mirror(first, url).steps() == [1]
    _checkpoint(first, 3)
    Mirror(first, url).push()
    shutil.copytree(first, tmp_path / "c" / "x")
    Mirror(tmp_path / "c" / "x", url).push()  # the same run, moved


def test_storage_that_takes_nothing_is_found_out_before_the_start(tmp_path: Path) -> None:
    (tmp_path / "storage").write_text("a file, where the folder of copies should be")
    with pytest.raises(ConfigError, match=r"run\.mirror .* cannot be read or written"):
        check_mirror(_config(tmp_path, f"file://{tmp_path}/storage"), new=False)


def test_looking_leaves_no_object_behind(tmp_path: Path, url: str) -> None:
    check_mirror(_config(tmp_path, url), new=True)
    assert Mirror(tmp_path / "r", url).empty()
