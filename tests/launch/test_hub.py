"""A hub model: looked at before it is downloaded, downloaded once, and loaded from the cache from then on."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from advisor.errors import EnvironmentLacksError, InputError
from advisor.launch.model import download, find_files

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LEFT_OUT = "pytorch_model.bin"
"""In the repository, and never wanted."""


class Hub(ThreadingHTTPServer):
    """Serves one folder as the hub serves the repository someone/small.

    Args:
        folder: what the repository holds.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files = {path.name: path for path in folder.iterdir()}
        self.fetched: list[str] = []
        self.gated = False


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        path = self.path.partition("?")[0]
        name = path.rpartition("/")[2]
        if self.server.gated or "someone/small" not in path:
            self._send(403 if self.server.gated else 404, b"", {"X-Error-Code": "GatedRepo"})
        elif "/tree/" in path:
            tree = [
                {"type": "file", "path": name, "size": path.stat().st_size, "oid": "0"}
                for name, path in self.server.files.items()
            ]
            tree.append({"type": "file", "path": LEFT_OUT, "size": 10**12, "oid": "0"})
            self._send(200, json.dumps(tree).encode(), {"Content-Type": "application/json"})
        elif path.startswith("/api/"):
            siblings = [{"rfilename": name, "size": path.stat().st_size} for name, path in self.server.files.items()]
            siblings.append({"rfilename": LEFT_OUT, "size": 10**12})
            info = {"id": "someone/small", "sha": COMMIT, "siblings": siblings, "private": False, "tags": []}
            self._send(200, json.dumps(info).encode(), {"Content-Type": "application/json"})
        elif name in self.server.files:
            body = self.server.files[name].read_bytes()
            if with_body:
                self.server.fetched.append(name)
            headers = {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X-Repo-Commit": COMMIT}
            self._send(200, body if with_body else b"", {**headers, "Content-Length": str(len(body))})
        else:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound"})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing: the test says what matters."""


@pytest.fixture
def hub(small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    from huggingface_hub import constants

    server = Hub(small_model)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        f"http://127.0.0.1:{server.server_port}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_look_downloads_nothing_and_the_download_is_what_was_said(hub: Hub, small_model: Path) -> None:
    files = find_files("someone/small")
    wanted = [path for path in small_model.iterdir() if path.name != LEFT_OUT]
    assert hub.fetched == []
    assert files.download_bytes == sum(path.stat().st_size for path in wanted)
    assert files.largest_file_bytes == (small_model / "model.safetensors").stat().st_size
    download(files)
    assert sorted(hub.fetched) == sorted(path.name for path in wanted)
    hub.shutdown()  # the cache is enough from here on
    again = find_files("someone/small")
    assert (again.download_bytes, again.weight_bytes) == (0, files.weight_bytes)


def test_a_repository_that_is_not_there_or_not_ours_to_read(hub: Hub) -> None:
    with pytest.raises(EnvironmentLacksError, match="neither here nor to be reached"):
        find_files("someone/else")
    hub.gated = True
    with pytest.raises(EnvironmentLacksError) as error:
        find_files("someone/small")
    assert "hf auth login" in error.value.hint


def test_a_repository_without_safetensors_is_refused(hub: Hub) -> None:
    del hub.files["model.safetensors"]
    with pytest.raises(InputError, match="has no safetensors"):
        find_files("someone/small")


def test_a_download_that_breaks_off_says_that_it_can_go_on(hub: Hub) -> None:
    files = find_files("someone/small")
    del hub.files["config.json"]
    hub.gated = True
    with pytest.raises(EnvironmentLacksError) as error:
        download(files)
    assert "goes on where it stopped" in error.value.hint
