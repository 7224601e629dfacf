"""Download files from the hub with huggingface_hub: in parallel, with progress in bytes, interruptible at any time.

The threads are our own because those of `snapshot_download` can't be abandoned: Ctrl-C, and the end of the process,
would wait for all downloads in progress, even while the hub sends nothing.
"""

import logging
import re
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Literal

import psutil

from qlora_cli.events import BytesDone, Event, Noted, Reporter
from qlora_cli.hub.http_failures import Retry, ask_again, is_lost_connection, is_passing_status

NUM_STREAMS = 4
POLL_SECONDS = 0.1
SILENT_SECONDS = 30  # after which a note says how to do without xet, which retries for minutes without a message
PARTIAL = ".incomplete"  # the suffix that huggingface_hub gives to partial files
WITHOUT_XET = "HF_HUB_DISABLE_XET=1 downloads files by plain HTTP"
ADDRESS = re.compile(r"https?://\S*[^\s:,.]")


@dataclass(frozen=True, kw_only=True)
class RemoteFile:
    """A file of a repository, as described by the hub; huggingface_hub moves it to `blob` when it is complete."""

    name: str
    num_bytes: int | None
    blob: Path

    @property
    def present_bytes(self) -> int:
        """The bytes of it on this disk: all or none."""
        return self.blob.stat().st_size if self.blob.is_file() else 0


@dataclass(frozen=True, kw_only=True)
class _Ended:
    """A file was downloaded, or its download failed."""

    error: BaseException | None


def download(repository: str, commit: str, files: Sequence[RemoteFile], reporter: Reporter, retry: Retry) -> None:
    """Download `files` into the cache and report the bytes.

    When one fails, no more are started, and downloads in progress are finished: they need not be sent again.

    Raises:
        Exception: of the HTTP client, of xet or of the disk, after the last retry.
    """
    if missing := [file for file in files if not file.blob.exists()]:
        _Download(repository, commit, missing, retry).run(reporter)


