"""The page of a run is redrawn during training, but must not slow it down."""

from pathlib import Path

import pytest

from qlora_cli.events import CheckpointSaved, Noted
from qlora_cli.training.callbacks import reporting
from qlora_cli.training.callbacks.reporting import ReportWriter
from tests.conftest import Recorder


class Clock:
    """A clock that the test sets."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


SAVED = CheckpointSaved(step=1, path=Path("step-1"))


def test_a_page_that_is_slow_to_draw_is_drawn_rarely(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    drawn: list[float] = []

    def draw(directory: Path) -> None:
        assert directory == tmp_path
        drawn.append(clock.now)
        clock.now += 2

    monkeypatch.setattr(reporting, "write_report", draw)
    monkeypatch.setattr(reporting, "time", clock)
    writer = ReportWriter(tmp_path, Recorder())
    for now in (0, 29, 31, 35, 232, 234, 250):
        clock.now = now
        writer.report(SAVED)
    assert drawn == [31, 234]  # not in the first 30 s; the first took until 33, and the next may come 200 s later


def test_an_unwritable_page_is_reported_without_stopping_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(directory: Path) -> None:
        raise OSError(28, "No space left on device", str(directory))

    monkeypatch.setattr(reporting, "write_report", full)
    monkeypatch.setattr(reporting, "SECONDS_BEFORE_PAGES", 0.0)
    recorder = Recorder()
    ReportWriter(tmp_path, recorder).report(SAVED)
    (note,) = [event for event in recorder.events if isinstance(event, Noted)]
    assert (note.level, note.message) == ("warning", "report.html can't be written: No space left on device")
