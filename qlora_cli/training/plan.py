"""Settle everything before the first step: load, attach, prepare the data, do the batch arithmetic."""

import math
import time
from dataclasses import dataclass
from pathlib import Path

from peft import PeftModel
from transformers import set_seed

from qlora_cli.data.encode import TextTokenizer
from qlora_cli.data.order import padding_share
from qlora_cli.data.prepare import PreparedData, TrainingData, prepare_data
from qlora_cli.errors import ModelError
from qlora_cli.events import Noted, PhaseStarted, Reporter
from qlora_cli.files import check_disk_space
from qlora_cli.loading.adapter import attach_adapter
from qlora_cli.loading.blueprint import Blueprint, plan_load
from qlora_cli.loading.loader import LoadedModel, load_planned
from qlora_cli.loading.positions import num_positions, within_positions
from qlora_cli.loading.source import ADAPTER_CONFIG, CONFIG, RUN_FILE
from qlora_cli.settings.models import LoraSettings, Optimizer, TrainSettings
from qlora_cli.settings.resolve import Resolved
from qlora_cli.settings.sources import Origin
from qlora_cli.training.arguments import check_hardware, resolve_checkpointing
from qlora_cli.training.memory import check_memory, gpu_at_hand
from qlora_cli.training.notes import note_data
from qlora_cli.training.order import RowOrder
from qlora_cli.training.packing import check_packing
from qlora_cli.training.preflight import check_train_inputs
from qlora_cli.training.result import PredictedMemory, TrainPlan

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


def prepare_run(resolved: Resolved[TrainSettings], reporter: Reporter, *, force: bool = False) -> PreparedRun:
    """Do everything up to the first step; writes nothing.

    Cheap checks come first: names and files, then what the model takes, then the data, then what training takes,
    then the weights. `force` goes on although training is predicted not to fit.

    Raises:
        QloraError: of the kind that fits what is wrong.
    """
    started = time.monotonic()
    settings = resolved.settings
    check_train_inputs(resolved)
    is_asked = "max_length" in settings.data.model_fields_set
    blueprint = plan_load(settings, reporter, max_length=settings.data.max_length if is_asked else None)
    _check_adapter_settings(settings.lora, blueprint)
    resolved = _as_loaded(resolved, blueprint)
    data = within_positions(resolved.settings.data, num_positions(blueprint.base.config), reporter)
    resolved = Resolved(resolved.settings.model_copy(update={"data": data}), resolved.origins)
    settings = resolved.settings
    check_hardware(blueprint.settings.quantization, settings.training, blueprint.device)
    rows = _prepare_data(settings, blueprint, reporter)
    predicted = _check_memory(settings, blueprint, rows, reporter, force=force)
    loaded = load_planned(blueprint, reporter, trains_adapter=True)
    # PEFT draws the initial LoRA matrices from the global generator.
    set_seed(settings.training.seed)
    model = _attach(loaded, settings.lora, reporter)
    if loaded.source.adapter is not None:
        resolved = _with_adapter(resolved, model, loaded.source.adapter)
    if settings.data.packing:
        check_packing(loaded, model)
    plan = _plan(settings, loaded, model, rows, predicted)
    check_disk_space(
        settings.output.directory,
        plan.disk_bytes,
        hint="Free room, choose another --output, or lower output.max_checkpoints or --rank.",
    )
    reporter.report(Noted(message=batch_arithmetic(plan)))
    return PreparedRun(
        resolved=resolved,
        loaded=loaded,
        model=model,
        train_data=rows.train,
        eval_data=rows.evaluation,
        plan=plan,
        started=started,
    )


