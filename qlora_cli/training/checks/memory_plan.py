"""Settle what memory decides of a run: what its settings leave open, and what an earlier run of it ran with."""

from collections.abc import Mapping

from qlora_cli.calibrating.precision_budget import SKIPPED
from qlora_cli.data.feeding.prepare import TrainingData
from qlora_cli.errors import OutOfMemoryError, QloraError
from qlora_cli.events import Noted, Reporter
from qlora_cli.loading.load_plan import LoadPlan
from qlora_cli.memory.estimator import Estimator
from qlora_cli.memory.fitting.division import MICRO_BATCH, MICRO_BATCH_TOKENS, changes_results, is_given
from qlora_cli.memory.fitting.method_choice import choose_method, describe_choice
from qlora_cli.memory.fitting.plan import CHECKPOINTING, KEPT, best_option
from qlora_cli.memory.gpus import Gpu, within_budget
from qlora_cli.memory.run_batches import StepRows
from qlora_cli.model_files.model_config import balances_experts
from qlora_cli.runs.run_result import KeptLayers
from qlora_cli.settings.choices import quant_flag
from qlora_cli.settings.models import TrainSettings
from qlora_cli.settings.open_method import LEFT_OPEN, METHOD, is_method_open
from qlora_cli.settings.resolve import Resolved
from qlora_cli.settings.rules.conflicts_calibrating import BUDGET
from qlora_cli.settings.settle import InferredSettings, inferred_origin, settle
from qlora_cli.settings.value_sources import Origin
from qlora_cli.training.batches import average_step
from qlora_cli.training.checks.predicted_memory import (
    EarlierPlan,
    Outlook,
    as_asked,
    check_memory,
    contained,
    current_gpu,
)
from qlora_cli.training.resuming.resume import Resume

ACCUMULATION = "training.gradient_accumulation_steps"
FITS = inferred_origin("training.auto_micro_batch")  # the micro-batch that fits
PLANNED = inferred_origin("the plan for this GPU")  # what is fastest among what fits
MEASURED = inferred_origin(BUDGET)  # what costs predictions most, quantized


def decided(
    resolved: Resolved[TrainSettings], values: Mapping[str, object], origin: Origin
) -> Resolved[TrainSettings]:
    """Return the settings with what the machine's memory, or the model, decides, also where `auto` was given."""
    return settle(resolved, [InferredSettings(values=values, origin=origin, is_fixed=True)])


def inferred_from_resume(asked: Resolved[TrainSettings], resume: Resume | None) -> list[InferredSettings]:
    """Return what was planned of the earlier run, or fitted there: how its base is stored, and its micro-batch."""
    if resume is None:
        return []
    inferred = [*_inferred_layers(asked, resume), *_inferred_micro_batch(asked, resume)]
    method = resume.record.setting(METHOD)
    if is_method_open(asked) and isinstance(method, str):
        return [InferredSettings(values={METHOD: method}, origin=PLANNED), *inferred]
    return inferred


def has_spent_budget(settings: TrainSettings, resume: Resume | None) -> bool:
    """Return whether the earlier run had the same memory budget, so that what it was spent on is known."""
    budget = settings.training.memory_budget
    return resume is not None and budget is not None and resume.record.setting(BUDGET) == budget


def _inferred_layers(asked: Resolved[TrainSettings], resume: Resume) -> list[InferredSettings]:
    """Return the layers that the earlier run kept unquantized within the same memory budget."""
    kept = KeptLayers.of_run(resume.record) if has_spent_budget(asked.settings, resume) else None
    if kept is None or asked.settings.training.calibrate:  # a base of the run's own is stored so
        return []
    return [InferredSettings(values=with_skipped(asked.settings, kept), origin=MEASURED, is_fixed=True)]


def with_skipped(settings: TrainSettings, kept: KeptLayers) -> dict[str, object]:
    """Return the setting of layers that stay unquantized, with those that are kept in addition."""
    return {SKIPPED: (*(settings.quantization.skip_modules or ()), *kept.modules)}


def _inferred_micro_batch(asked: Resolved[TrainSettings], resume: Resume) -> list[InferredSettings]:
    training = asked.settings.training
    if (planned := _planned_tokens(asked, resume)) is not None:
        return [InferredSettings(values={MICRO_BATCH_TOKENS: planned}, origin=PLANNED)]
    if not training.auto_micro_batch:
        return []
    if training.micro_batch_tokens is not None:
        tokens = resume.record.setting(MICRO_BATCH_TOKENS)
        if not isinstance(tokens, int) or tokens >= training.micro_batch_tokens:
            return []
        return [InferredSettings(values={MICRO_BATCH_TOKENS: tokens}, origin=FITS, is_fixed=True)]
    size, accumulation = (resume.record.setting(path) for path in (MICRO_BATCH, ACCUMULATION))
    if not (isinstance(size, int) and isinstance(accumulation, int)):
        return []
    rows = training.micro_batch_size * training.gradient_accumulation_steps
    if size >= training.micro_batch_size or size * accumulation != rows:
        return []
    values = {MICRO_BATCH: size, ACCUMULATION: accumulation}
    return [InferredSettings(values=values, origin=FITS, is_fixed=True)]


