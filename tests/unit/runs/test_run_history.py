"""Reading `metrics.jsonl`: whole, truncated, damaged, resumed, and long."""

import json
import os
import time
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from datetime import timedelta
from pathlib import Path

import pytest

from qlora_cli.events import (
    CheckpointSaved,
    Event,
    Noted,
    PhaseStarted,
    Rehearsed,
    StepSkipped,
    TrainingEnded,
    TrainingResumed,
    TrainingStarted,
)
from qlora_cli.runs import history as history_module
from qlora_cli.runs.history import RunHistory, read_history
from qlora_cli.runs.metrics import EVENT_NAMES, GAPS
from qlora_cli.units import MIB
from tests.support.runs.run_directories import START, eval_done, lines_of, sample_done, step_done, write_run

NUM_EVENTS = 20_000
STARTED = TrainingStarted(num_steps=10, output=Path("run"))


def between(first: int, last: int, *, num_steps: int = 10, eval_every: int = 4) -> list[Event]:
    """Return the events of some steps, with evaluations, samples and checkpoints."""
    events: list[Event] = []
    for step in range(first, last + 1):
        events.append(step_done(step, num_steps))
        if step % eval_every == 0:
            events.append(eval_done(step, 3 - step / 10))
            events.append(sample_done(step))
            events.append(CheckpointSaved(step=step, path=Path(f"run/checkpoints/step-{step}")))
    return events


def resumed(step: int, num_steps: int = 10) -> TrainingResumed:
    return TrainingResumed(step=step, num_steps=num_steps, checkpoint=Path(f"run/checkpoints/step-{step}"))


def skipped_step(step: int) -> StepSkipped:
    return StepSkipped(step=step, reason="loss is nan", rows=())


def saved(step: int) -> CheckpointSaved:
    return CheckpointSaved(step=step, path=Path(f"run/checkpoints/step-{step}"))


def of_a_run(history: RunHistory) -> tuple[object, ...]:
    """Return everything that must not depend on whether a run was interrupted."""
    steps = [list(getattr(history.steps, name)) for name in ("step", "loss", "grad_norm", "host_bytes")]
    events = (history.evaluations, history.samples, history.skipped, history.checkpoints)
    return (steps, *events, history.num_steps, history.notes, history.last_step, history.best)


def read(folder: Path, events: Sequence[Event]) -> RunHistory:
    return read_history(write_run(folder, events))


def test_events_are_read_and_the_best_evaluation_is_known(tmp_path: Path) -> None:
    rehearsed = Rehearsed(
        micro_batch_size=4,
        longest_row_tokens=512,
        seconds=1.5,
        device_allocated_bytes=7,
        device_reserved_bytes=9,
    )
    skipped = StepSkipped(step=5, reason="the loss is nan", rows=("train.jsonl, row 3",))
    note = Noted(message="lowered", level="warning")
    events = [note, rehearsed, STARTED, sample_done(0), *between(1, 10), skipped, note]
    history = read(tmp_path, [*events, TrainingEnded(step=10, num_steps=10, interrupted_by=None)])
    assert list(history.steps.step) == list(range(1, 11))
    assert history.steps.loss[3] == step_done(4).loss
    assert history.steps.device_reserved_bytes[0] == step_done(1).memory.device_reserved_bytes
    assert history.device_total_bytes == step_done(1).memory.device_total_bytes
    assert [(done.step, done.is_best) for done in history.evaluations] == [(4, True), (8, True)]
    assert history.best == replace(eval_done(8, 2.2), is_best=True)
    assert [sample.answer for sample in history.samples] == ["answer 0", "answer 4", "answer 8"]
    assert history.rehearsal == rehearsed
    assert history.skipped == (skipped,)
    assert history.notes == (note,)
    assert history.end == TrainingEnded(step=10, num_steps=10, interrupted_by=None)
    assert (history.num_steps, history.last_step, history.num_damaged_lines) == (10, 10, 0)
    assert history.started == START


def test_a_worse_or_unmeasurable_evaluation_is_not_the_best(tmp_path: Path) -> None:
    losses = [2.0, float("nan"), 1.5, 1.8, float("inf")]
    history = read(tmp_path, [eval_done(step, loss) for step, loss in enumerate(losses, 1)])
    assert [done.is_best for done in history.evaluations] == [True, False, True, False, False]
    assert history.best is not None
    assert history.best.step == 3


