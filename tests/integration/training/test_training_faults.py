"""Faults of a run are reported, change nothing silently, and lose nothing that was trained."""

import json
import math
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_cli.adapters.state import adapter_state
from qlora_cli.errors import OutOfMemoryError, TrainingError
from qlora_cli.events import CheckpointSaved, Event, Noted, Rehearsed, StepDone, StepSkipped
from qlora_cli.hardware.counters import is_out_of_memory
from qlora_cli.loading.load_plan import plan_load
from qlora_cli.memory.gpus import find_gpu
from qlora_cli.runs.checkpoints import CheckpointStore
from qlora_cli.training.checks.adapter_check import check_saved, check_trained
from qlora_cli.training.checks.predicted_memory import check_memory
from qlora_cli.training.rehearsal import RehearsalCallback
from qlora_cli.training.run_plan import PreparedRun, prepare_run
from qlora_cli.training.train_run import run, train
from qlora_cli.units import format_bytes
from tests.conftest import Recorder, short_settings, train_settings, write_jsonl
from tests.support.models.shallow_model import NUM_LAYERS


def messages(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


@pytest.fixture
def bad_row(rows: Path, tmp_path: Path) -> Path:
    """Rows of which a hook can recognize the fourth by its length."""
    lines = rows.read_text(encoding="utf-8").splitlines()
    path = tmp_path / "with-bad.jsonl"
    path.write_text("\n".join([*lines[:3], json.dumps(messages("What?", "bad " * 80)), *lines[3:]]) + "\n")
    return path


def break_long_rows(prepared: PreparedRun, value: float = math.nan, longest: int = 150) -> None:
    """Make the embedding of a micro-batch with long rows such that the loss is not finite."""

    def spoil(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        return output * value if inputs[0].shape[1] > longest else output

    prepared.model.get_input_embeddings().register_forward_hook(spoil)


def skip_rehearsal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the rehearsal, for faults that are to occur later."""
    monkeypatch.setattr(RehearsalCallback, "on_train_begin", lambda *_, **__: None)


# In the order of the file, so that the fourth row is in step 2.
ORDERED: dict[str, object] = {
    "training__sampling": "sequential",
    "training__micro_batch_size": 1,
    "training__gradient_accumulation_steps": 2,
    "training__max_steps": 6,
}


def test_a_loss_that_is_not_finite_stops_before_the_update_and_names_the_row(
    base_model: Path, bad_row: Path, tmp_path: Path
) -> None:
    prepared = prepare_run(short_settings(base_model, bad_row, tmp_path / "run", **ORDERED), Recorder())
    break_long_rows(prepared)
    with pytest.raises(TrainingError) as caught:
        run(prepared, Recorder())
    assert "step 2: the loss is nan; nothing was updated" in str(caught.value)
    assert f"{bad_row}, row 4" in str(caught.value)
    assert "row 3" not in str(caught.value)  # row 3 is in the same step, but in another micro-batch
    assert "--on-nan skip" in str(caught.value.hint)
    # The last good state is kept: that after step 1, from which it resumes.
    assert "until step 1" in str(caught.value.hint)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-1"]
    assert all(bool(tensor.isfinite().all()) for tensor in adapter_state(prepared.model).values())
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"


def test_the_state_that_is_kept_resumes_exactly(base_model: Path, bad_row: Path, tmp_path: Path) -> None:
    changed = {**ORDERED, "lora__dropout": 0.1, "training__on_nan": "skip"}
    whole = prepare_run(short_settings(base_model, bad_row, tmp_path / "whole", **changed), Recorder())
    break_long_rows(whole)
    run(whole, Recorder())
    stopping = {**changed, "training__on_nan": "stop"}
    failed = prepare_run(short_settings(base_model, bad_row, tmp_path / "run", **stopping), Recorder())
    break_long_rows(failed)
    with pytest.raises(TrainingError):
        run(failed, Recorder())
    again = prepare_run(short_settings(base_model, bad_row, tmp_path / "run", **changed), Recorder())
    assert again.resume is not None
    assert again.resume.step == 1
    break_long_rows(again)
    run(again, Recorder())
    name = "adapter/adapter_model.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_step_is_skipped_as_a_whole_and_reported(base_model: Path, bad_row: Path, tmp_path: Path) -> None:
    recorder = Recorder()
    changed = {**ORDERED, "training__on_nan": "skip"}
    prepared = prepare_run(short_settings(base_model, bad_row, tmp_path / "run", **changed), recorder)
    break_long_rows(prepared)
    states: list[tuple[int, dict[str, torch.Tensor]]] = []

    class Watcher(Recorder):
        def report(self, event: Event) -> None:
            super().report(event)
            if isinstance(event, StepDone | StepSkipped):
                states.append((event.step, {name: t.clone() for name, t in adapter_state(prepared.model).items()}))

    watcher = Watcher()
    result = run(prepared, watcher)
    (skipped,) = [event for event in watcher.events if isinstance(event, StepSkipped)]
    assert (skipped.step, skipped.reason, skipped.rows) == (2, "the loss is nan", (f"{bad_row}, row 4",))
    done = [event for event in watcher.events if isinstance(event, StepDone)]
    assert [event.step for event in done] == [1, 3, 4, 5, 6]
    assert all(math.isfinite(event.loss) for event in done)
    assert (result.steps, result.num_skipped_steps) == (6, 1)
    assert result.train_loss == pytest.approx(sum(event.loss for event in done) / 5)
    before, at_skip = dict(states)[1], dict(states)[2]
    assert all(torch.equal(before[name], at_skip[name]) for name in before)


def test_a_gradient_that_is_not_finite_is_found_too(base_model: Path, rows: Path, tmp_path: Path) -> None:
    prepared = prepare_run(short_settings(base_model, rows, tmp_path / "run", **ORDERED), Recorder())
    parameter = next(p for name, p in prepared.model.named_parameters() if "lora_B" in name)
    passes = iter(range(100))
    # The first two passes are before the first step; the fifth is in step 2.
    parameter.register_hook(lambda gradient: gradient * math.inf if next(passes) == 4 else gradient)
    with pytest.raises(TrainingError, match=r"step 2: the gradient norm is (inf|nan)") as caught:
        run(prepared, Recorder())
    assert "row 3" in str(caught.value)
    assert "row 4" in str(caught.value)


def test_skips_are_bounded(base_model: Path, rows: Path, tmp_path: Path) -> None:
    changed = {**ORDERED, "training__on_nan": "skip", "training__max_nan_skips": 2}
    prepared = prepare_run(short_settings(base_model, rows, tmp_path / "run", **changed), Recorder())
    break_long_rows(prepared, longest=0)
    with pytest.raises(TrainingError, match=r"step 3: .* as in 2 steps that were skipped before it"):
        run(prepared, Recorder())


def fail_above(prepared: PreparedRun, num_rows: int, *, after: int = 0) -> None:
    """Run out of memory, as a GPU would, for micro-batches of more than `num_rows` rows, after `after` good passes."""
    passes = iter(range(10_000))

    def check(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if next(passes) >= after and inputs[0].shape[0] > num_rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    prepared.model.get_input_embeddings().register_forward_pre_hook(check)


def test_a_micro_batch_that_does_not_fit_fails_before_the_first_step(
    base_model: Path, bad_row: Path, tmp_path: Path
) -> None:
    changed = {"training__micro_batch_size": 4, "training__sampling": "sequential"}
    prepared = prepare_run(short_settings(base_model, bad_row, tmp_path / "run", **changed), Recorder())
    fail_above(prepared, 2)
    recorder = Recorder()
    with pytest.raises(OutOfMemoryError) as caught:
        run(prepared, recorder)
    assert caught.value.exit_code == 3
    assert "in the forward pass, tried before the first step" in str(caught.value)
    assert "--micro-batch-size 1 --gradient-accumulation-steps 4" in str(caught.value.hint)
    assert not [event for event in recorder.events if isinstance(event, StepDone)]


def test_the_largest_micro_batch_of_all_epochs_is_tried(base_model: Path, bad_row: Path, tmp_path: Path) -> None:
    recorder = Recorder()
    train(short_settings(base_model, bad_row, tmp_path / "run", data__eval_split="2"), recorder)
    (tried,) = [event for event in recorder.events if isinstance(event, Rehearsed)]
    longest = prepare_run(short_settings(base_model, bad_row, tmp_path / "other"), Recorder()).plan.longest_row_tokens
    assert (tried.micro_batch_size, tried.longest_row_tokens) == (2, longest)
    assert longest > 150
    first = next(place for place, event in enumerate(recorder.events) if isinstance(event, StepDone))
    assert recorder.events.index(tried) < first


def test_an_evaluation_that_does_not_fit_fails_before_the_first_step(
    base_model: Path, rows: Path, tmp_path: Path
) -> None:
    held_out = write_jsonl(tmp_path / "held-out.jsonl", [messages(f"What is {n}?", "bad " * 80) for n in range(3)])
    prepared = prepare_run(
        short_settings(base_model, rows, tmp_path / "run", data__eval_dataset=str(held_out)), Recorder()
    )

    def check(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if inputs[0].shape[1] > 150:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    prepared.model.get_input_embeddings().register_forward_pre_hook(check)
    with pytest.raises(OutOfMemoryError, match="in the forward pass, tried before the first step"):
        run(prepared, Recorder())


def test_the_rehearsal_changes_nothing(
    base_model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = {"lora__dropout": 0.1, "data__eval_split": "2", "training__eval_steps": 2}
    first, second = Recorder(), Recorder()
    train(short_settings(base_model, rows, tmp_path / "a", **changed), first)
    skip_rehearsal(monkeypatch)
    train(short_settings(base_model, rows, tmp_path / "b", **changed), second)
    name = "adapter/adapter_model.safetensors"
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    losses = [
        [(event.step, event.loss, event.num_tokens) for event in recorder.events if isinstance(event, StepDone)]
        for recorder in (first, second)
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("noise", [None, 5.0])
def test_the_micro_batch_is_halved_until_it_fits_and_the_batch_kept(
    base_model: Path, rows: Path, tmp_path: Path, noise: float | None
) -> None:
    changed = {
        "training__neftune_noise_alpha": noise,
        "training__micro_batch_size": 8,
        "training__gradient_accumulation_steps": 1,
        "training__auto_micro_batch": True,
    }
    prepared = prepare_run(short_settings(base_model, rows, tmp_path / "run", **changed), Recorder())
    fail_above(prepared, 2)
    recorder = Recorder()
    result = run(prepared, recorder)
    assert result.steps == 3
    notes = [event.message for event in recorder.events if isinstance(event, Noted) and event.level == "warning"]
    assert notes[:2] == [
        "8 rows at once do not fit in memory: lowered to --micro-batch-size 4 --gradient-accumulation-steps 2",
        "4 rows at once do not fit in memory: lowered to --micro-batch-size 2 --gradient-accumulation-steps 4",
    ]
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    training = record["settings"]["training"]
    assert (training["micro_batch_size"], training["gradient_accumulation_steps"]) == (2, 4)
    assert record["origins"]["training.micro_batch_size"] == "training.auto_micro_batch"
    assert record["plan"]["examples_per_step"] == 8
    # Each step has the same rows as with micro-batches of the requested size.
    asked = {
        "training__neftune_noise_alpha": noise,
        "training__micro_batch_size": 2,
        "training__gradient_accumulation_steps": 4,
    }
    train(short_settings(base_model, rows, tmp_path / "asked", **asked), Recorder())
    name = "adapter/adapter_model.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "asked" / name).read_bytes()


def test_the_record_of_a_failed_run_has_the_micro_batch_that_ran(base_model: Path, rows: Path, tmp_path: Path) -> None:
    changed = {"training__micro_batch_size": 4, "training__auto_micro_batch": True}
    prepared = prepare_run(short_settings(base_model, rows, tmp_path / "run", **changed), Recorder())
    fail_above(prepared, 2)

    class Fails(Recorder):
        def report(self, event: Event) -> None:
            if isinstance(event, StepDone):
                raise RuntimeError("the reporter broke")

    with pytest.raises(RuntimeError, match="the reporter broke"):
        run(prepared, Fails())
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (record["status"], record["settings"]["training"]["micro_batch_size"]) == ("failed", 2)
    again = prepare_run(short_settings(base_model, rows, tmp_path / "run", **changed), Recorder())
    assert (again.plan.micro_batch_size, again.plan.gradient_accumulation_steps) == (2, 2)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate"), True),
        (MemoryError(), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED."), False),
        (ValueError("out of memory"), False),
    ],
)
def test_out_of_memory_errors_are_recognized(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def test_memory_that_runs_out_later_keeps_what_was_trained(base_model: Path, rows: Path, tmp_path: Path) -> None:
    settings = short_settings(base_model, rows, tmp_path / "run", training__max_steps=5, lora__dropout=0.1)
    prepared = prepare_run(settings, Recorder())
    fail_above(prepared, 1, after=5)  # a check of the head and one trial before the first step, then three steps
    with pytest.raises(OutOfMemoryError) as caught:
        run(prepared, Recorder())
    assert caught.value.exit_code == 3
    assert "ran out of memory in the forward pass: CUDA out of memory" in str(caught.value)
    assert "--micro-batch-size 1 --gradient-accumulation-steps 2" in str(caught.value.hint)
    assert "until step 3 is saved in" in str(caught.value.hint)
    assert train(settings, Recorder()).resumed_from_step == 3
    train(short_settings(base_model, rows, tmp_path / "whole", training__max_steps=5, lora__dropout=0.1), Recorder())
    name = "adapter/adapter_model.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A small disk of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount, umount = shutil.which("mount"), shutil.which("umount")
    if os.geteuid() != 0 or mount is None or umount is None:
        pytest.skip("only root may mount a small disk")
    mounted = subprocess.run([mount, "-t", "tmpfs", "-o", "size=192m", "tmpfs", str(disk)], check=False)
    if mounted.returncode != 0:
        pytest.skip("no small disk can be mounted here")
    try:
        yield disk
    finally:
        subprocess.run([umount, str(disk)], check=True)


class Filler(Recorder):
    """Fills a disk but for `leave_bytes` at an event for which `is_time` returns true."""

    def __init__(self, disk: Path, leave_bytes: int, is_time: Callable[[Event], bool]) -> None:
        super().__init__()
        self._disk, self._leave_bytes, self._is_time = disk, leave_bytes, is_time

    def report(self, event: Event) -> None:
        super().report(event)
        if self._is_time(event) and not (self._disk / "filler").exists():
            with (self._disk / "filler").open("wb") as file:
                file.write(bytes(max(0, shutil.disk_usage(self._disk).free - self._leave_bytes)))


@pytest.mark.parametrize(
    ("leave_bytes", "message"),
    [(8 << 20, "not enough free space for a checkpoint"), (200 << 10, r"the disk of .* is full")],
)
def test_a_full_disk_ends_the_run_with_the_last_good_checkpoint(
    base_model: Path,
    rows: Path,
    tmp_path: Path,
    small_disk: Path,
    leave_bytes: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if "full" in message:  # the disk fills up between the check and the write
        monkeypatch.setattr(CheckpointStore, "check_free_space", lambda _: None)
    output = small_disk / "run"
    changed = {"training__save_steps": 1, "training__max_steps": 6, "output__max_checkpoints": 1}
    settings = short_settings(base_model, rows, output, **changed)
    filler = Filler(small_disk, leave_bytes, lambda event: isinstance(event, CheckpointSaved) and event.step == 2)
    with pytest.raises(TrainingError, match=message) as caught:
        train(settings, filler)
    assert caught.value.exit_code == 1
    assert "Free disk space" in str(caught.value.hint)
    (small_disk / "filler").unlink()
    assert [path.name for path in (output / "checkpoints").iterdir() if not path.name.startswith(".")] == ["step-2"]
    # Space was freed: the run resumes, and ends as if the disk had been large enough.
    assert train(settings, Recorder()).resumed_from_step == 2
    train(short_settings(base_model, rows, tmp_path / "whole", **changed), Recorder())
    name = "adapter/adapter_model.safetensors"
    assert (output / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_an_adapter_that_learnt_nothing_is_a_failed_run(base_model: Path, rows: Path, tmp_path: Path) -> None:
    prepared = prepare_run(train_settings(base_model, rows, tmp_path / "run"), Recorder())
    for name, parameter in prepared.model.named_parameters():
        if parameter.requires_grad and "layers.1.self_attn.q_proj" in name:
            parameter.register_hook(torch.zeros_like)
    empty = rf"the adapter is empty: 1 of {7 * NUM_LAYERS} targets .*layers\.1\.self_attn\.q_proj"
    with pytest.raises(TrainingError, match=empty):
        run(prepared, Recorder())
    assert not (tmp_path / "run" / "adapter").exists()
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"


def test_a_target_that_the_model_never_calls_is_reported_and_not_an_error(
    base_model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = prepare_run(train_settings(base_model, rows, tmp_path / "run"), Recorder())
    idle = prepared.model.get_submodule("base_model.model.model.layers.1.mlp")
    monkeypatch.setattr(idle, "forward", torch.zeros_like)  # like an expert that no token is routed to
    recorder = Recorder()
    assert run(prepared, recorder).steps == 3
    (note,) = [e.message for e in recorder.events if isinstance(e, Noted) and "does not call" in e.message]
    part = f"3 of {7 * NUM_LAYERS} layers with an adapter"
    assert note.startswith(f"the model does not call {part} in its largest micro-batch")
    assert "layers.1.mlp.down_proj" in note


def test_norms_that_are_nan_are_a_failed_run(base_model: Path, rows: Path, tmp_path: Path) -> None:
    prepared = prepare_run(short_settings(base_model, rows, tmp_path / "run"), Recorder())
    run(prepared, Recorder())
    check_trained(prepared.model, ())
    next(p for p in prepared.model.parameters() if p.requires_grad).data[0, 0] = math.nan
    with pytest.raises(TrainingError, match=r"the adapter is broken: the norm of .* is nan"):
        check_trained(prepared.model, ())


def test_the_saved_adapter_is_compared_with_the_trained_one(base_model: Path, rows: Path, tmp_path: Path) -> None:
    prepared = prepare_run(short_settings(base_model, rows, tmp_path / "run"), Recorder())
    adapter = run(prepared, Recorder()).adapter
    before = {name: tensor.clone() for name, tensor in adapter_state(prepared.model).items()}
    check_saved(prepared.model, adapter, prepared.loaded)
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapter_state(prepared.model).items())
    next(p for p in prepared.model.parameters() if p.requires_grad).data[0, 0] += 1
    with pytest.raises(TrainingError, match="does not hold what was trained"):
        check_saved(prepared.model, adapter, prepared.loaded)


def test_memory_that_differs_from_the_prediction_is_reported_with_its_consumers(
    base_model: Path, rows: Path, tmp_path: Path
) -> None:
    # With nothing to plan, and so no leaner plan to fall back to.
    changed = {"training__micro_batch_size": 4, "training__gradient_checkpointing": "on"}
    settings = short_settings(base_model, rows, tmp_path / "run", **changed)
    card = replace(find_gpu("RTX 4090"), total_bytes=1 << 34)
    load_plan = plan_load(settings, Recorder())
    outlook = check_memory(settings.settings, load_plan, card, Recorder(), longest_row_tokens=64, force=False)
    assert outlook is not None
    prepared = prepare_run(settings, Recorder())
    prepared = replace(prepared, outlook=outlook, plan=replace(prepared.plan, predicted_memory=outlook.predicted))
    fail_above(prepared, 1)
    with pytest.raises(OutOfMemoryError) as caught:
        run(prepared, Recorder())
    message = str(caught.value)
    predicted = outlook.predicted
    assert f"predicted {format_bytes(predicted.allocated_bytes)} allocated" in message
    largest = sorted(predicted.consumers.items(), key=lambda item: -item[1])[:3]
    assert f"largest: {', '.join(f'{name} {format_bytes(size)}' for name, size in largest)}" in message
    # The prediction was that it fits, so it has no better proposal; what always takes less is named.
    assert "--micro-batch-size 1 --gradient-accumulation-steps 4" in str(caught.value.hint)