def choose_storage(
    resolved: Resolved[TrainSettings],
    load_plan: LoadPlan,
    rows: TrainingData,
    estimator: Estimator,
    reporter: Reporter,
) -> Resolved[TrainSettings]:
    """Return the settings of a run whose method is open with the least quantization that fits on its GPU.

    The provisional method stays without a GPU, and where no memory can be predicted.
    """
    gpu, settings = _gpu_of_run(load_plan, resolved), resolved.settings
    provisional = quant_flag([settings.quantization.method])
    if gpu is None:
        reporter.report(Noted(message=f"{LEFT_OPEN.where} is {provisional}: without a GPU, nothing says what fits"))
        return resolved
    predict, find_products = contained(estimator.estimate), contained(estimator.recomputed_products)
    step_rows = _open_rows(resolved, load_plan, rows, None)
    try:
        choice = choose_method(
            as_asked(settings, load_plan, longest_row(settings, rows)),
            gpu,
            lambda run, gpu: best_option(run, gpu, predict, find_products, step_rows),
            contained(estimator.resident_bytes),
        )
    except QloraError as error:
        message = f"{LEFT_OPEN.where} is {provisional}, since memory can't be predicted: {error}"
        reporter.report(Noted(level="warning", message=message))
        return resolved
    reporter.report(Noted(message=f"planned: {describe_choice(choice)}"))
    return decided(resolved, {METHOD: choice.method}, PLANNED)


def _gpu_of_run(load_plan: LoadPlan, resolved: Resolved[TrainSettings]) -> Gpu | None:
    """Return the GPU of a run, with no more memory than its budget; None for a run on the CPU."""
    gpu = current_gpu(load_plan)
    return None if gpu is None else within_budget(gpu, resolved.settings.training.memory_budget)


def _planned_tokens(asked: Resolved[TrainSettings], resume: Resume) -> int | None:
    """Return the tokens of the earlier run's micro-batches, if they were planned; None if they are given now."""
    tokens = resume.record.setting(MICRO_BATCH_TOKENS)
    is_planned = resume.record.origins.get(MICRO_BATCH_TOKENS) in (PLANNED.where, FITS.where)
    return tokens if isinstance(tokens, int) and is_planned and not is_given(asked) else None


def _open_rows(
    resolved: Resolved[TrainSettings], load_plan: LoadPlan, rows: TrainingData, resume: Resume | None
) -> StepRows | None:
    """Return the rows of a step, if how they are divided into micro-batches is open, and changes no result."""
    settings = resolved.settings
    is_settled = resume is not None or is_given(resolved) or rows.train.stream is not None
    balances = balances_experts(load_plan.shapes.config)
    if is_settled or changes_results(settings.training, is_packed=settings.data.packing, balances_experts=balances):
        return None
    return average_step(rows.train.lengths, settings.training)


def plan_memory(
    resolved: Resolved[TrainSettings],
    load_plan: LoadPlan,
    rows: TrainingData,
    reporter: Reporter,
    resume: Resume | None,
    *,
    force: bool,
    estimator: Estimator | None = None,
    may_fill: bool = True,
) -> tuple[Resolved[TrainSettings], Outlook | None]:
    """Return the settings with what is planned by memory, and the outlook with them; without a GPU, neither.

    `may_fill`: micro-batches may be filled with several rows.
    """
    gpu = _gpu_of_run(load_plan, resolved)
    if gpu is None:
        return resolved, None
    outlook = check_memory(
        resolved.settings,
        load_plan,
        gpu,
        reporter,
        longest_row_tokens=longest_row(resolved.settings, rows),
        force=force,
        estimator=estimator,
        earlier=_earlier_plan(resume),
        step_rows=_open_rows(resolved, load_plan, rows, resume) if may_fill else None,
    )
    if outlook is not None and outlook.planned is not None:
        resolved = decided(resolved, outlook.planned.chosen.values, PLANNED)
    return resolved, outlook


def longest_row(settings: TrainSettings, data: TrainingData) -> int:
    """Return the tokens of the longest row, trained or held out."""
    if settings.data.streaming:  # later rows may be longer than the first
        return settings.data.max_length
    return data.longest_tokens


def _earlier_plan(resume: Resume | None) -> EarlierPlan | None:
    """Return what was planned for the earlier run; None without one, or if its settings left nothing open."""
    paths = (CHECKPOINTING, KEPT)  # the first may have been asked for, and the second planned
    if resume is None or PLANNED.where not in map(resume.record.origins.get, paths):
        return None
    values = {path: resume.record.setting(path) for path in paths}
    return EarlierPlan(values=values, ran_out=(resume.record.error or "").startswith(OutOfMemoryError.__name__))