def _check_memory(
    settings: TrainSettings,
    blueprint: Blueprint,
    data: TrainingData,
    reporter: Reporter,
    *,
    force: bool,
) -> PredictedMemory | None:
    gpu = gpu_at_hand(blueprint)
    if gpu is None:
        return None
    longest = max(int(prepared.lengths.max()) for prepared in (data.train, data.evaluation) if prepared is not None)
    if settings.data.streaming:  # longer rows than the first may come
        longest = settings.data.max_length
    return check_memory(settings, blueprint, gpu, reporter, longest_row_tokens=longest, force=force)


def _check_adapter_settings(settings: LoraSettings, blueprint: Blueprint) -> None:
    given = sorted(settings.model_fields_set)
    if blueprint.source.adapter is not None and given:
        raise ModelError(
            f"{blueprint.source.name} is an adapter, which trains on as it is: lora.{given[0]} can't be changed",
            hint="Leave the lora settings out, or name the base model.",
        )


def _as_loaded(resolved: Resolved[TrainSettings], blueprint: Blueprint) -> Resolved[TrainSettings]:
    """Return the settings with what the base was loaded with, as far as a run or a checkpoint that was named says."""
    source = blueprint.source
    run, config = (source.run or Path(source.name)) / RUN_FILE, source.path / CONFIG
    places = {"model": run, "quantization": run if blueprint.layout.prequantized is None else config}
    sections = {"model": blueprint.settings.model, "quantization": blueprint.settings.quantization}
    origins = dict(resolved.origins)
    for section, loaded in sections.items():
        before = getattr(resolved.settings, section)
        for key in type(loaded).model_fields:
            if getattr(loaded, key) != getattr(before, key):
                origins[f"{section}.{key}"] = Origin(kind="file", where=str(places[section]))
    return Resolved(resolved.settings.model_copy(update=sections), origins)


def _attach(loaded: LoadedModel, settings: LoraSettings, reporter: Reporter) -> PeftModel:
    """Return the model with the adapter to train: the one it came with, or a new one."""
    if isinstance(loaded.model, PeftModel):
        reporter.report(Noted(message=f"the adapter in {loaded.source.adapter} trains on"))
        return loaded.model
    model, notes = attach_adapter(loaded.model, settings, loaded.new_token_ids, loaded.source.commit)
    for note in notes:
        reporter.report(Noted(level="warning", message=note))
    return model


def _with_adapter(resolved: Resolved[TrainSettings], model: PeftModel, directory: Path) -> Resolved[TrainSettings]:
    """Return the settings with those of the adapter that trains on, for the record of the run."""
    config = model.peft_config[model.active_adapter]
    modules, parameters = config.target_modules, config.target_parameters
    lora = {
        "rank": config.r,
        "alpha": float(config.lora_alpha),
        "dropout": config.lora_dropout,
        "target_modules": (modules,) if isinstance(modules, str) else tuple(sorted(modules or ())),
        "target_parameters": tuple(sorted(parameters)) if parameters else None,
    }
    settings = resolved.settings.model_copy(update={"lora": resolved.settings.lora.model_copy(update=lora)})
    where = Origin(kind="file", where=str(directory / ADAPTER_CONFIG))
    return Resolved(settings, {**resolved.origins, **{f"lora.{key}": where for key in lora}})


def batch_arithmetic(plan: TrainPlan) -> str:
    """Return in one line how rows make up a step, and steps the run."""
    epochs = "" if plan.num_epochs is None else f", {plan.num_epochs:.2f} epochs of {plan.num_train_tokens:,} tokens"
    return (
        f"{plan.micro_batch_size} micro-batch x {plan.gradient_accumulation_steps} accumulation x "
        f"{plan.num_devices} device = {plan.examples_per_step} examples a step; {plan.num_steps:,} steps{epochs}"
    )


def _prepare_data(settings: TrainSettings, blueprint: Blueprint, reporter: Reporter) -> TrainingData:
    data, tokenizer = settings.data, blueprint.tokenizer
    reporter.report(PhaseStarted(title=f"Reading {', '.join(data.dataset)}"))
    text = TextTokenizer(tokenizer=tokenizer.tokenizer, end_ids=tokenizer.end_ids)
    found = prepare_data(data, text, seed=settings.training.seed)
    for prepared in (found.train, found.evaluation):
        if prepared is not None:
            note_data(prepared, tokenizer.tokenizer, data.max_length, reporter)
    return found


