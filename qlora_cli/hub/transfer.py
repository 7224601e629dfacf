"""Bring files of the hub into its cache, by plain HTTP: several at once, resumed where they stopped, verified.

huggingface_hub downloads each file to a name of its own and deletes it when the transfer ends early, so a
shard that was interrupted starts over. Here the partial file keeps one name, in the cache's own `blobs` folder;
once whole it gets the name that the client looks for, and the client goes on from there.
"""

import hashlib
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from qlora_cli.events import BytesDone, Event, Noted, Reporter
from qlora_cli.units import format_bytes
from qlora_cli.writing import append_bytes, not_in_place

NUM_STREAMS = 4
POLL_SECONDS = 0.1
HASH_BLOCK_BYTES = 1024**2
PASSING_STATUS = {408, 429, 500, 502, 503, 504}


@dataclass(frozen=True, kw_only=True)
class Retry:
    """How often what fails for a passing reason is tried again: once after each of the waits."""

    waits_seconds: tuple[float, ...] = (1, 2, 4, 8)


@dataclass(frozen=True, kw_only=True)
class RemoteFile:
    """A file of a repository, as the hub described it. `etag` is its SHA-256 if it is a large one."""

    name: str
    url: str
    etag: str
    num_bytes: int | None
    blobs: Path
    lock: Path

    @property
    def blob(self) -> Path:
        """The whole file, by the name that huggingface_hub gives it."""
        return self.blobs / self.etag

    @property
    def partial(self) -> Path:
        """What has arrived of it so far."""
        return self.blobs / f"{self.etag}.incomplete"

    @property
    def present_bytes(self) -> int:
        """How much of it is on this disk."""
        if self.blob.is_file():
            return self.blob.stat().st_size
        return self.partial.stat().st_size if self.is_begun else 0

    @property
    def is_begun(self) -> bool:
        """Whether the partial file is there, and is no link or anything else that leads elsewhere."""
        try:
            return not_in_place(self.partial, of_anyone=True) is None
        except FileNotFoundError:
            return False


class DamagedTransferError(Exception):
    """What arrived is not what the hub announced."""


def http_error_type() -> type[Exception]:
    """Return the root of the HTTP client's errors: of httpx or httpx2, whichever huggingface_hub is built on."""
    from huggingface_hub.errors import HfHubHTTPError

    return HfHubHTTPError.__bases__[0]


def is_passing_status(error: Exception) -> bool:
    """Whether the server answered that it is busy or broken, which may be over in a moment."""
    from huggingface_hub.errors import HfHubHTTPError

    return isinstance(error, HfHubHTTPError) and error.response.status_code in PASSING_STATUS


def is_lost_connection(error: Exception) -> bool:
    """Whether there was no answer at all: no network, a timeout, a connection that broke."""
    from huggingface_hub.errors import HfHubHTTPError

    return isinstance(error, http_error_type()) and not isinstance(error, HfHubHTTPError)


def describe_failure(error: Exception) -> str:
    """Return a failed request in a few words, without its URL."""
    if is_passing_status(error):
        response: Any = getattr(error, "response")  # noqa: B009 - is_passing_status has seen to it
        return f"the hub answers {response.status_code} {response.reason_phrase}".rstrip()
    words = str(error).splitlines()
    return f"{type(error).__name__}: {words[0]}" if words else type(error).__name__


def transfer(files: Sequence[RemoteFile], reporter: Reporter, retry: Retry) -> None:
    """Download what is missing of `files` and report the bytes; a second call goes on where this one stopped.

    Ctrl-C ends it at once, also while the hub sends nothing.

    Raises:
        Exception: of the HTTP client or the disk, once the retries are used up.
    """
    if missing := [file for file in files if not file.blob.exists()]:
        _Transfer(missing, retry).run(reporter)


