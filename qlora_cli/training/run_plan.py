"""Prepare a run up to its first step: settings, data, weights, adapter and batch arithmetic."""

import time
from dataclasses import dataclass, replace
from operator import attrgetter

from peft import PeftModel
from transformers import set_seed

from qlora_cli.adapters.adapter import attach_adapter
from qlora_cli.adapters.fused_lora import switch_fused, unfused
from qlora_cli.adapters.reader import read_tensors
from qlora_cli.adapters.trainable import further_training_problem
from qlora_cli.data.feeding.micro_batches import padding_of_epoch
from qlora_cli.data.feeding.prepare import PreparedData, TrainingData, prepare_data
from qlora_cli.data.tokenizing.encode import TextTokenizer
from qlora_cli.errors import ModelError, QloraError
from qlora_cli.events import Noted, PhaseStarted, Reporter
from qlora_cli.hub.push import check_push
from qlora_cli.loading.load_plan import LoadPlan, check_placement, plan_outlined, with_storage
from qlora_cli.loading.loader import LoadedModel, load_planned
from qlora_cli.loading.model_outline import ModelOutline, find, settle_load
from qlora_cli.memory.fitting.division import MICRO_BATCH, MICRO_BATCH_TOKENS
from qlora_cli.model_files.adapter_files import ADAPTER_WEIGHTS
from qlora_cli.model_files.digest import base_digest
from qlora_cli.model_files.model_config import balances_experts
from qlora_cli.quantization.methods.skip_modules import linear_layers
from qlora_cli.quantization.residuals import QuantizationResiduals
from qlora_cli.ranks.group import ALONE, ProcessGroup
from qlora_cli.runs.run_result import KeptLayers, TrainPlan, TrainResult
from qlora_cli.settings.models import TrainSettings
from qlora_cli.settings.objectives import Objective
from qlora_cli.settings.open_method import is_method_open, with_provisional_method
from qlora_cli.settings.resolve import Resolved
from qlora_cli.settings.settle import inferred_origin
from qlora_cli.training.arguments import check_hardware, resolve_checkpointing, save_interval
from qlora_cli.training.calibrated_adapter import residuals_of_run
from qlora_cli.training.callbacks.step_timer import Forecast
from qlora_cli.training.checks.adapter_outline import check_space, disk_bytes, sizes_of
from qlora_cli.training.checks.checks_before_data import check_before_data, with_data_errors
from qlora_cli.training.checks.input_checks import check_train_inputs
from qlora_cli.training.checks.kept_layers import is_budget_open, keep_layers
from qlora_cli.training.checks.memory_plan import (
    ACCUMULATION,
    FITS,
    MEASURED,
    PLANNED,
    choose_storage,
    decided,
    inferred_from_resume,
    plan_memory,
    with_skipped,
)
from qlora_cli.training.checks.packing_check import check_packing, packing_fault_of
from qlora_cli.training.checks.predicted_memory import Outlook, estimator_of
from qlora_cli.training.checks.predicted_time import predict_time
from qlora_cli.training.liger import use_liger_kernels
from qlora_cli.training.resuming.loop_state import check_state
from qlora_cli.training.resuming.resume import (
    Resume,
    check_adapter_is_safe,
    check_base,
    check_length,
    check_rows,
    find_resume,
)
from qlora_cli.training.run_notes import note_data, note_resume
from qlora_cli.training.sharding.refusals import check_shardable
from qlora_cli.training.sharding.sharded_base import kept_shards, shard_base
from qlora_cli.units import counted

MIXES_ROWS = inferred_origin("a model that can't keep joined rows apart")


@dataclass(frozen=True, kw_only=True)
class SettledRun:
    """A run with everything that can be decided before its weights are read to be trained on.

    `kept` are the layers that its memory budget keeps unquantized; `resume` is the earlier run that it continues;
    `num_steps` are those of the whole run.
    """

    asked: Resolved[TrainSettings]
    resolved: Resolved[TrainSettings]
    load_plan: LoadPlan
    rows: TrainingData
    outlook: Outlook | None
    kept: KeptLayers | None
    resume: Resume | None
    num_steps: int
    started: float

    @property
    def is_done(self) -> bool:
        """Whether there is nothing left to do."""
        resume = self.resume
        is_same = resume is not None and resume.run.path.resolve() == self.resolved.settings.output.directory.resolve()
        if resume is None or not is_same or not resume.is_complete:
            return False
        result = TrainResult.of_run(resume.run, resume.record)
        return result is not None and result.num_steps == self.num_steps