@pytest.mark.parametrize("cut", [1, 10, 60, -1])
def test_a_truncated_last_line_is_ignored(tmp_path: Path, cut: int) -> None:
    write_run(tmp_path, [STARTED, *between(1, 5)])
    whole = read_history(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(lines_of([step_done(6, 10)])[0][:cut])
    history = read_history(tmp_path)
    assert of_a_run(history) == of_a_run(whole)
    assert history.num_damaged_lines == 0


def test_damaged_lines_in_the_middle_are_counted_and_the_rest_is_read(tmp_path: Path) -> None:
    damaged = [
        *('{"event": "step_done", "ti', "[1, 2]", "null", "no json", '{"event": "step_done"}', '{"no": "event"}'),
        *('{"event": "step_done", "step": "x"}', '{"event": "eval_done", "step": 1}', '{"event": ["step_done"]}'),
        *('{"event": "step_done", "step": 3, "memory": [1]}', '{"event": "step_done", "step": 1e999}', "[" * 100_000),
    ]
    lines = lines_of(between(1, 5))
    lines[2:2] = damaged
    content = "\n".join(lines).encode() + b"\n\xff\xfe\n\n" + lines_of([step_done(6, 10)])[0].encode() + b"\n"
    (tmp_path / "metrics.jsonl").write_bytes(content)
    history = read_history(tmp_path)
    assert list(history.steps.step) == [1, 2, 3, 4, 5, 6]
    assert len({len(getattr(history.steps, name)) for name in ("step", "loss", "host_bytes")}) == 1
    assert history.num_damaged_lines == len(damaged) + 1


@pytest.mark.parametrize("last", [4, 5, 6, 7, 8, 9, 10])
def test_a_resumed_run_reads_as_if_it_was_never_interrupted(tmp_path: Path, last: int) -> None:
    whole = [STARTED, sample_done(0), *between(1, 10)]
    checkpoint_step = last // 4 * 4
    stopped = TrainingEnded(step=last, num_steps=10, interrupted_by="SIGTERM")
    again = [STARTED, resumed(checkpoint_step), *between(checkpoint_step + 1, 10)]
    history = read(tmp_path / "resumed", [STARTED, sample_done(0), *between(1, last), stopped, *again])
    assert of_a_run(history) == of_a_run(read(tmp_path / "whole", whole))
    assert [event.step for event in history.resumes] == [checkpoint_step]
    assert history.stops == (stopped,)
    assert history.end is None


def test_the_evaluation_at_the_step_of_the_checkpoint_is_retained_or_repeated(tmp_path: Path) -> None:
    history = read(tmp_path, [STARTED, *between(1, 10), resumed(8), eval_done(8, 1.0), *between(9, 9)])
    assert [(done.step, done.loss) for done in history.evaluations] == [(4, 2.6), (8, 1.0)]
    assert history.steps.step[-1] == 9


def test_resuming_again_from_an_earlier_step_discards_the_first_resumption(tmp_path: Path) -> None:
    skipped = StepSkipped(step=7, reason="nan", rows=())
    events = [STARTED, *between(1, 9), resumed(8), *between(9, 10), skipped, resumed(4), *between(5, 6)]
    history = read(tmp_path, events)
    assert list(history.steps.step) == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in history.resumes] == [4]
    assert [saved.step for saved in history.checkpoints] == [4]
    assert history.skipped == ()


@pytest.mark.parametrize("again", [[STARTED], [STARTED, resumed(0)]])
def test_a_run_that_restarted_without_a_checkpoint_counts_once(tmp_path: Path, again: list[Event]) -> None:
    before: list[Event] = [STARTED, sample_done(0), *between(1, 3), eval_done(3, 0.1)]
    history = read(tmp_path / "restarted", [*before, *again, sample_done(0), *between(1, 10)])
    assert of_a_run(history) == of_a_run(read(tmp_path / "whole", [STARTED, sample_done(0), *between(1, 10)]))
    assert history.resumes == ()


def test_a_run_that_resumes_in_another_directory_starts_at_its_checkpoint(tmp_path: Path) -> None:
    history = read(tmp_path, [STARTED, resumed(6)])
    assert (history.last_step, len(history.steps)) == (6, 0)


def test_the_night_between_two_sessions_is_not_training_time(tmp_path: Path) -> None:
    write_run(tmp_path, [STARTED, *between(1, 10, eval_every=100)])
    next_day = START + timedelta(days=1)
    later = [PhaseStarted(title="Loading"), STARTED, resumed(5), *between(6, 8, eval_every=100)]
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.writelines(f"{line}\n" for line in lines_of(later, next_day))
    history = read_history(tmp_path)
    assert history.active_seconds == 10 + 3
    assert history.started == START
    assert history.last_event == next_day + timedelta(seconds=5)


