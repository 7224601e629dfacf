"""Settle everything before the first step: load, attach, prepare the data, do the batch arithmetic."""

import math
import time
from dataclasses import dataclass

from peft import PeftModel
from transformers import set_seed

from qlora_cli.data.prepare import DataReport, PreparedData, prepare_data
from qlora_cli.events import Noted, PhaseStarted, Reporter
from qlora_cli.loading.adapter import attach_adapter
from qlora_cli.loading.device import choose_compute_dtype, choose_device
from qlora_cli.loading.loader import LoadedModel, choose_attention, load_model
from qlora_cli.loading.source import find_model
from qlora_cli.loading.tokenizer import load_tokenizer
from qlora_cli.settings.models import Optimizer, TrainSettings
from qlora_cli.settings.resolve import Resolved
from qlora_cli.training.arguments import check_hardware, uses_checkpointing
from qlora_cli.training.preflight import check_disk_space, check_train_inputs
from qlora_cli.training.result import TrainPlan

EIGHT_BIT = {Optimizer.ADAMW_8BIT, Optimizer.PAGED_ADAMW_8BIT}
SMALL_FILES_BYTES = 32 * 1024**2  # tokenizer, configs, trainer state, metrics


@dataclass(frozen=True, kw_only=True)
class PreparedRun:
    """A run that is ready for its first step."""

    resolved: Resolved[TrainSettings]
    loaded: LoadedModel
    model: PeftModel
    train_data: PreparedData
    eval_data: PreparedData | None
    plan: TrainPlan
    started: float

    @property
    def settings(self) -> TrainSettings:
        """The resolved settings."""
        return self.resolved.settings


def prepare_run(resolved: Resolved[TrainSettings], reporter: Reporter) -> PreparedRun:
    """Do everything up to the first step; writes nothing.

    Cheap checks come first: names and files, then the data, then the model.

    Raises:
        QloraError: of the kind that fits what is wrong.
    """
    started = time.monotonic()
    settings = resolved.settings
    check_train_inputs(resolved)
    device = choose_device(settings.model.device)
    choose_compute_dtype(settings.model.dtype, device)
    choose_attention(settings.model.attention, device)
    check_hardware(settings, device)
    train_data, eval_data = _prepare_data(settings, reporter)
    loaded = load_model(settings, reporter)
    # PEFT draws the initial LoRA matrices from the global generator.
    set_seed(settings.training.seed)
    model = attach_adapter(loaded.model, settings.lora)
    plan = _plan(settings, loaded, model, train_data, eval_data)
    check_disk_space(settings.output.directory, plan.disk_bytes)
    reporter.report(Noted(message=batch_arithmetic(plan)))
    return PreparedRun(
        resolved=resolved,
        loaded=loaded,
        model=model,
        train_data=train_data,
        eval_data=eval_data,
        plan=plan,
        started=started,
    )


def batch_arithmetic(plan: TrainPlan) -> str:
    """Return in one line how rows make up a step, and steps the run."""
    return (
        f"{plan.micro_batch_size} micro-batch x {plan.gradient_accumulation_steps} accumulation x "
        f"{plan.num_devices} device = {plan.examples_per_step} examples a step; {plan.num_steps:,} steps, "
        f"{plan.num_epochs:.2f} epochs of {plan.num_train_tokens:,} tokens"
    )


def _prepare_data(settings: TrainSettings, reporter: Reporter) -> tuple[PreparedData, PreparedData | None]:
    tokenizer, _ = load_tokenizer(find_model(settings.model))
    data = settings.data
    reporter.report(PhaseStarted(title=f"Reading {data.dataset}"))
    train_data = prepare_data(data.dataset, data.split, data, tokenizer)
    _note_losses(train_data.report, data.max_length, reporter)
    if data.eval_dataset is None:
        return train_data, None
    reporter.report(PhaseStarted(title=f"Reading {data.eval_dataset}"))
    eval_data = prepare_data(data.eval_dataset, data.eval_split, data, tokenizer)
    _note_losses(eval_data.report, data.max_length, reporter)
    return train_data, eval_data