@dataclass(frozen=True, kw_only=True)
class PreparedRun:
    """A run that is ready for its first step, or for the next one if it is resumed. `end_ids` end an answer."""

    asked: Resolved[TrainSettings]
    resolved: Resolved[TrainSettings]
    loaded: LoadedModel
    model: PeftModel
    train_data: PreparedData
    eval_data: PreparedData | None
    plan: TrainPlan
    outlook: Outlook | None
    forecast: Forecast | None
    resume: Resume | None
    end_ids: frozenset[int]
    started: float

    @property
    def settings(self) -> TrainSettings:
        """The resolved settings."""
        return self.resolved.settings

    @property
    def longest_row_tokens(self) -> int:
        """The tokens of the longest row, trained or held out; of a stream, the most that it may have."""
        if self.train_data.stream is not None:
            return self.settings.data.max_length
        return max(int(data.lengths.max()) for data in (self.train_data, self.eval_data) if data is not None)


def prepare_run(asked: Resolved[TrainSettings], reporter: Reporter, *, force: bool = False) -> PreparedRun:
    """Prepare a run up to its first step, without writing anything. See `settle_run` and `load_run`."""
    return load_run(settle_run(asked, reporter, force=force), reporter)


def settle_run(asked: Resolved[TrainSettings], reporter: Reporter, *, force: bool = False) -> SettledRun:
    """Decide everything that does not need the weights, and what a memory budget is spent on, which does.

    Cheap checks come first, and their problems are reported together: names and files; then the model, its headers and
    the first rows of the data. Then come the data as a whole and the memory of training.
    `force` continues although training is predicted not to fit.

    Raises:
        QloraError: of the type of the problem.
    """
    started = time.monotonic()
    check_train_inputs(asked)
    try:
        model = _settle_model(with_provisional_method(asked), reporter)
    except QloraError as error:
        combined = with_data_errors(error, asked)
        raise combined from (None if combined is error else error)
    resolved, load_plan, resume = model.resolved, model.load_plan, model.resume
    settings = resolved.settings
    check_before_data(resolved, load_plan, reporter)
    rows = _prepare_data(settings, load_plan, reporter)
    num_steps = num_optimizer_steps(settings, None if rows.train.stream is not None else len(rows.train.dataset))
    if resume is not None:
        evaluation = rows.evaluation.report.fingerprint if rows.evaluation is not None else None
        check_rows(resume, {"train": rows.train.report.fingerprint, "eval": evaluation})
        check_length(resume, settings, num_steps)
    estimator = None
    if is_method_open(resolved):
        estimator = estimator_of(settings, load_plan)
        resolved = choose_storage(resolved, load_plan, rows, estimator, reporter)
        load_plan = with_storage(load_plan, model.outline, resolved.settings)
        check_hardware(resolved.settings.quantization, resolved.settings.training, load_plan.device)
    planned, outlook = plan_memory(resolved, load_plan, rows, reporter, resume, force=force, estimator=estimator)
    kept = None if resume is None else KeptLayers.of_run(resume.record)
    if is_budget_open(resolved.settings, load_plan, resume):
        estimator = estimator or estimator_of(resolved.settings, load_plan)
        kept = keep_layers(resolved, load_plan, rows, outlook, estimator, reporter, force=force)
        if kept is not None:
            resolved = decided(resolved, with_skipped(resolved.settings, kept), MEASURED)
            load_plan = with_storage(load_plan, model.outline, resolved.settings)
            planned, outlook = plan_memory(
                resolved, load_plan, rows, reporter, resume, force=force, estimator=estimator
            )
    settled = SettledRun(
        asked=asked,
        resolved=planned,
        load_plan=load_plan,
        kept=kept,
        rows=rows,
        outlook=outlook,
        resume=resume,
        num_steps=num_steps,
        started=started,
    )
    if resume is not None and not settled.is_done:
        check_adapter_is_safe(resume, settings.output)
    return settled