def test_a_missing_or_empty_file_is_an_empty_history(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    for folder in (tmp_path, tmp_path / "none"):
        history = read_history(folder)
        assert (len(history.steps), history.last_step, history.best, history.started) == (0, 0, None, None)
        assert history.active_seconds == 0


def test_figures_that_are_missing_or_not_a_number_are_gaps(tmp_path: Path) -> None:
    line = json.loads(lines_of([step_done(1)])[0])
    line |= {"loss": None, "grad_norm": "big", "memory": None}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    steps = read_history(tmp_path).steps
    for values in (steps.loss, steps.grad_norm, steps.host_bytes):
        assert values[0] != values[0]
    assert steps.learning_rate[0] == step_done(1).learning_rate


def write_steps(folder: Path, num_steps: int) -> None:
    before, after = lines_of([step_done(7, num_steps)])[0].split('"step": 7,')
    with (folder / "metrics.jsonl").open("w") as file:
        file.writelines(f'{before}"step": {step},{after}\n' for step in range(1, num_steps + 1))


@pytest.mark.parametrize("key", ["num_tokens", "tokens_per_second", "loss"])
def test_a_figure_beyond_a_float_leaves_all_columns_equally_long(tmp_path: Path, key: str) -> None:
    lines = [*lines_of([step_done(1)]), json.dumps({**json.loads(lines_of([step_done(2)])[0]), key: 10**400})]
    write_run(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    steps = read_history(tmp_path).steps
    assert len({len(getattr(steps, column.name)) for column in fields(steps)}) == 1


def test_a_line_without_an_end_is_damage_and_takes_no_memory(tmp_path: Path) -> None:
    lines = lines_of([step_done(1), step_done(2)])
    (tmp_path / "metrics.jsonl").write_text(f"{lines[0]}\n")
    os.truncate(tmp_path / "metrics.jsonl", 40 * MIB)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(f"\n{lines[1]}\n")
    tracemalloc.start()
    history = read_history(tmp_path)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert list(history.steps.step) == [1, 2]
    assert history.num_damaged_lines == 1
    assert peak_bytes < 100 * MIB


def test_200_000_lines_are_read_in_linear_time(tmp_path: Path) -> None:
    seconds = []
    for number in (20_000, 200_000):
        write_steps(tmp_path, number)
        start = time.process_time()
        history = read_history(tmp_path)
        seconds.append(time.process_time() - start)
        assert len(history.steps) == history.last_step == number
    assert seconds[1] < 40 * seconds[0]  # 10 if it is linear, 100 if it is quadratic


@pytest.mark.parametrize("kind", [eval_done, sample_done, skipped_step, saved])
def test_many_events_and_one_step_repeated_as_often_are_read_in_linear_time(
    tmp_path: Path, kind: Callable[..., Event]
) -> None:
    """20,000 events of each kind, and then a step repeated as often that undoes none, one or all of them.

    Where it was measured, reading them took 0.4 s of the CPU; a scan of the events for each step took 6.
    """
    line = lines_of([step_done(1)])[0]
    events = lines_of([kind(step, **{"loss": 1.0} if kind is eval_done else {}) for step in range(NUM_EVENTS)])
    for after in (0, NUM_EVENTS - 1, NUM_EVENTS + 1000):
        again = json.dumps({**json.loads(line), "step": after + 1})
        folder = write_run(tmp_path)
        (folder / "metrics.jsonl").write_text("\n".join([*events, *[again] * NUM_EVENTS]))
        begin = time.process_time()
        history = read_history(folder)
        assert time.process_time() - begin < 3
        assert list(history.steps.step) == [after + 1]
        assert history.num_damaged_lines == 0


def test_events_beyond_the_limit_of_a_kind_are_counted_as_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(history_module, "MAX_EVENTS_OF_KIND", 3)
    ended = [TrainingEnded(step=5, num_steps=9, interrupted_by="SIGTERM")] * 5
    events = [make(step) for make in (sample_done, skipped_step, saved) for step in range(5)]
    evaluations = [eval_done(step, 1.0) for step in range(5)]
    history = read(tmp_path, [*events, *evaluations, *ended])
    assert {
        len(one) for one in (history.samples, history.skipped, history.checkpoints, history.evaluations, history.stops)
    } == {3}
    assert history.num_damaged_lines == 10


def test_a_step_takes_less_memory_than_its_line(tmp_path: Path) -> None:
    write_steps(tmp_path, 20_000)
    tracemalloc.start()
    read_history(tmp_path)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 20_000 * 150 < (tmp_path / "metrics.jsonl").stat().st_size


def test_gaps_are_declared_for_existing_fields_of_events() -> None:
    for kind, gaps in GAPS.items():
        assert gaps.keys() <= {field.name for field in fields(kind)}, kind
        assert kind in EVENT_NAMES
