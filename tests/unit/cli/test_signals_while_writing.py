"""A signal may come at any time: also while the line of an event is being written to stderr."""

import io
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from qlora_cli.cli.progress.plain_lines import PlainReporter
from qlora_cli.cli.robust_stream import RobustStream
from qlora_cli.events import Event, Noted, Reporters
from qlora_cli.training.callbacks.stop import StopSignal


class InterruptedFile(io.RawIOBase):
    """A file at whose first write a signal comes."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._num_writes = 0

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def write(self, data: Any) -> int:
        self._num_writes += 1
        if self._num_writes == 1:
            signal.raise_signal(signal.SIGHUP)
        return os.write(self._descriptor, data)


@pytest.fixture
def stream(tmp_path: Path) -> Iterator[io.TextIOWrapper]:
    """A stream as Python opens stderr."""
    with io.TextIOWrapper(io.BufferedWriter(InterruptedFile(tmp_path / "log")), "utf-8", line_buffering=True) as file:
        yield file


def test_a_signal_while_a_line_is_written_is_reported_after_it(stream: io.TextIOWrapper, tmp_path: Path) -> None:
    reporters = Reporters([PlainReporter(stream)])
    with StopSignal(reporters) as stop:
        stop.has_begun = True
        reporters.report(Noted(message="the first line"))
        reporters.report(Noted(message="the last line"))
    assert stop.name == "SIGHUP"
    first, of_signal, last = (tmp_path / "log").read_text(encoding="utf-8").splitlines()
    assert (first, last) == ("the first line", "the last line")
    assert of_signal.startswith("warning: SIGHUP: training stops after the step in progress")


def test_a_handler_may_write_to_the_stream_that_is_written(stream: io.TextIOWrapper, tmp_path: Path) -> None:
    robust = RobustStream(stream)

    def write(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        print("of the handler", file=robust, flush=True)

    before = signal.signal(signal.SIGHUP, write)
    try:
        print("the first line", file=robust, flush=True)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert sorted((tmp_path / "log").read_text(encoding="utf-8").splitlines()) == ["of the handler", "the first line"]


def test_events_reported_within_a_report_follow_it() -> None:
    received: list[tuple[str, str]] = []

    class Member:
        def __init__(self, name: str) -> None:
            self._name = name

        def report(self, event: Event) -> None:
            assert isinstance(event, Noted)
            received.append((self._name, event.message))
            if (self._name, event.message) == ("a", "1"):
                reporters.report(Noted(message="2"))
            if (self._name, event.message) == ("b", "2"):
                raise OSError("no space")

    reporters = Reporters([Member("a"), Member("b")])
    with pytest.raises(OSError, match="no space"):
        reporters.report(Noted(message="1"))
    assert received == [("a", "1"), ("b", "1"), ("a", "2"), ("b", "2")]
    reporters.report(Noted(message="3"))
    assert received[4:] == [("a", "3"), ("b", "3")]