@dataclass(frozen=True, kw_only=True)
class _SettledModel:
    """The model of a run, the settings settled by its files, and the earlier run that is resumed."""

    outline: ModelOutline
    resolved: Resolved[TrainSettings]
    load_plan: LoadPlan
    resume: Resume | None


def _settle_model(asked: Resolved[TrainSettings], reporter: Reporter) -> _SettledModel:
    check_push(asked.settings.output, "output.push_to_hub", reporter)
    resume = find_resume(asked.settings.output)
    if resume is not None and resume.checkpoint is not None:
        check_state(resume.checkpoint)
        read_tensors(resume.checkpoint / ADAPTER_WEIGHTS)  # which checks for NaN and infinity
    check_placement(asked.settings)
    model = find(asked.settings.model, reporter)
    resolved = settle_load(asked, model, reporter, inferred_from_resume(asked, resume))
    settings = resolved.settings
    load_plan = plan_outlined(model, settings, reporter)
    _check_head_is_unquantized(load_plan)
    check_shardable(settings)
    if load_plan.adapter is not None and (refusal := further_training_problem(load_plan.adapter, load_plan.shapes)):
        raise refusal
    _check_begin_of_comparison(load_plan, settings.training.objective)
    if resume is not None:
        trains_given = load_plan.source.adapter is not None
        digest = base_digest(load_plan.source.path)
        note_resume(resume, settings, reporter, trains_given_adapter=trains_given, digest=digest)
        check_base(resume, digest, load_plan.dtype.name.value)
        if settings.training.max_steps is not None:  # else rows are counted first
            check_length(resume, settings, settings.training.max_steps)
    check_hardware(settings.quantization, settings.training, load_plan.device)
    return _SettledModel(outline=model, resolved=resolved, load_plan=load_plan, resume=resume)


def load_run(
    settled: SettledRun, reporter: Reporter, group: ProcessGroup = ALONE, *, calibrates: bool = True
) -> PreparedRun:
    """Read the weights of a settled run and attach its adapter; all processes of `group` call this.

    Without `calibrates`, as for a run that is only planned, an adapter is not calibrated, which takes minutes.

    Raises:
        QloraError: of the type of the problem.
    """
    resolved, load_plan, rows = settled.resolved, settled.load_plan, settled.rows
    settings = resolved.settings
    training = settings.training
    shards = kept_shards(load_plan, group, on_host=training.offload_base) if training.shards_base else None
    # A checkpoint's matrices replace those that the adapter begins with.
    begins = calibrates and (settled.resume is None or settled.resume.checkpoint is None)
    residuals = residuals_of_run(settings, load_plan, rows.train, reporter, begins=begins)
    loaded = load_planned(load_plan, reporter, trains_adapter=True, lora=settings.lora, shards=shards)
    # PEFT draws the initial LoRA matrices from the global generator.
    set_seed(settings.training.seed)
    model = _attach(loaded, settings, residuals, reporter)
    if loaded.shards is not None:
        shard_base(model, group, loaded.shards)
    if settings.training.use_liger_kernel:
        use_liger_kernels(model)
    if settings.data.packing:
        check_packing(loaded, model)
    settled = _joined(settled, loaded, model, reporter)
    resolved, settings = settled.resolved, settled.resolved.settings
    forecast = predict_time(settings, settled.load_plan, rows, settled.outlook, num_steps=settled.num_steps)
    plan = _plan(settled, loaded, model, forecast)
    check_space(sizes_of(model, settings.training.optimizer), settings)  # again: the tokens may be on this disk
    reporter.report(Noted(message=batch_arithmetic(plan)))
    return PreparedRun(
        asked=settled.asked,
        resolved=resolved,
        loaded=loaded,
        model=model,
        train_data=rows.train,
        eval_data=rows.evaluation,
        plan=plan,
        outlook=settled.outlook,
        forecast=forecast,
        resume=settled.resume,
        end_ids=load_plan.tokenizer.end_ids,
        started=settled.started,
    )


def with_micro_batch(prepared: PreparedRun, size: int) -> PreparedRun:
    """Return a run with a smaller micro-batch and the same batch.

    `size` is its tokens if micro-batches are filled, else its rows, which divide the batch.
    """
    training = prepared.settings.training
    values: dict[str, object] = {MICRO_BATCH_TOKENS: size}
    if training.micro_batch_tokens is None:
        accumulation = training.micro_batch_size * training.gradient_accumulation_steps // size
        values = {MICRO_BATCH: size, ACCUMULATION: accumulation}
    return with_memory_of(decided(prepared.resolved, values, FITS), prepared)


