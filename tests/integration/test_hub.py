"""Hub ids through the real client, against a small hub on loopback."""

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.conftest import RunQlora

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """Serves one repository, `owner/tiny`, as the hub does; any other does not exist."""

    files: Path

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        path = self.path.split("?")[0]
        if path.startswith("/api/models/owner/tiny/revision/gone") or "/gone/" in path:
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, with_body)
        elif path.startswith("/api/models/owner/tiny/tree/"):
            entries = [
                {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": "0"} for file in self._files()
            ]
            self._send(200, json.dumps(entries).encode(), {}, with_body)
        elif path.startswith("/api/models/owner/tiny"):
            siblings = [{"rfilename": file.name} for file in self._files()]
            info = {"id": "owner/tiny", "modelId": "owner/tiny", "sha": COMMIT, "siblings": siblings, "tags": []}
            self._send(200, json.dumps(info).encode(), {}, with_body)
        elif path.startswith("/owner/tiny/resolve/"):
            content = (self.files / path.rsplit("/", 1)[-1]).read_bytes()
            etag = hashlib.sha256(content).hexdigest()
            self._send(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}, with_body)
        else:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, with_body)

    def _files(self) -> list[Path]:
        return sorted(self.files.iterdir())

    def _send(self, code: int, content: bytes, headers: dict[str, str], with_body: bool) -> None:
        self.send_response(code)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if with_body:
            self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


@pytest.fixture
def hub(base_model: Path, tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a process that asks the loopback hub."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("BundledHub", (Hub,), {"files": base_model}))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}",
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path / "hf-home"),
        "HF_HUB_DISABLE_XET": "1",
    }
    server.shutdown()
    server.server_close()


def test_a_hub_id_is_downloaded_and_its_commit_recorded(
    run_qlora: RunQlora, hub: dict[str, str], rows: Path, tmp_path: Path
) -> None:
    done = run_qlora("load", "owner/tiny", "--revision", "main", "--device", "cpu", "--json", env=hub)
    assert done.code == 0, done.stderr
    assert (done.json["model"], done.json["revision"], done.json["commit"]) == ("owner/tiny", "main", COMMIT)
    arguments = ["train", "--model", "owner/tiny", "--dataset", rows, "--output", tmp_path / "run"]
    trained = run_qlora(*arguments, "--max-steps", "1", "--device", "cpu", "--json", env=hub)
    assert trained.code == 0, trained.stderr
    adapter = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == "owner/tiny"
    assert json.loads((tmp_path / "run" / "run.json").read_text())["base_model"]["commit"] == COMMIT


def test_a_missing_repository_or_revision_is_named(run_qlora: RunQlora, hub: dict[str, str]) -> None:
    done = run_qlora("load", "owner/nothing", env=hub)
    assert done.code == 2
    assert "no model at 'owner/nothing'" in done.stderr
    done = run_qlora("load", "owner/tiny", "--revision", "gone", env=hub)
    assert done.code == 2
    assert "has no revision 'gone'" in done.stderr


def test_a_hub_that_is_away_is_not_a_traceback(run_qlora: RunQlora, tmp_path: Path) -> None:
    away = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf-home")}
    done = run_qlora("load", "owner/tiny", env=away)
    assert done.code == 2
    assert "can't be reached" in done.stderr
    assert "Traceback" not in done.stderr
