"""The pinned source archive: fetched once and checked before it is unpacked; whatever fails leaves nothing."""

import hashlib
import io
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from qlora_cli.errors import MissingDependencyError
from qlora_cli.events import BytesDone, PhaseStarted
from qlora_cli.merging.exports.llama_cpp.source_archive import SourceArchive
from tests.conftest import Recorder

TREE = "llama_cpp_python-0/vendor/llama.cpp"
NEEDED = {"convert_hf_to_gguf.py": b"one", "conversion/base.py": b"two", "gguf-py/gguf/__init__.py": b"three"}
OTHERS = {"src/llama.cpp": b"no", "gguf-py/tests/test_quants.py": b"no", "convert_hf_to_gguf_update.py": b"no"}


def packed(files: Mapping[str, bytes]) -> bytes:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return target.getvalue()


WHOLE = packed({f"{TREE}/{name}": content for name, content in (NEEDED | OTHERS).items()})


class Server(ThreadingHTTPServer):
    """Serves `content`; says that it has `announced` bytes."""

    content, announced, num_requests = WHOLE, len(WHOLE), 0


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        assert isinstance(self.server, Server)
        self.server.num_requests += 1
        self.send_response(404 if self.server.announced == 0 else 200)
        self.send_header("Content-Length", str(self.server.announced))
        self.end_headers()
        self.wfile.write(self.server.content)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name is theirs
        """Write nothing."""


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    with Server(("127.0.0.1", 0), Handler) as made:
        thread = Thread(target=lambda: made.serve_forever(poll_interval=0.01))
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def archive(server: Server, content: bytes = WHOLE) -> SourceArchive:
    url = f"http://127.0.0.1:{server.server_port}/sources.tar.gz"
    return SourceArchive(url=url, sha256=hashlib.sha256(content).hexdigest(), num_bytes=len(content))


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_it_is_downloaded_once_and_only_what_converts_is_unpacked(server: Server) -> None:
    sources, recorder = archive(server), Recorder()
    for _ in range(2):
        sources.unpack(None, recorder)
    assert files_in(sources.checkout) == NEEDED
    assert server.num_requests == 1
    assert list(sources.checkout.parent.iterdir()) == [sources.checkout]
    titles = [event.title for event in recorder.events if isinstance(event, PhaseStarted)]
    assert titles[0].startswith("Downloading llama.cpp's converter (")
    assert BytesDone(kind="download", done_bytes=len(WHOLE), total_bytes=len(WHOLE)) in recorder.events


def test_a_file_needs_no_network_and_has_to_be_the_pinned_one(server: Server, tmp_path: Path) -> None:
    sources, file = archive(server), tmp_path / "sources.tar.gz"
    file.write_bytes(WHOLE)
    sources.unpack(file, Recorder())
    assert (files_in(sources.checkout), server.num_requests) == (NEEDED, 0)
    file.write_bytes(WHOLE + b"0")
    with pytest.raises(MissingDependencyError, match=r"sources.tar.gz is not the pinned sources.tar.gz: its SHA-256"):
        sources.unpack(file, Recorder())


OUTSIDE = packed({f"{TREE}/conversion/../../../out.py": b"out"})
NOTHING = packed({"llama_cpp_python-0/README.md": b"no"})


@pytest.mark.parametrize(
    ("content", "announced", "pinned", "message"),
    [
        (WHOLE, 0, WHOLE, "can't be downloaded from http://127.0.0.1:.*404"),
        (WHOLE[:-40], len(WHOLE), WHOLE, "can't be downloaded from .*peer closed connection"),
        (WHOLE[:-40], len(WHOLE) - 40, WHOLE, "is not the pinned sources.tar.gz: its SHA-256"),
        (WHOLE + b"0" * 9, len(WHOLE) + 9, WHOLE, "is not the pinned sources.tar.gz: its SHA-256"),
        (OUTSIDE, len(OUTSIDE), OUTSIDE, "can't be unpacked in .* outside the destination"),
        (NOTHING, len(NOTHING), NOTHING, "can't be unpacked in .* holds no vendor/llama.cpp"),
    ],
    ids=["absent", "cut off", "too short", "too long", "outside", "of something else"],
)
def test_what_is_not_the_archive_is_an_error_and_leaves_nothing(
    server: Server, tmp_path: Path, content: bytes, announced: int, pinned: bytes, message: str
) -> None:
    server.content, server.announced = content, announced
    sources = archive(server, pinned)
    with pytest.raises(MissingDependencyError, match=message) as caught:
        sources.unpack(None, Recorder())
    assert f"Download {sources.url} elsewhere" in str(caught.value.hint)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_server_that_is_not_there_is_an_error(server: Server) -> None:
    nowhere = replace(archive(server), url="http://127.0.0.1:9/sources.tar.gz")
    with pytest.raises(MissingDependencyError, match=r"can't be downloaded from http://127.0.0.1:9/sources.tar.gz"):
        nowhere.unpack(None, Recorder())