def with_leaner_plan(prepared: PreparedRun) -> PreparedRun | None:
    """Return the run as it is planned to take less memory; None if there is no such plan."""
    outlook = prepared.outlook.leaner() if prepared.outlook is not None else None
    if outlook is None or outlook.planned is None:
        return None
    leaner = with_memory_of(decided(prepared.resolved, outlook.planned.chosen.values, PLANNED), prepared)
    return replace(leaner, outlook=outlook, plan=replace(leaner.plan, predicted_memory=outlook.predicted))


def with_memory_of(resolved: Resolved[TrainSettings], prepared: PreparedRun) -> PreparedRun:
    """Return a prepared run with other settings of the micro-batch and of checkpointing."""
    settings, training = resolved.settings, resolved.settings.training
    checkpointing = resolve_checkpointing(training.gradient_checkpointing, prepared.loaded.device)
    plan = replace(
        prepared.plan,
        gradient_checkpointing=checkpointing.value,
        micro_batch_size=training.micro_batch_size,
        micro_batch_tokens=training.micro_batch_tokens,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        padding_share=_padding_of(prepared.train_data, settings),
        predicted_time=None,  # of another micro-batch
    )
    return replace(prepared, resolved=resolved, plan=plan, forecast=None)


def _attach(
    loaded: LoadedModel, settings: TrainSettings, residuals: QuantizationResiduals | None, reporter: Reporter
) -> PeftModel:
    """Return the model with the adapter to train: an existing or a new one."""
    model = loaded.model
    if isinstance(model, PeftModel):
        reporter.report(Noted(message=f"the adapter in {loaded.source.adapter} is trained further"))
    else:
        commit = loaded.source.commit
        model, notes = attach_adapter(model, settings.lora, loaded.new_token_ids, commit, residuals)
        for note in notes:
            reporter.report(Noted(level="warning", message=note))
    switch_fused(model, enabled=settings.training.fused_lora)
    if settings.training.fused_lora:
        _note_unfused(model, loaded, reporter)
    return model


def _joined(settled: SettledRun, loaded: LoadedModel, model: PeftModel, reporter: Reporter) -> SettledRun:
    """Return the run with micro-batches of `micro_batch_size` rows if they can't be filled: the model mixes rows."""
    if settled.resolved.settings.training.micro_batch_tokens is None:
        return settled
    fault = packing_fault_of(loaded, model)
    if fault is None:
        if balances_experts(loaded.model.config):
            message = "the balancing loss of experts is a mean over each micro-batch, as many tokens as it may hold"
            reporter.report(Noted(message=message))
        return settled
    is_planned = settled.resolved.origin_of(MICRO_BATCH_TOKENS) == PLANNED
    what = "the planned micro-batches are" if is_planned else "training.micro_batch_tokens is"
    message = (
        f"{what} not used, and rows are padded: {loaded.source.name} with {loaded.attention} attention can't keep "
        f"joined rows apart: {fault}"
    )
    reporter.report(Noted(level="info" if is_planned else "warning", message=message))
    planned = settled.outlook.planned if settled.outlook is not None else None
    reopened = {path: attrgetter(path)(settled.asked.settings) for path in (planned.chosen.values if planned else ())}
    resolved = decided(settled.resolved, {MICRO_BATCH_TOKENS: None, **reopened}, MIXES_ROWS)
    # The largest micro-batch is tried before the first step, whatever is predicted.
    resolved, outlook = plan_memory(
        resolved, settled.load_plan, settled.rows, reporter, settled.resume, force=True, may_fill=False
    )
    return replace(settled, resolved=resolved, outlook=outlook)


def _note_unfused(model: PeftModel, loaded: LoadedModel, reporter: Reporter) -> None:
    """Note which layers are not computed together with their adapters, and why."""
    for reason, number in unfused(model, loaded.dtype.torch_dtype).items():
        message = f"{counted(number, 'layer')} computed as by PEFT, which is slower: {reason}"
        reporter.report(Noted(message=message))


