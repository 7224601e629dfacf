"""A run of several processes is that of one: the same rows a step, losses, adapter and held-out loss, and one end.

The processes are forked, compute on the CPU and speak over gloo.
"""

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from qlora_cli.data.feeding import micro_batches
from qlora_cli.events import CheckpointSaved, Event, StepDone
from qlora_cli.ranks.group import ProcessGroup
from qlora_cli.runs.checkpoints import CHECKSUMS_FILE, seal
from qlora_cli.runs.directory import RunDirectory
from qlora_cli.training import run_plan, train_run
from qlora_cli.training.checks import input_checks
from qlora_cli.training.resuming.saved_state import PEERS, RNG_STATE
from qlora_cli.training.run_plan import PreparedRun, with_memory_of, with_micro_batch
from qlora_cli.training.train_run import train
from qlora_cli.training.trainer import QloraTrainer
from tests.conftest import Recorder, train_settings
from tests.integration.training.test_signals import steps_of, wait_for
from tests.support.processes.killed_runs import EXACT, assert_same, metrics_of
from tests.support.processes.rank_processes import (
    SECONDS,
    Ended,
    end_of_ranks,
    run_ranks,
    start_ranks,
    start_ranks_below,
    told_by,
)

pytestmark = pytest.mark.usefixtures("one_thread")

TWO: dict[str, object] = {"training__num_gpus": 2}
# Twelve rows, of which two are held out: the second step of an epoch has four.
UNEVEN: dict[str, object] = {
    "data__eval_split": "2",
    "training__micro_batch_size": 2,
    "training__gradient_accumulation_steps": 3,
    "training__max_steps": 5,
    "training__eval_steps": 2,
}


def adapter_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def dft_losses_of(run: Path) -> list[float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["dft_loss"] for line in lines if line.get("dft_loss") is not None]


def distance(run: Path, other: Path) -> float:
    """Return the norm of the difference of two adapters, relative to the second."""
    one, two = adapter_of(run), adapter_of(other)
    assert one.keys() == two.keys()
    squares = sum(float((one[name] - two[name]).square().sum()) for name in two)
    return float((squares / sum(float(value.square().sum()) for value in two.values())) ** 0.5)