class _Download:
    """Runs a thread for each file in progress; the calling thread waits for them and reports."""

    def __init__(self, repository: str, commit: str, files: Sequence[RemoteFile], retry: Retry) -> None:
        self._repository = repository
        self._commit = commit
        self._files = files
        self._retry = retry
        self._counters: dict[str, list[Any]] = {}  # lists of ByteCounter, which is not imported here, by file
        self._messages: SimpleQueue[Event | _Ended] = SimpleQueue()
        self._arrived_bytes = 0
        self._last_arrival: float | None = time.monotonic()  # None once the silence since then was noted

    def run(self, reporter: Reporter) -> None:
        with _logged_to(self):
            try:
                self._watch(reporter)
            except BaseException:
                _delete_partial_files(self._files[0].blob.parent)
                raise

    def report(self, event: Event) -> None:
        """Pass an event from a download thread to the thread that reports."""
        self._messages.put(event)

    def _watch(self, reporter: Reporter) -> None:
        waiting = deque(self._files)
        num_running = 0
        error: BaseException | None = None
        self._report_bytes(reporter)
        while num_running or (waiting and error is None):
            while waiting and error is None and num_running < NUM_STREAMS:
                self._start(waiting.popleft())
                num_running += 1
            try:
                message = self._messages.get(timeout=POLL_SECONDS)
            except Empty:
                self._report_bytes(reporter)
                self._note_silence(reporter)
                continue
            if isinstance(message, _Ended):
                num_running -= 1
                error = error or message.error
            else:
                reporter.report(message)
        if error is not None:
            raise error
        self._report_bytes(reporter, is_end=True)

    def _start(self, file: RemoteFile) -> None:
        # A daemon: a thread that waits for a stalled hub must not keep an interrupted process alive. Its name is that
        # of the file, for messages that the client logs.
        threading.Thread(target=self._fetch, args=(file,), name=file.name, daemon=True).start()

    def _fetch(self, file: RemoteFile) -> None:
        try:
            ask_again(partial(self._fetch_once, file), file.name, self, self._retry, partial(self._may_pass, file))
        except BaseException as error:  # noqa: BLE001 - raised again by the thread that watches
            self._messages.put(_Ended(error=error))
        else:
            self._messages.put(_Ended(error=None))

    def _fetch_once(self, file: RemoteFile) -> None:
        from huggingface_hub import hf_hub_download

        from qlora_cli.hub.byte_counter import ByteCounter

        counters = self._counters[file.name] = []
        counter: Any = partial(ByteCounter, counters)
        hf_hub_download(self._repository, file.name, revision=self._commit, tqdm_class=counter)

    def _may_pass(self, file: RemoteFile, error: Exception) -> bool:
        """Return whether to retry a file; if no byte arrived, the client has tried to connect often enough."""
        has_arrived = any(counter.n for counter in self._counters[file.name])
        return is_passing_status(error) or (is_lost_connection(error) and has_arrived)

    def _report_bytes(self, reporter: Reporter, *, is_end: bool = False) -> None:
        done = sum(map(self._done_bytes, self._files))
        total = max(done, sum(file.num_bytes or 0 for file in self._files))
        if is_end or done < total:  # all bytes may have arrived before the files are moved
            reporter.report(BytesDone(kind="download", done_bytes=done, total_bytes=total))

    def _note_silence(self, reporter: Reporter) -> None:
        """Report once per stall that xet transfers nothing, and how to do without it."""
        now = time.monotonic()
        arrived_bytes = sum(map(self._done_bytes, self._files))
        if arrived_bytes != self._arrived_bytes:
            self._arrived_bytes, self._last_arrival = arrived_bytes, now
        elif self._last_arrival is not None and now - self._last_arrival >= SILENT_SECONDS and self._is_xet_used():
            self._last_arrival = None
            message = f"nothing has arrived for {SILENT_SECONDS:g} s; {WITHOUT_XET}"
            reporter.report(Noted(level="warning", message=message))

    def _is_xet_used(self) -> bool:
        """Return whether a file is transferred by xet, which counts received and written bytes."""
        return any(len(self._counters.get(file.name, ())) == 2 for file in self._files if not file.blob.exists())

    def _done_bytes(self, file: RemoteFile) -> int:
        """Return the bytes of a file that have arrived: with xet they are received long before they are written."""
        arrived = max((int(counter.n) for counter in self._counters.get(file.name, ())), default=0)
        return file.present_bytes or min(arrived, arrived if file.num_bytes is None else file.num_bytes)


def _delete_partial_files(blobs: Path) -> None:
    """Delete the partial files that threads of this process are writing, because nothing would ever resume them.

    Those of other processes are left alone, so the open files of this process decide, not names.
    """
    folder = blobs.resolve()
    for file in psutil.Process().open_files():
        if file.path.endswith(PARTIAL) and Path(file.path).parent == folder:
            with suppress(PermissionError):  # Windows does not delete an open file
                Path(file.path).unlink(missing_ok=True)


class _LogReporter(logging.Handler):
    """Reports what huggingface_hub logs while it downloads, such as a lost connection that is retried."""

    def __init__(self, reporter: Reporter) -> None:
        super().__init__()
        self._reporter = reporter

    def emit(self, record: logging.LogRecord) -> None:
        """Report a message on one line, with its file, and without addresses, which may be signed."""
        words = " ".join(ADDRESS.sub("the hub", record.getMessage()).split())
        level: Literal["info", "warning"] = "warning" if record.levelno >= logging.WARNING else "info"
        self._reporter.report(Noted(level=level, message=f"{record.threadName}: {words}"))


@contextmanager
def _logged_to(reporter: Reporter) -> Iterator[None]:
    """Pass what huggingface_hub logs to `reporter`, because on stderr it would tear the live display."""
    logger = logging.getLogger("huggingface_hub")
    before = logger.handlers[:]
    logger.handlers[:] = [_LogReporter(reporter)]
    try:
        yield
    finally:
        logger.handlers[:] = before