def _note_losses(report: DataReport, max_length: int, reporter: Reporter) -> None:
    """Say what was recognised, and what was cut or dropped."""
    reporter.report(
        Noted(
            message=f"{report.name}: {report.num_rows:,} rows read as {report.format.value}, "
            f"{report.num_tokens:,} tokens, {report.num_supervised_tokens:,} of them trained"
        )
    )
    if report.num_truncated_rows:
        reporter.report(
            Noted(
                level="warning",
                message=f"{report.name}: {report.num_truncated_rows:,} rows are longer than {max_length} tokens and "
                f"were cut; {report.num_lost_supervised_tokens:,} trained tokens are lost (raise --max-length)",
            )
        )
    if report.num_dropped_rows:
        reporter.report(
            Noted(
                level="warning",
                message=f"{report.name}: {report.num_dropped_rows:,} rows have no token to train and were dropped",
            )
        )


def num_optimizer_steps(settings: TrainSettings, num_rows: int) -> int:
    """Return the steps of a run: `max_steps`, or what `epochs` come to, as the trainer would count them."""
    training = settings.training
    if training.max_steps is not None:
        return training.max_steps
    return max(1, math.ceil(training.epochs * _steps_per_epoch(settings, num_rows)))


def _steps_per_epoch(settings: TrainSettings, num_rows: int) -> int:
    num_micro_batches = math.ceil(num_rows / settings.training.micro_batch_size)
    return math.ceil(num_micro_batches / settings.training.gradient_accumulation_steps)


def _plan(
    settings: TrainSettings,
    loaded: LoadedModel,
    model: PeftModel,
    train_data: PreparedData,
    eval_data: PreparedData | None,
) -> TrainPlan:
    training, report = settings.training, train_data.report
    num_trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    num_steps = num_optimizer_steps(settings, report.num_rows)
    adapter_bytes = 4 * num_trainable
    # AdamW keeps two moments for each parameter: 4 bytes each, or 1 in the 8-bit optimizers.
    optimizer_bytes = (2 if training.optimizer in EIGHT_BIT else 8) * num_trainable
    checkpoint_bytes = adapter_bytes + optimizer_bytes + SMALL_FILES_BYTES
    return TrainPlan(
        model=loaded.source.name,
        output=settings.output.directory,
        device=str(loaded.device),
        quantization=settings.quantization.method.value,
        compute_dtype=loaded.dtype.name.value,
        compute_dtype_reason=loaded.dtype.reason,
        attention=loaded.attention,
        gradient_checkpointing=uses_checkpointing(training.gradient_checkpointing, loaded.device),
        optimizer=training.optimizer.value,
        num_parameters=loaded.inventory.num_parameters,
        num_trainable_parameters=num_trainable,
        data_format=report.format.value,
        num_train_rows=report.num_rows,
        num_eval_rows=eval_data.report.num_rows if eval_data else None,
        num_train_tokens=report.num_tokens,
        num_supervised_tokens=report.num_supervised_tokens,
        longest_row_tokens=report.longest_row_tokens,
        num_truncated_rows=report.num_truncated_rows,
        num_dropped_rows=report.num_dropped_rows,
        num_lost_supervised_tokens=report.num_lost_supervised_tokens,
        micro_batch_size=training.micro_batch_size,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        num_devices=1,
        examples_per_step=training.micro_batch_size * training.gradient_accumulation_steps,
        num_steps=num_steps,
        num_epochs=num_steps / _steps_per_epoch(settings, report.num_rows),
        adapter_bytes=adapter_bytes,
        # The newest checkpoint is complete before the oldest is deleted.
        disk_bytes=adapter_bytes + SMALL_FILES_BYTES + (settings.output.max_checkpoints + 1) * checkpoint_bytes,
    )
