"""Train: the main job, from resolved settings to a run directory."""

import errno
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers.trainer_callback import PrinterCallback

from qlora_cli.data.collate import make_collator
from qlora_cli.errors import DataError, OutOfMemoryError, QloraError, TrainingError
from qlora_cli.events import (
    EvalStarted,
    Noted,
    Reporter,
    Reporters,
    TrainingEnded,
    TrainingStarted,
)
from qlora_cli.files import write_directory
from qlora_cli.loading import adapter
from qlora_cli.memory.measure import (
    peak_device_allocated_bytes,
    peak_device_reserved_bytes,
    peak_host_bytes,
    reset_device_peak,
)
from qlora_cli.settings.models import Checkpointing, TrainSettings
from qlora_cli.settings.resolve import Resolved
from qlora_cli.training.arguments import training_arguments
from qlora_cli.training.environment import describe_hardware, package_versions
from qlora_cli.training.notes import note_stream
from qlora_cli.training.order import RowOrder
from qlora_cli.training.plan import PreparedRun, prepare_run
from qlora_cli.training.reporting import ReportingCallback
from qlora_cli.training.result import PeakMemory, TrainPlan, TrainResult
from qlora_cli.training.run_directory import MetricsWriter, RunDirectory
from qlora_cli.training.stop import StopCallback, StopSignal
from qlora_cli.training.trainer import QloraTrainer

ALMOST_NOTHING_BYTES = 64 * 1024


def plan(resolved: Resolved[TrainSettings], reporter: Reporter, *, force: bool = False) -> TrainPlan:
    """Do everything up to the first step and return what would run; writes nothing.

    `force` goes on although it is predicted not to fit on the GPU.

    Raises:
        QloraError: of the kind that fits what is wrong.
    """
    return prepare_run(resolved, reporter, force=force).plan


def train(resolved: Resolved[TrainSettings], reporter: Reporter, *, force: bool = False) -> TrainResult:
    """Train an adapter and return what came of it.

    Ctrl-C and SIGTERM end the run after the step in progress, with a checkpoint and the adapter as it is
    then; the result says so. `force` goes on although the run is predicted not to fit on the GPU.

    Raises:
        QloraError: of the kind that fits what is wrong. Before the first step, nothing is left behind.
    """
    return run(prepare_run(resolved, reporter, force=force), reporter)


def run(prepared: PreparedRun, reporter: Reporter) -> TrainResult:
    """Train a prepared run; see `train`."""
    directory = RunDirectory(prepared.plan.output)
    directory.create()
    reporter = Reporters([MetricsWriter(directory), reporter])
    record = _opening_record(prepared)
    directory.write_run_file(record)
    evaluated = prepared.eval_data.skipped if prepared.eval_data else ()
    directory.keep_skipped_rows(dict.fromkeys([*prepared.train_data.skipped, *evaluated]))
    if prepared.train_data.stream is not None:
        prepared.train_data.stream.skipped_file = directory.path / "skipped_rows_of_stream.jsonl"
    try:
        with _failures_explained(prepared):
            result = _train(prepared, directory, reporter)
    except BaseException as error:
        directory.write_run_file({**record, "status": "failed", "error": f"{type(error).__name__}: {error}"})
        raise
    status = "interrupted" if result.interrupted_by else "done"
    directory.write_run_file({**record, "status": status, "result": result})
    return result


def _train(prepared: PreparedRun, directory: RunDirectory, reporter: Reporter) -> TrainResult:
    device, num_steps = prepared.loaded.device, prepared.plan.num_steps
    reset_device_peak(device)
    stop = StopSignal()
    callback = ReportingCallback(reporter, device)
    trainer = make_trainer(prepared, directory, reporter, callbacks=[callback, StopCallback(stop)])
    reporter.report(TrainingStarted(num_steps=num_steps, output=directory.path))
    start = time.monotonic()
    with stop:
        with _data_failures_explained(trainer, directory):
            trainer.train()
        step = trainer.state.global_step
        if prepared.eval_data is not None and stop.name is None and step not in callback.eval_losses:
            reporter.report(EvalStarted(step=step))
            trainer.evaluate()
        train_seconds = time.monotonic() - start
        save_adapter(prepared, directory)
    note_stream(prepared.train_data, reporter)
    # A signal during the last step or after it changes nothing: all was done.
    interrupted_by = stop.name if step < num_steps else None
    reporter.report(TrainingEnded(step=step, num_steps=num_steps, interrupted_by=interrupted_by))
    return TrainResult(
        output=directory.path,
        adapter=directory.adapter,
        steps=step,
        num_steps=num_steps,
        epochs=None if prepared.train_data.stream is not None else float(trainer.state.epoch or 0.0),
        final_loss=callback.losses[-1] if callback.losses else None,
        train_loss=sum(callback.losses) / len(callback.losses) if callback.losses else None,
        eval_loss=callback.eval_losses.get(step),
        num_tokens=callback.num_tokens,
        tokens_per_second=callback.num_tokens / callback.stepping_seconds if callback.stepping_seconds else 0.0,
        train_seconds=train_seconds,
        total_seconds=time.monotonic() - prepared.started,
        peak_memory=PeakMemory(
            host_bytes=peak_host_bytes(),
            device_allocated_bytes=peak_device_allocated_bytes(device),
            device_reserved_bytes=peak_device_reserved_bytes(device),
        ),
        predicted_memory=prepared.plan.predicted_memory,
        num_trainable_parameters=prepared.plan.num_trainable_parameters,
        interrupted_by=interrupted_by,
        checkpoints=tuple(directory.list_checkpoints()),
    )