def _check_begin_of_comparison(load_plan: LoadPlan, objective: Objective) -> None:
    """Check that a comparison of answers begins with the base, if it is by that, or else with matrices alone.

    Raises:
        ModelError: it would begin with an adapter that can't be trained so.
    """
    if load_plan.adapter is None or not objective.compares:
        return
    lora = load_plan.adapter.lora
    if objective.has_reference:
        reason = "answers are compared by the base alone, and it would begin elsewhere"
    elif lora.modules_to_save or lora.trainable_token_indices or load_plan.adapter.trained:
        reason = "it trains parts of the model itself, which may have no gradient of single answers"
    else:
        return
    raise ModelError(
        f"the adapter in {load_plan.source.adapter} can't be trained further with --objective {objective.value}: "
        f"{reason}",
        hint="Merge it into its base with qlora merge, and train on the result.",
    )


def _check_head_is_unquantized(load_plan: LoadPlan) -> None:
    """Check that the head is not quantized, as in some checkpoints: the loss reads its weight directly."""
    shapes, layout = load_plan.shapes, load_plan.layout
    for name, module in linear_layers(shapes):
        if module is shapes.get_output_embeddings() and name not in layout.unquantized:
            raise ModelError(
                f"{load_plan.source.base_name} can't be trained on: its head, {name}, is quantized, and the loss is "
                "computed from its weight directly",
                hint="Give the 16-bit model, which is quantized without its head.",
            )


def batch_arithmetic(plan: TrainPlan) -> str:
    """Describe in one line the rows of a step and the steps of the run."""
    epochs = (
        ""
        if plan.num_epochs is None
        else f", {plan.num_epochs:.2f} epochs of {counted(plan.num_train_tokens, 'token')}"
    )
    return f"{plan.batch}; {counted(plan.num_steps, 'step')}{epochs}"


def _prepare_data(settings: TrainSettings, load_plan: LoadPlan, reporter: Reporter) -> TrainingData:
    data, tokenizer = settings.data, load_plan.tokenizer
    reporter.report(PhaseStarted(title=f"Reading {', '.join(data.dataset)}"))
    text = TextTokenizer(tokenizer=tokenizer.tokenizer, end_ids=tokenizer.end_ids, reporter=reporter)
    rows = prepare_data(data, text, seed=settings.training.seed)
    for prepared in (rows.train, rows.evaluation):
        if prepared is not None:
            note_data(prepared, settings, reporter)
    return rows


def num_optimizer_steps(settings: TrainSettings, num_rows: int | None) -> int:
    """Return the steps of a run; `num_rows` is None for a stream, for which `max_steps` is given."""
    training = settings.training
    assert num_rows is not None or training.max_steps is not None, "settings require max_steps for a stream"
    return training.num_steps(num_rows or 0)


def _padding_of(data: PreparedData, settings: TrainSettings) -> float:
    return padding_of_epoch(
        data.lengths, settings.training, is_packed=settings.data.packing, padded_lengths=data.padded_lengths
    )


def _plan(settled: SettledRun, loaded: LoadedModel, model: PeftModel, forecast: Forecast | None) -> TrainPlan:
    settings, data, outlook = settled.resolved.settings, settled.rows, settled.outlook
    training, report = settings.training, data.train.report
    num_rows = None if data.train.stream is not None else len(data.train.dataset)
    num_trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    num_steps = settled.num_steps
    sizes = sizes_of(model, training.optimizer)
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
        padding_share=_padding_of(data.train, settings),
        micro_batch_size=training.micro_batch_size,
        micro_batch_tokens=training.micro_batch_tokens,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        num_devices=training.num_gpus,
        examples_per_step=training.rows_per_step,
        num_steps=num_steps,
        save_steps=save_interval(training, num_steps),
        num_epochs=None if num_rows is None else num_steps / training.steps_per_epoch(num_rows),
        adapter_bytes=sizes.adapter_bytes,
        optimizer_bytes=sizes.optimizer_bytes,
        checkpoint_bytes=sizes.checkpoint_bytes,
        disk_bytes=disk_bytes(sizes, settings),
        predicted_memory=outlook.predicted if outlook is not None else None,
        predicted_time=forecast.predicted if forecast is not None else None,
        kept_layers=settled.kept,
        notes=loaded.notes,
    )
