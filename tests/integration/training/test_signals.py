"""Requests to a run by a signal or a file are fulfilled within one step, and nothing is lost."""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from qlora_cli.events import EvalStarted, Noted, Rehearsed, StepDone
from qlora_cli.ranks.group import ALONE, PeerLostError, ProcessGroup, failing_together
from qlora_cli.runs.checkpoints import damage_of
from qlora_cli.settings.models import TrainSettings
from qlora_cli.settings.resolve import Resolved
from qlora_cli.training.callbacks.stop import StopSignal
from qlora_cli.training.train_run import train
from tests.conftest import ASSETS, Recorder, train_settings
from tests.support.processes.training_process import INTERRUPTED, SignalAt, start_training

LONG: dict[str, object] = {
    "lora__dropout": 0.1,
    "data__eval_split": "3",
    "training__max_steps": 400,
    "training__micro_batch_size": 1,
    "training__schedule": "constant",
    "training__save_steps": 1000,
}
UNTIL_40 = {**LONG, "training__max_steps": 40}


@pytest.fixture(autouse=True)
def _heeding_hangups() -> Iterator[None]:
    """Heed hangups even if the tests run under `nohup`."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def events_of(run: Path) -> list[dict[str, Any]]:
    """Return the events written so far; the last line may be incomplete."""
    metrics = run / "metrics.jsonl"
    lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def steps_of(run: Path) -> list[int]:
    return [event["step"] for event in events_of(run) if event["event"] == "step_done"]


def wait_for(process: BaseProcess, condition: Callable[[], bool], seconds: float = 300) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert process.is_alive(), "the run ended"
        assert time.monotonic() < until, "nothing came"
        time.sleep(0.002)


def send(process: BaseProcess, number: int) -> None:
    assert process.pid is not None
    os.kill(process.pid, number)


@pytest.fixture(scope="module")
def uninterrupted(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The adapter of a run of `UNTIL_40`, on the rows that every test has in a file of its own."""
    place = tmp_path_factory.mktemp("uninterrupted")
    lines = (ASSETS / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:12]
    (place / "rows.jsonl").write_text("".join(lines), encoding="utf-8")
    train(train_settings(base_model, place / "rows.jsonl", place / "run", **UNTIL_40), Recorder())
    return (place / "run" / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_within_a_step_with_a_checkpoint_that_resumes_exactly(
    base_model: Path, rows: Path, tmp_path: Path, uninterrupted: bytes, number: int
) -> None:
    run, changed = tmp_path / "run", UNTIL_40
    process = start_training(train_settings(base_model, rows, run, **changed), tmp_path / "log")
    wait_for(process, lambda: len(steps_of(run)) >= 3)
    at = steps_of(run)[-1]
    send(process, number)
    process.join()
    assert process.exitcode == INTERRUPTED, (tmp_path / "log").read_text()
    last = steps_of(run)[-1]
    assert last - at <= 2  # the step in progress, and one that was done before the signal arrived
    record = json.loads((run / "run.json").read_text())
    assert (record["status"], record["result"]["interrupted_by"]) == ("interrupted", signal.Signals(number).name)
    assert [path.name for path in (run / "checkpoints").iterdir()] == [f"step-{last}"]
    assert (run / "adapter" / "adapter_model.safetensors").is_file()
    assert train(train_settings(base_model, rows, run, **changed), Recorder()).resumed_from_step == last
    assert (run / "adapter" / "adapter_model.safetensors").read_bytes() == uninterrupted


def test_a_second_signal_ends_it_at_once(base_model: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    # Steps that take long, of which the first is done: before that, one signal is enough.
    changed = {**LONG, "training__gradient_accumulation_steps": 50, "training__max_steps": 2}
    rows = tmp_path / "rows.jsonl"
    lines = (ASSETS / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:103]  # three are held out
    rows.write_text("".join(lines), encoding="utf-8")
    settings = train_settings(base_model, rows, run, **changed)
    process = start_training(settings, tmp_path / "log")
    wait_for(process, lambda: steps_of(run) == [1])
    send(process, signal.SIGINT)
    time.sleep(0.3)
    assert process.is_alive()
    start = time.monotonic()
    send(process, signal.SIGINT)
    process.join()
    assert process.exitcode == 128 + signal.SIGINT
    assert time.monotonic() - start < 10
    assert json.loads((run / "run.json").read_text())["status"] == "interrupted"


class SignalBeforeTheFirstStep(Recorder):
    """Sends this process a signal when the largest batches have been tried."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__()
        self._number = number

    def report(self, event: Any) -> None:
        super().report(event)
        if isinstance(event, Rehearsed):
            os.kill(os.getpid(), self._number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_before_the_first_step_ends_the_run_at_once(
    base_model: Path, rows: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """There is nothing to save yet, and a first step may take minutes: longer than a batch system waits."""
    settings = train_settings(base_model, rows, tmp_path / "run", **{**LONG, "training__max_steps": 3})
    recorder = SignalBeforeTheFirstStep(number)
    with pytest.raises(SystemExit) as ended:
        train(settings, recorder)
    assert ended.value.code == 128 + number
    assert not [event for event in recorder.events if isinstance(event, StepDone)]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "interrupted"
    # The same command then trains, from the start and in the end as if nothing had happened.
    result = train(settings, Recorder())
    assert (result.steps, result.resumed_from_step, result.interrupted_by) == (3, 0, None)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_before_the_first_step_is_reported(number: signal.Signals) -> None:
    recorder = Recorder()
    with StopSignal(recorder) as stop, pytest.raises(SystemExit) as ended:
        signal.raise_signal(number)
    assert ended.value.code == 128 + number
    assert stop.name is None
    (noted,) = recorder.events
    assert isinstance(noted, Noted)
    assert noted.message == f"{number.name}: ended before the first step"


def test_a_resumed_run_that_ends_before_its_first_step_resumes_again(
    base_model: Path, rows: Path, tmp_path: Path
) -> None:
    changed = {**LONG, "training__max_steps": 6}
    settings, whole = whole_and_stopped(base_model, rows, tmp_path, changed, SignalAt(StepDone, 2))
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    with pytest.raises(SystemExit):
        train(settings, SignalBeforeTheFirstStep(signal.SIGTERM))
    result = train(settings, Recorder())
    assert (f"step-{result.resumed_from_step}", result.interrupted_by) == (checkpoint.name, None)
    name = "adapter/adapter_model.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.parametrize("first", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT])
def test_a_hangup_after_a_stop_changes_nothing(first: signal.Signals) -> None:
    """When a terminal is closed, shell and kernel send a hangup each, at nearly the same time."""
    recorder = Recorder()
    before = signal.getsignal(signal.SIGHUP)
    with StopSignal(recorder) as stop:
        stop.has_begun = True
        signal.raise_signal(first)
        signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGHUP)
        assert stop.name == first.name
        (noted,) = recorder.events
        assert isinstance(noted, Noted)
        assert noted.message.endswith(f"{'SIGTERM' if first == signal.SIGHUP else 'again'} to leave at once")
        for number in (signal.SIGTERM, signal.SIGINT):  # these still end the process
            with pytest.raises(SystemExit) as ended:
                signal.raise_signal(number)
            assert ended.value.code == 128 + number
    assert signal.getsignal(signal.SIGHUP) is before


class OneOfTwo(ProcessGroup):
    """The first of two processes, whose other one has ended."""

    size = 2


@pytest.fixture
def termination() -> Iterator[None]:
    """Restore what SIGTERM does."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.usefixtures("termination")
@pytest.mark.parametrize(("group", "is_ignored"), [(OneOfTwo(), True), (ALONE, False)], ids=["two", "alone"])
def test_of_several_processes_one_that_fails_outlives_the_signal_of_the_launcher(
    group: ProcessGroup, *, is_ignored: bool
) -> None:
    """torch's launcher sends SIGTERM to those that are left, which then record why they end."""
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(PeerLostError), StopSignal(Recorder(), group):
        raise PeerLostError(RuntimeError("[pair.cc:547] Connection closed by peer [::1]:9. Check the logs of others."))
    assert signal.getsignal(signal.SIGTERM) is (signal.SIG_IGN if is_ignored else before)


@pytest.mark.usefixtures("termination")
def test_a_process_that_fails_outlives_the_signal_of_the_launcher_also_before_training() -> None:
    message = r"ended without a word; it may have been killed \(Connection closed by peer \[::1\]:9\)$"
    with pytest.raises(PeerLostError, match=message), failing_together(OneOfTwo()):
        raise PeerLostError(RuntimeError("[pair.cc:547] Connection closed by peer [::1]:9. Check the logs of others."))
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN


def test_two_hangups_end_the_run_with_a_checkpoint(base_model: Path, rows: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start_training(train_settings(base_model, rows, run, **LONG), tmp_path / "log")
    wait_for(process, lambda: len(steps_of(run)) >= 2)
    send(process, signal.SIGHUP)
    time.sleep(0.0002)
    send(process, signal.SIGHUP)
    process.join()
    assert process.exitcode == INTERRUPTED, (tmp_path / "log").read_text()
    record = json.loads((run / "run.json").read_text())
    assert (record["status"], record["result"]["interrupted_by"]) == ("interrupted", "SIGHUP")
    (checkpoint,) = record["result"]["checkpoints"]
    assert damage_of(run / checkpoint) is None


def whole_and_stopped(
    base_model: Path, rows: Path, tmp_path: Path, changed: dict[str, object], at: SignalAt
) -> tuple[Resolved[TrainSettings], Path]:
    train(train_settings(base_model, rows, tmp_path / "whole", **changed), Recorder())
    settings = train_settings(base_model, rows, tmp_path / "run", **changed)
    assert train(settings, at).interrupted_by == "SIGTERM"
    return settings, tmp_path / "whole"


def test_an_evaluation_skipped_by_a_signal_is_done_on_resume(base_model: Path, rows: Path, tmp_path: Path) -> None:
    changed = {**LONG, "training__max_steps": 6, "training__eval_steps": 2}
    settings, whole = whole_and_stopped(base_model, rows, tmp_path, changed, SignalAt(StepDone, 4))
    run = tmp_path / "run"
    assert [event["step"] for event in events_of(run) if event["event"] == "eval_done"] == [2]
    train(settings, Recorder())
    losses = [
        [(event["step"], event["loss"]) for event in events_of(directory) if event["event"] == "eval_done"]
        for directory in (run, whole)
    ]
    assert losses[0] == losses[1]
    assert [step for step, _ in losses[0]] == [2, 4, 6]
    name = "adapter/adapter_model.safetensors"
    assert (run / name).read_bytes() == (whole / name).read_bytes()


def test_a_signal_during_the_last_evaluation_ends_it_early(base_model: Path, rows: Path, tmp_path: Path) -> None:
    changed = {**LONG, "training__max_steps": 3}
    settings, whole = whole_and_stopped(base_model, rows, tmp_path, changed, SignalAt(EvalStarted, 3))
    assert not [event for event in events_of(tmp_path / "run") if event["event"] == "eval_done"]
    recorder = Recorder()
    result = train(settings, recorder)
    assert not [event for event in recorder.events if isinstance(event, StepDone)]  # all were done
    record = json.loads((whole / "run.json").read_text())
    assert result.eval_loss == record["result"]["eval_loss"]
    assert result.train_loss == record["result"]["train_loss"]


def test_a_file_requests_a_checkpoint_and_the_run_continues(base_model: Path, rows: Path, tmp_path: Path) -> None:
    class Asks(Recorder):
        def report(self, event: Any) -> None:
            super().report(event)
            if isinstance(event, StepDone) and event.step == 2:
                (tmp_path / "run" / "checkpoint-now").touch()

    changed = {**LONG, "training__max_steps": 5}
    result = train(train_settings(base_model, rows, tmp_path / "run", **changed), Asks())
    saved = [event["step"] for event in events_of(tmp_path / "run") if event["event"] == "checkpoint_saved"]
    assert saved == [3, 5]
    assert result.steps == 5
    assert not (tmp_path / "run" / "checkpoint-now").exists()
