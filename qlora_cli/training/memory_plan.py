"""Settle what memory decides of a run: what its settings leave open, and what an earlier run of it ran with."""

from collections.abc import Mapping

from qlora_cli.data.feeding.prepare import TrainingData
from qlora_cli.errors import OutOfMemoryError
from qlora_cli.events import Reporter
from qlora_cli.loading.load_plan import LoadPlan
from qlora_cli.memory.fitting.plan import CHECKPOINTING, KEPT
from qlora_cli.settings.models import TrainSettings
from qlora_cli.settings.resolve import Resolved
from qlora_cli.settings.settle import InferredSettings, inferred_origin, settle
from qlora_cli.settings.value_sources import Origin
from qlora_cli.training.checks.predicted_memory import EarlierPlan, Outlook, check_memory, current_gpu
from qlora_cli.training.resuming.resume import Resume

MICRO_BATCH_TOKENS = "training.micro_batch_tokens"
MICRO_BATCH, ACCUMULATION = "training.micro_batch_size", "training.gradient_accumulation_steps"
FITS = inferred_origin("training.auto_micro_batch")  # the micro-batch that fits
PLANNED = inferred_origin("the plan for this GPU")  # what is fastest among what fits


def decided(
    resolved: Resolved[TrainSettings], values: Mapping[str, object], origin: Origin
) -> Resolved[TrainSettings]:
    """Return the settings with what the machine's memory, or the model, decides, also where `auto` was given."""
    return settle(resolved, [InferredSettings(values=values, origin=origin, is_fixed=True)])


def inferred_from_resume(asked: Resolved[TrainSettings], resume: Resume | None) -> list[InferredSettings]:
    """Return the micro-batch that fitted in the earlier run, if it was determined there."""
    training = asked.settings.training
    if resume is None or not training.auto_micro_batch:
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


def plan_memory(
    resolved: Resolved[TrainSettings],
    load_plan: LoadPlan,
    rows: TrainingData,
    reporter: Reporter,
    resume: Resume | None,
    *,
    force: bool,
) -> tuple[Resolved[TrainSettings], Outlook | None]:
    """Return the settings with what is planned by memory, and the outlook with them."""
    outlook = _check_memory(resolved.settings, load_plan, rows, reporter, _earlier_plan(resume), force=force)
    if outlook is not None and outlook.planned is not None:
        resolved = decided(resolved, outlook.planned.chosen.values, PLANNED)
    return resolved, outlook


def _check_memory(
    settings: TrainSettings,
    load_plan: LoadPlan,
    data: TrainingData,
    reporter: Reporter,
    earlier: EarlierPlan | None,
    *,
    force: bool,
) -> Outlook | None:
    gpu = current_gpu(load_plan)
    if gpu is None:
        return None
    longest = data.longest_tokens
    if settings.data.streaming:  # later rows may be longer than the first
        longest = settings.data.max_length
    return check_memory(settings, load_plan, gpu, reporter, longest_row_tokens=longest, force=force, earlier=earlier)


def _earlier_plan(resume: Resume | None) -> EarlierPlan | None:
    """Return what was planned for the earlier run; None without one, or if its settings left nothing open."""
    paths = (CHECKPOINTING, KEPT)  # the first may have been asked for, and the second planned
    if resume is None or PLANNED.where not in map(resume.record.origins.get, paths):
        return None
    values = {path: resume.record.setting(path) for path in paths}
    return EarlierPlan(values=values, ran_out=(resume.record.error or "").startswith(OutOfMemoryError.__name__))