def all_done(ended: Sequence[Ended], size: int) -> None:
    """Check that all processes of `size` trained to the end with the same figures."""
    assert [one.code for one in ended] == [0] * size, [one.told for one in ended]
    assert [one.told["size"] for one in ended] == [size] * size
    for key in ("steps", "losses", "eval_loss"):
        assert len({json.dumps(one.told[key]) for one in ended}) == 1


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"training__sampling": "group_by_length", "training__micro_batch_size": 3, "training__weight_decay": 0.1},
        {"training__micro_batch_tokens": 200, "training__loss": "dft"},
        {"data__packing": True, "data__max_length": 192, "training__gradient_accumulation_steps": 2},
        {"training__micro_batch_size": 1, "training__gradient_accumulation_steps": 3, "training__num_gpus": 3},
    ],
    ids=[
        "uneven rows",
        "rows grouped by length",
        "filled micro-batches with dft",
        "packed rows",
        "a process without rows",
    ],
)
def test_several_processes_train_the_adapter_of_one(
    base_model: Path, rows: Path, tmp_path: Path, changed: dict[str, object]
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    alone = {**UNEVEN, **changed, "training__num_gpus": 1}
    train(train_settings(base_model, rows, one, **alone), Recorder())
    settings = train_settings(base_model, rows, two, **{**UNEVEN, **TWO, **changed})
    all_done(run_ranks(settings, tmp_path / "ranks"), settings.settings.training.num_gpus)
    assert distance(two, one) < 1e-5
    steps, others = metrics_of(two), metrics_of(one)
    assert len(steps) == len(others) == 5 + 3
    for mine, its in zip(steps, others, strict=True):
        assert mine == pytest.approx(its, rel=1e-4)
    weighted, others_weighted = dft_losses_of(two), dft_losses_of(one)
    assert len(weighted) == (5 if "training__loss" in changed else 0)
    assert weighted == pytest.approx(others_weighted, rel=1e-4)
    assert json.loads((two / "run.json").read_text())["plan"]["num_devices"] == settings.settings.training.num_gpus


def without_sum(group: ProcessGroup) -> Recorder:
    setattr(group, "add", list)  # noqa: B010 - adds up nothing
    return Recorder()


def test_gradients_that_are_not_summed_would_give_another_adapter(
    base_model: Path, rows: Path, tmp_path: Path
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    train(train_settings(base_model, rows, one, **UNEVEN), Recorder())
    settings = train_settings(base_model, rows, two, **UNEVEN, **TWO)
    run_ranks(settings, tmp_path / "ranks", without_sum)
    assert distance(two, one) > 1e-2


class KillAt(Recorder):
    """Kills its process at once when the checkpoint of `step` is saved."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self._step = step

    def report(self, event: Event) -> None:
        super().report(event)
        if isinstance(event, CheckpointSaved) and event.step == self._step:
            os.kill(os.getpid(), signal.SIGKILL)


def first_dies_after_step_4(group: ProcessGroup) -> Recorder:
    return KillAt(4) if group.is_first else Recorder()


DROPPING = {**EXACT, "training__gradient_accumulation_steps": 4, "training__max_steps": 6, **TWO}


def test_two_processes_resume_exactly_with_dropout_and_noise(base_model: Path, rows: Path, tmp_path: Path) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    all_done(run_ranks(train_settings(base_model, rows, whole, **DROPPING), tmp_path / "whole-ranks"), 2)
    settings = train_settings(base_model, rows, run, **DROPPING)
    first, second = run_ranks(settings, tmp_path / "killed", first_dies_after_step_4)
    assert first.code == -signal.SIGKILL
    assert second.code == 1
    assert "another process of this run ended without a word" in second.told["message"]
    copy = shutil.copytree(run, tmp_path / "copy")
    forget_second_generator(run / "checkpoints" / "step-4")
    all_done(run_ranks(settings, tmp_path / "forgotten"), 2)
    assert json.loads((run / "run.json").read_text())["resumed"][-1]["step"] == 4
    assert distance(run, whole) > 1e-4
    shutil.rmtree(run)
    copy.rename(run)
    all_done(run_ranks(settings, tmp_path / "resumed"), 2)
    assert_same(run, whole)


def forget_second_generator(checkpoint: Path) -> None:
    """Make the second process of a run draw as the first one does, from a checkpoint on."""
    states = torch.load(checkpoint / RNG_STATE, weights_only=False)
    states[PEERS] = [{name: value for name, value in states.items() if name != PEERS}]
    torch.save(states, checkpoint / RNG_STATE)
    (checkpoint / CHECKSUMS_FILE).unlink()
    seal(checkpoint)


def test_several_processes_stop_early_at_the_step_of_one(base_model: Path, rows: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    # A rate that makes it worse from the first evaluation on.
    stopping: dict[str, object] = {
        **UNEVEN,
        **{"training__eval_steps": 1, "training__max_steps": 12, "training__early_stopping_patience": 2},
        **{"training__learning_rate": 0.9, "training__schedule": "constant", "training__max_grad_norm": 100.0},
    }
    train(train_settings(base_model, rows, one, **stopping), Recorder())
    all_done(run_ranks(train_settings(base_model, rows, two, **stopping, **TWO), tmp_path / "ranks"), 2)
    steps = [json.loads((run / "run.json").read_text())["result"]["steps"] for run in (one, two)]
    assert steps[0] == steps[1] < 12


def test_a_run_of_two_processes_resumes_in_one_and_back(base_model: Path, rows: Path, tmp_path: Path) -> None:
    one, run = tmp_path / "one", tmp_path / "run"
    changed = {**UNEVEN, "training__save_steps": 1}
    train(train_settings(base_model, rows, one, **changed), Recorder())
    settings = train_settings(base_model, rows, run, **changed, **TWO)
    run_ranks(settings, tmp_path / "killed", first_dies_after_step_2)
    alone = train_settings(base_model, rows, run, **changed)
    with pytest.raises(KeyboardInterrupt):
        train(alone, InterruptAt(4))
    ended = run_ranks(settings, tmp_path / "resumed")
    all_done(ended, 2)
    assert distance(run, one) < 1e-5


def first_dies_after_step_2(group: ProcessGroup) -> Recorder:
    return KillAt(2) if group.is_first else Recorder()


class InterruptAt(Recorder):
    """Leaves the run when the checkpoint of `step` is saved, as a second Ctrl-C does."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self._step = step

    def report(self, event: Event) -> None:
        if isinstance(event, CheckpointSaved) and event.step == self._step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_process_ends_all_with_one_checkpoint(
    base_model: Path, rows: Path, tmp_path: Path, rank: int
) -> None:
    run, folder = tmp_path / "run", tmp_path / "ranks"
    processes = start_ranks(train_settings(base_model, rows, run, **LONG, **TWO), folder)
    wait_for(processes[0], lambda: len(steps_of(run)) >= 3)
    os.kill(processes[rank].pid or 0, signal.SIGTERM)
    ended = end_of_ranks(processes, folder)
    assert [one.code for one in ended] == [128 + signal.SIGTERM] * 2
    step = ended[0].told["steps"]
    assert 3 <= step < 200
    assert ended[1].told["steps"] == step
    assert [path.name for path in (run / "checkpoints").iterdir()] == [f"step-{step}"]
    assert json.loads((run / "run.json").read_text())["status"] == "interrupted"


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE  # which stays where nothing waits for orphans
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_processes_whose_launcher_is_killed_end_with_one_checkpoint(
    base_model: Path, rows: Path, tmp_path: Path, strategy: str
) -> None:
    run, folder = tmp_path / "run", tmp_path / "ranks"
    changed = {**LONG, **TWO, "training__strategy": strategy}
    launcher, pids = start_ranks_below(train_settings(base_model, rows, run, **changed), folder)
    wait_for(launcher, lambda: len(steps_of(run)) >= 2)
    launcher.kill()
    launcher.join()
    until = time.monotonic() + SECONDS
    while any(map(is_running, pids)):
        assert time.monotonic() < until, [told_by(folder, rank) for rank in range(2)]
        time.sleep(0.02)
    ended = [told_by(folder, rank) for rank in range(2)]
    assert [one["interrupted_by"] for one in ended] == ["SIGTERM"] * 2, ended
    assert ended[0]["steps"] == ended[1]["steps"] < 200
    assert [path.name for path in (run / "checkpoints").iterdir()] == [f"step-{ended[0]['steps']}"]
    assert json.loads((run / "run.json").read_text())["status"] == "interrupted"


LONG: dict[str, object] = {
    "data__eval_split": "2",
    "training__micro_batch_size": 1,
    "training__gradient_accumulation_steps": 4,
    "training__max_steps": 200,
    "training__save_steps": 1000,
    "training__schedule": "constant",
}


class AskAt(Recorder):
    """Asks the run for a checkpoint when `step` is reported."""

    def __init__(self, request: Path, step: int) -> None:
        super().__init__()
        self._request, self._step = request, step

    def report(self, event: Event) -> None:
        super().report(event)
        if isinstance(event, StepDone) and event.step == self._step:
            self._request.touch()


@dataclass(frozen=True)
class AskingAt:
    """Makes the reporter of the first of three processes ask for a checkpoint."""

    request: Path
    step: int

    def __call__(self, group: ProcessGroup) -> Recorder:
        return AskAt(self.request, self.step) if group.is_first else Recorder()


def test_three_processes_save_a_checkpoint_when_asked_and_resume(base_model: Path, rows: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    changed = {**LONG, "data__eval_split": None, "training__num_gpus": 3, "training__max_steps": 6}
    settings = train_settings(base_model, rows, run, **changed)
    asking = AskingAt(RunDirectory(run).request_file, 2)
    all_done(run_ranks(settings, tmp_path / "ranks", asking), 3)
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"step-3", "step-6"}
    assert not asking.request.exists()
    longer = train_settings(base_model, rows, run, **{**changed, "training__max_steps": 8})
    all_done(run_ranks(longer, tmp_path / "more"), 3)


def second_fails_in_step_3(group: ProcessGroup) -> Recorder:
    if group.rank == 1:
        original = QloraTrainer.compute_loss

        def fail(self: QloraTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
            if self.state.global_step == 2 and self.phase != "preparation":
                raise RuntimeError("the card fell off the bus")
            return original(self, *args, **kwargs)

        QloraTrainer.compute_loss = fail  # type: ignore[method-assign]
    return Recorder()


def test_the_failure_of_one_process_ends_all_and_is_named(base_model: Path, rows: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = train_settings(base_model, rows, run, **UNEVEN, **TWO)
    first, second = run_ranks(settings, tmp_path / "ranks", second_fails_in_step_3)
    assert first.code == 1
    assert first.told["error"] == "PeerError"
    assert "process 1 on " in first.told["message"]
    assert "RuntimeError: the card fell off the bus" in first.told["message"]
    assert "until step 2 is saved" in first.told["hint"]
    assert second.code not in (0, None)
    record = json.loads((run / "run.json").read_text())
    assert record["status"] == "failed"
    assert "the card fell off the bus" in record["error"]
    assert (run / "checkpoints" / "step-2").is_dir()


def second_has_no_finite_loss(group: ProcessGroup) -> Recorder:
    if group.rank == 1:
        original = QloraTrainer.compute_loss

        def spoil(self: QloraTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
            loss = original(self, *args, **kwargs)
            return loss * float("nan") if self.state.global_step == 2 and self.model.training else loss

        QloraTrainer.compute_loss = spoil  # type: ignore[method-assign]
    return Recorder()


@pytest.mark.parametrize("on_nan", ["stop", "skip"])
def test_a_loss_that_is_not_finite_in_one_process_is_one_of_the_step(
    base_model: Path, rows: Path, tmp_path: Path, on_nan: str
) -> None:
    run = tmp_path / "run"
    changed = {**UNEVEN, **TWO, "training__on_nan": on_nan}
    ended = run_ranks(train_settings(base_model, rows, run, **changed), tmp_path / "ranks", second_has_no_finite_loss)
    if on_nan == "skip":
        all_done(ended, 2)
        assert all(bool(value.isfinite().all()) for value in adapter_of(run).values())
        assert json.loads((run / "run.json").read_text())["result"]["num_skipped_steps"] == 1
        return
    assert [one.code for one in ended] == [1, 1]
    assert ended[0].told["message"].startswith("step 3: the loss is nan; nothing was updated. The rows: ")
    named = ended[0].told["message"].partition("The rows: ")[2]
    assert named.count(", row ") == UNEVEN["training__micro_batch_size"]  # those of one micro-batch of the second


def second_divides_otherwise(group: ProcessGroup) -> Recorder:
    if group.rank == 1:

        def lowered(*args: Any) -> PreparedRun:
            return with_micro_batch(with_memory_of(*args), 1)

        setattr(train_run, "with_memory_of", lowered)  # noqa: B010 - in a process of its own
    return Recorder()


def test_processes_that_would_divide_a_step_otherwise_do_not_train(
    base_model: Path, rows: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    ended = run_ranks(
        train_settings(base_model, rows, run, **UNEVEN, **TWO), tmp_path / "ranks", second_divides_otherwise
    )
    assert [one.code for one in ended] == [1, 1]
    assert ended[0].told["message"] == "process 1 and process 0 differ in their micro-batches"
    assert not run.exists()


def second_does_not_fit(group: ProcessGroup) -> Recorder:
    if group.rank == 1:
        original = QloraTrainer.try_out

        def exhaust(self: QloraTrainer, micro_batches: Any) -> None:
            if micro_batches[0]["input_ids"].shape[0] > 1:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            original(self, micro_batches)

        QloraTrainer.try_out = exhaust  # type: ignore[method-assign]
    return Recorder()


def test_a_micro_batch_that_does_not_fit_one_process_is_lowered_in_all(
    base_model: Path, rows: Path, tmp_path: Path
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    train(train_settings(base_model, rows, one, **UNEVEN), Recorder())
    lowering = {**UNEVEN, **TWO, "training__auto_micro_batch": True}
    all_done(run_ranks(train_settings(base_model, rows, two, **lowering), tmp_path / "ranks", second_does_not_fit), 2)
    assert json.loads((two / "run.json").read_text())["settings"]["training"]["micro_batch_size"] == 1
    assert distance(two, one) < 1e-5
    fixed = train_settings(base_model, rows, tmp_path / "fixed", **UNEVEN, **TWO)
    first, second = run_ranks(fixed, tmp_path / "fixed-ranks", second_does_not_fit)
    assert [first.code, second.code] == [3, 3]
    assert "process 1 on " in first.told["message"]
    assert "out of memory" in first.told["message"].lower()


@dataclass(frozen=True)
class Noting:
    """Notes in each process which files it changes in a run's directory, and whether it pushes."""

    run: Path
    folder: Path

    def __call__(self, group: ProcessGroup) -> Recorder:
        notes = (self.folder / f"changes-{group.rank}").open("w", encoding="utf-8", buffering=1)

        def note(event: str, arguments: tuple[Any, ...]) -> None:
            reads = event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR)
            if event in CHANGES and not reads and str(arguments[0]).startswith(f"{self.run}/"):
                notes.write(f"{arguments[0]}\n")

        sys.addaudithook(note)
        for module, check in ((input_checks, "push_problem"), (run_plan, "check_push")):
            setattr(module, check, lambda *_: None)  # in a process of its own; there is no hub
        setattr(train_run, "push_adapter", lambda *_: notes.write("pushed\n") and "https://hub/me/adapter")  # noqa: B010
        return Recorder()

    def changes(self, rank: int) -> str:
        return (self.folder / f"changes-{rank}").read_text(encoding="utf-8")


CHANGES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate"}


# Who holds a part of the base answers with the others; what it says goes nowhere.
@pytest.mark.parametrize(("strategy", "num_answers"), [("ddp", [4, 0]), ("fsdp", [4, 4])])
def test_the_first_process_alone_locks_writes_draws_answers_and_pushes(
    base_model: Path, rows: Path, tmp_path: Path, strategy: str, num_answers: list[int]
) -> None:
    run, noting = tmp_path / "run", Noting(tmp_path / "run", tmp_path / "ranks")
    changed = {**UNEVEN, **TWO, "training__strategy": strategy, "training__sample_prompts": ["What is a list?"]}
    changed |= {"training__save_steps": 2, "training__sample_tokens": 3, "output__push_to_hub": "me/adapter"}
    ended = run_ranks(train_settings(base_model, rows, run, **changed), tmp_path / "ranks", noting)
    all_done(ended, 2)
    assert [one.told["num_samples"] for one in ended] == num_answers
    changes = noting.changes(0)
    for name in ("run.lock", "run.json", "metrics.jsonl", "report.html", "checkpoints", "adapter"):
        assert f"{run}/{name}" in changes or f"{run}/.{name}." in changes, name
    assert changes.count("pushed\n") == 1
    assert set(noting.changes(1).splitlines()) <= {f"{run}/checkpoints"}  # which the trainer of each makes, empty
    assert json.loads((run / "run.json").read_text())["result"]["pushed_to"] == "https://hub/me/adapter"


def test_processes_drop_out_other_values(base_model: Path, rows: Path, tmp_path: Path) -> None:
    settings = train_settings(base_model, rows, tmp_path / "run", **{**DROPPING, "training__max_steps": 2})
    all_done(run_ranks(settings, tmp_path / "ranks"), 2)
    states = torch.load(tmp_path / "run" / "checkpoints" / "step-2" / "rng_state.pth", weights_only=False)
    assert len(states["peers"]) == 1
    assert not torch.equal(states["cpu"], states["peers"][0]["cpu"])


def test_what_balances_a_step_leaves_no_row_out() -> None:
    assert micro_batches.balance(torch.tensor([5, 3, 3, 2]).numpy(), 2) == [[0, 3], [1, 2]]