def make_trainer(
    prepared: PreparedRun, directory: RunDirectory, reporter: Reporter, callbacks: list[Any]
) -> QloraTrainer:
    """Return the trainer of a prepared run."""
    tokenizer, loaded, data = prepared.loaded.tokenizer, prepared.loaded, prepared.train_data
    if loaded.device.type == "cuda" and torch.cuda.device_count() > 1:
        reporter.report(Noted(message=f"{torch.cuda.device_count()} GPUs are visible; this run uses {loaded.device}"))
    trainer = QloraTrainer(
        directory=directory,
        reporter=reporter,
        max_checkpoints=prepared.settings.output.max_checkpoints,
        order=RowOrder(data.lengths, prepared.settings.training) if data.stream is None else None,
        model=prepared.model,
        args=training_arguments(
            prepared.settings,
            output=directory.checkpoints,
            device=loaded.device,
            dtype=loaded.dtype,
            num_steps=prepared.plan.num_steps,
            has_eval=prepared.eval_data is not None,
        ),
        processing_class=tokenizer,
        data_collator=make_collator(tokenizer.pad_token_id, packing=prepared.settings.data.packing),
        train_dataset=data.dataset if data.stream is None else data.stream.as_dataset(),
        eval_dataset=prepared.eval_data.dataset if prepared.eval_data else None,
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def save_adapter(prepared: PreparedRun, directory: RunDirectory) -> None:
    """Write `adapter/`: the PEFT adapter, the tokenizer and its chat template, complete or absent."""

    def fill(path: Path) -> None:
        adapter.save_adapter(prepared.model, path)
        prepared.loaded.tokenizer.save_pretrained(path)

    write_directory(directory.adapter, fill)


def _opening_record(prepared: PreparedRun) -> dict[str, Any]:
    settings, loaded = prepared.settings, prepared.loaded
    evaluation = prepared.eval_data
    return {
        "status": "running",
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": settings.model_dump(mode="json"),
        "origins": {path: origin.where for path, origin in prepared.resolved.origins.items()},
        "seed": settings.training.seed,
        "versions": package_versions(),
        "hardware": describe_hardware(loaded.device),
        "base_model": loaded.report(),
        "base_model_path": loaded.source.path,
        "data": {
            "train": prepared.train_data.report,
            "eval": evaluation.report if evaluation else None,
        },
        "plan": prepared.plan,
    }


@contextmanager
def _data_failures_explained(trainer: QloraTrainer, directory: RunDirectory) -> Iterator[None]:
    """Keep what was trained until a row of a stream could not be used."""
    try:
        yield
    except DataError as error:
        step = trainer.state.global_step
        if step and not any(path.name == f"step-{step}" for path in directory.list_checkpoints()):
            trainer._save_checkpoint(trainer.model, None)
        kept = f" What was trained until step {step} is in {directory.checkpoints}." if step else ""
        raise TrainingError(str(error), hint=f"{error.hint or ''}{kept}".strip()) from error


@contextmanager
def _failures_explained(prepared: PreparedRun) -> Iterator[None]:
    """Turn what a machine runs out of into errors that say what to do."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise _out_of_memory(prepared, error) from error
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, QloraError) or not _is_disk_full(error, prepared.plan.output):
            raise
        raise TrainingError(
            f"the disk of {prepared.plan.output} is full: {error}",
            hint="Free room and run again with another --output; complete checkpoints are kept.",
        ) from error


def _is_disk_full(error: Exception, directory: Path) -> bool:
    # safetensors and torch.save write a full disk as errors of their own, without an errno.
    if isinstance(error, OSError):
        return error.errno == errno.ENOSPC
    return "No space left" in str(error) or shutil.disk_usage(directory).free < ALMOST_NOTHING_BYTES


def _out_of_memory(prepared: PreparedRun, error: torch.OutOfMemoryError) -> OutOfMemoryError:
    plan, settings = prepared.plan, prepared.settings
    flags = []
    if plan.micro_batch_size > 1:
        accumulation = plan.gradient_accumulation_steps * plan.micro_batch_size
        flags.append(f"--micro-batch-size 1 --gradient-accumulation-steps {accumulation}")
    if plan.gradient_checkpointing == Checkpointing.OFF:
        flags.append("--gradient-checkpointing on")
    if not settings.training.optimizer.is_paged:
        flags.append("--optimizer paged_adamw_8bit")
    longest = settings.data.max_length if settings.data.packing else plan.longest_row_tokens
    flags.append(f"--max-length {max(8, longest // 2)}")
    return OutOfMemoryError(f"{plan.device} ran out of memory: {error}", hint=f"Try: {' or '.join(flags)}")
