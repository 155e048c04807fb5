"""The release's files that are downloaded: whole, once, and a skipped test where there is no network."""

import http.server
import threading
from pathlib import Path

import fetched_tools
import pytest
from crd import KINDS
from free_ports import free_ports


@pytest.fixture(autouse=True)
def empty(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No folder that is named, nothing fetched yet."""
    monkeypatch.delenv("RLGAF_KUBERAY_CRDS", raising=False)
    monkeypatch.setenv("RLGAF_TEST_TOOLS", str(tmp_path / "cache"))
    monkeypatch.setattr(fetched_tools, "_missing", {})


def serve(folder: Path) -> http.server.ThreadingHTTPServer:
    class Files(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments, directory=str(folder))  # type: ignore[arg-type]

        def log_message(self, *words: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Files)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def test_crds_are_downloaded_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (release := tmp_path / "release").mkdir()
    files = {f"ray.io_{plural}.yaml" for plural in KINDS.values()}
    for name in files:
        (release / name).write_text(name)
    server = serve(release)
    monkeypatch.setattr(fetched_tools, "KUBERAY_CRDS", f"http://127.0.0.1:{server.server_port}")
    folder = fetched_tools.kuberay_crds()
    server.shutdown()
    server.server_close()
    assert {path.name: path.read_text() for path in folder.iterdir()} == {name: name for name in files}
    assert fetched_tools.kuberay_crds() == folder


def test_without_a_network_the_test_is_skipped_and_nothing_is_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (port,) = free_ports(1)
    monkeypatch.setattr(fetched_tools, "KUBERAY_CRDS", f"http://127.0.0.1:{port}")
    why = r"kuberay-crds-1.7.0 cannot be had here: RLGAF_KUBERAY_CRDS may name .* refused"
    with pytest.raises(pytest.skip.Exception, match=why):
        fetched_tools.kuberay_crds()
    assert list((tmp_path / "cache").iterdir()) == []
    monkeypatch.setattr(fetched_tools, "urllib", None)  # a second test does not try again
    with pytest.raises(pytest.skip.Exception, match=why):
        fetched_tools.kuberay_crds()