class _Transfer:
    """Daemon threads that fetch one file each, watched by the thread that reports."""

    def __init__(self, files: Sequence[RemoteFile], retry: Retry) -> None:
        self._files = files
        self._retry = retry
        self._waiting: SimpleQueue[RemoteFile] = SimpleQueue()
        self._messages: SimpleQueue[Event | BaseException | RemoteFile] = SimpleQueue()
        self._stop = threading.Event()
        self._done_bytes = {file.name: file.present_bytes for file in files}

    def run(self, reporter: Reporter) -> None:
        for file in self._files:
            self._waiting.put(file)
        for _ in range(min(NUM_STREAMS, len(self._files))):
            # Daemons: a thread that waits for a stalled hub must not keep an interrupted process alive.
            threading.Thread(target=self._work, daemon=True).start()
        try:
            self._watch(reporter)
        finally:
            self._stop.set()

    def _watch(self, reporter: Reporter) -> None:
        num_left = len(self._files)
        self._report_bytes(reporter)
        while num_left:
            try:
                message = self._messages.get(timeout=POLL_SECONDS)
            except Empty:
                self._report_bytes(reporter)
                continue
            if isinstance(message, BaseException):
                raise message
            if isinstance(message, RemoteFile):
                num_left -= 1
            else:
                reporter.report(message)
        self._report_bytes(reporter, is_end=True)

    def _report_bytes(self, reporter: Reporter, *, is_end: bool = False) -> None:
        done = sum(self._done_bytes.values())
        total = max(done, sum(file.num_bytes or 0 for file in self._files))
        if is_end or done < total:  # all bytes may be there and not yet be verified
            reporter.report(BytesDone(kind="download", done_bytes=done, total_bytes=total))

    def _work(self) -> None:
        try:
            while not self._stop.is_set():
                file = self._waiting.get_nowait()
                self._fetch(file)
                self._messages.put(file)
        except Empty:
            return
        except BaseException as error:  # noqa: BLE001 - raised again by the thread that watches
            self._messages.put(error)

    def _fetch(self, file: RemoteFile) -> None:
        """Fetch one file; failures in a row are bounded, and a row ends when the file got longer than ever."""
        num_failures = 0
        furthest = file.present_bytes
        while not self._stop.is_set():
            try:
                self._fetch_once(file)
                return
            except Exception as error:
                if file.present_bytes > furthest:
                    furthest, num_failures = file.present_bytes, 0
                if num_failures == len(self._retry.waits_seconds) or not _may_pass(error):
                    raise
                wait = self._retry.waits_seconds[num_failures]
                num_failures += 1
                self._messages.put(note_retry(file.name, error, wait, file.present_bytes))
                self._stop.wait(wait)

    def _fetch_once(self, file: RemoteFile) -> None:
        from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined] # named lazily there

        file.blobs.mkdir(parents=True, exist_ok=True)
        file.lock.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(file.lock):  # the client's own: two processes don't write one file
            if not file.blob.exists():
                self._fill(file)
            self._done_bytes[file.name] = file.present_bytes

    def _fill(self, file: RemoteFile) -> None:
        digest = hashlib.sha256()
        if os.path.lexists(file.partial) and not file.is_begun:
            file.partial.unlink()  # the name alone
        if file.num_bytes is None or file.present_bytes > file.num_bytes:
            file.partial.unlink(missing_ok=True)  # can't be told apart from another version
        offset = file.present_bytes
        if offset:
            _hash_file(file.partial, digest)
        if offset != file.num_bytes:
            offset = self._stream(file, offset, digest)
        if self._stop.is_set():
            return
        if file.num_bytes is not None and offset != file.num_bytes:
            raise DamagedTransferError(f"{offset} of {file.num_bytes} bytes arrived")
        if len(file.etag) == 64 and digest.hexdigest() != file.etag:
            file.partial.unlink()
            raise DamagedTransferError("its SHA-256 is not the one that the hub announced; starting over")
        append_bytes(file.partial).close()  # an empty file is there too
        file.partial.replace(file.blob)

    def _stream(self, file: RemoteFile, offset: int, digest: Any) -> int:
        """Append what the hub sends from `offset` on; return how long the file is then."""
        with _open_response(file.url, offset) as response:
            if offset and not response.headers.get("Content-Range", "").startswith(f"bytes {offset}-"):
                file.partial.unlink()
                raise DamagedTransferError("the hub does not send the rest alone; starting over")
            # Unbuffered: whatever ends this process, the bytes that arrived are in the file.
            with append_bytes(file.partial) as stream:
                for chunk in response.iter_bytes():
                    stream.write(chunk)
                    digest.update(chunk)
                    offset += len(chunk)
                    self._done_bytes[file.name] = offset
                    if self._stop.is_set():
                        break
        return offset


def note_retry(what: str, error: Exception, wait_seconds: float, present_bytes: int = 0) -> Noted:
    """Return the event that says that a request failed and is made again."""
    kept = f", going on from {format_bytes(present_bytes)}" if present_bytes else ""
    return Noted(
        level="warning", message=f"{what}: {describe_failure(error)}; trying again in {wait_seconds:g} s{kept}"
    )


def _may_pass(error: Exception) -> bool:
    return isinstance(error, DamagedTransferError) or is_passing_status(error) or is_lost_connection(error)


def _hash_file(path: Path, digest: Any) -> None:
    with path.open("rb") as stream:
        while block := stream.read(HASH_BLOCK_BYTES):
            digest.update(block)


@contextmanager
def _open_response(url: str, offset: int) -> Iterator[Any]:
    from huggingface_hub import constants, get_session, hf_raise_for_status
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined] # named lazily there

    # Compressed, the bytes that arrive would not be those of the file.
    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
    if offset:
        headers["Range"] = f"bytes={offset}-"
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    with get_session().stream("GET", url, headers=headers, timeout=timeout) as response:
        hf_raise_for_status(response)
        yield response