def num_optimizer_steps(settings: TrainSettings, num_rows: int | None) -> int:
    """Return the steps of a run: `max_steps`, or what `epochs` come to, as the trainer would count them.

    `num_rows` is None for a stream, for which `max_steps` is given.
    """
    training = settings.training
    if training.max_steps is not None:
        return training.max_steps
    assert num_rows is not None, "settings ask for the steps of a stream"
    return max(1, math.ceil(training.epochs * _steps_per_epoch(settings, num_rows)))


def _steps_per_epoch(settings: TrainSettings, num_rows: int) -> int:
    num_micro_batches = math.ceil(num_rows / settings.training.micro_batch_size)
    return math.ceil(num_micro_batches / settings.training.gradient_accumulation_steps)


def _padding_share(settings: TrainSettings, data: PreparedData) -> float:
    """Return the share of pad tokens in the first epoch; packed rows follow one another without any."""
    if settings.data.packing:
        return 0.0
    order = list(RowOrder(data.lengths, settings.training))
    return padding_share(data.lengths, order, settings.training.micro_batch_size)


def _plan(
    settings: TrainSettings,
    loaded: LoadedModel,
    model: PeftModel,
    data: TrainingData,
    predicted_memory: PredictedMemory | None,
) -> TrainPlan:
    training, report = settings.training, data.train.report
    num_rows = None if data.train.stream is not None else len(data.train.dataset)
    num_trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    num_steps = num_optimizer_steps(settings, num_rows)
    adapter_bytes = 4 * num_trainable
    # AdamW keeps two moments for each parameter: 4 bytes each, or 1 in the 8-bit optimizers.
    optimizer_bytes = (2 if training.optimizer in EIGHT_BIT else 8) * num_trainable
    checkpoint_bytes = adapter_bytes + optimizer_bytes + SMALL_FILES_BYTES
    return TrainPlan(
        model=loaded.source.name,
        output=settings.output.directory,
        device=str(loaded.device),
        quantization=loaded.settings.quantization.method.value,
        compute_dtype=loaded.dtype.name.value,
        compute_dtype_reason=loaded.dtype.reason,
        attention=loaded.attention,
        gradient_checkpointing=resolve_checkpointing(training.gradient_checkpointing, loaded.device).value,
        optimizer=training.optimizer.value,
        num_parameters=loaded.inventory.num_parameters,
        num_trainable_parameters=num_trainable,
        data_format=report.format,
        num_train_rows=report.rows_trained,
        num_packed_rows=report.packed_rows,
        num_eval_rows=data.evaluation.report.rows_trained if data.evaluation else None,
        num_train_tokens=report.tokens,
        num_supervised_tokens=report.supervised_tokens,
        longest_row_tokens=report.longest_row_tokens,
        num_truncated_rows=report.truncated_rows,
        num_dropped_rows=report.dropped_rows + report.rows_without_supervision,
        num_lost_supervised_tokens=report.supervised_tokens_lost,
        padding_share=_padding_share(settings, data.train),
        micro_batch_size=training.micro_batch_size,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        num_devices=1,
        examples_per_step=training.micro_batch_size * training.gradient_accumulation_steps,
        num_steps=num_steps,
        num_epochs=None if num_rows is None else num_steps / _steps_per_epoch(settings, num_rows),
        adapter_bytes=adapter_bytes,
        # The newest checkpoint is complete before the oldest is deleted.
        disk_bytes=adapter_bytes + SMALL_FILES_BYTES + (settings.output.max_checkpoints + 1) * checkpoint_bytes,
        predicted_memory=predicted_memory,
    )
