"""Spend what a plan leaves of a run's memory budget on layers that stay unquantized, by what their quantization costs.

The base is loaded once to measure that, before it is loaded to be trained on.
"""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from qlora_cli.calibrating.calibration_rows import chosen_rows
from qlora_cli.calibrating.divergence_parts import LayerPart, parts_of_divergence
from qlora_cli.calibrating.precision_budget import SKIPPED, choose, with_layers
from qlora_cli.calibrating.prediction_error import (
    NUM_TOKENS,
    check_comparable,
    check_halves,
    measure_prediction_error,
    predict_on_rows,
)
from qlora_cli.data.feeding.prepare import TrainingData
from qlora_cli.errors import ModelError, OutOfMemoryError, QloraError
from qlora_cli.events import Noted, PhaseStarted, Reporter
from qlora_cli.hardware.counters import is_out_of_memory
from qlora_cli.loading.load_plan import LoadPlan
from qlora_cli.loading.loader import load_planned
from qlora_cli.memory.estimator import Estimator
from qlora_cli.memory.fitting.solver import headroom_bytes, spare_bytes
from qlora_cli.memory.gpus import Gpu, this_cpu, within_budget
from qlora_cli.memory.host_run import on_cpu
from qlora_cli.memory.prediction import Estimate
from qlora_cli.runs.run_result import KeptLayers
from qlora_cli.settings.models import EstimateSettings, TrainSettings
from qlora_cli.settings.open_method import METHOD
from qlora_cli.settings.resolve import Resolved
from qlora_cli.settings.rules.conflicts_calibrating import BUDGET
from qlora_cli.settings.settle import with_settings
from qlora_cli.training.checks.memory_plan import PLANNED, has_spent_budget, longest_row
from qlora_cli.training.checks.predicted_memory import Outlook, as_asked, contained
from qlora_cli.training.resuming.resume import Resume
from qlora_cli.units import counted, format_bytes

MAX_CHOICES = 6  # that are predicted, until one fits and is near to the largest that does


@dataclass(frozen=True, kw_only=True)
class PlannedMemory:
    """A planned run on a device that has no more than the budget, and what predicts it with other settings."""

    asked: EstimateSettings
    device: Gpu
    estimate_of: Callable[[EstimateSettings, Gpu], Estimate]

    @property
    def estimate(self) -> Estimate:
        """What the run is predicted to take."""
        return self.estimate_of(self.asked, self.device)

    @property
    def spare_bytes(self) -> int:
        """The bytes that weights may take in addition."""
        return spare_bytes(self.estimate, self.device)

    def lacking_bytes(self, skipped: Sequence[str]) -> int:
        """Return the bytes that the run lacks with the layers `skipped` unquantized; 0 if it fits."""
        changed = with_settings(self.asked, {SKIPPED: tuple(skipped)})
        return max(0, -headroom_bytes(self.estimate_of(changed, self.device), self.device))


def planned_memory(
    settings: TrainSettings, load_plan: LoadPlan, outlook: Outlook | None, estimator: Estimator, *, longest_row: int
) -> PlannedMemory:
    """Return the run that is planned on a GPU by `outlook`; without one, as it runs on this machine's CPU."""
    if outlook is not None:
        return PlannedMemory(asked=outlook.asked, device=outlook.gpu, estimate_of=contained(estimator.estimate))
    return PlannedMemory(
        asked=on_cpu(as_asked(settings, load_plan, longest_row)),
        device=within_budget(this_cpu(), settings.training.memory_budget),
        estimate_of=contained(estimator.estimate),
    )


def is_budget_open(settings: TrainSettings, load_plan: LoadPlan, resume: Resume | None) -> bool:
    """Return whether there is a memory budget that was not spent yet, by an earlier run or on the run's own base."""
    has_own_base = settings.training.calibrate and load_plan.layout.prequantized is not None
    return settings.training.memory_budget is not None and not has_own_base and not has_spent_budget(settings, resume)


def keep_layers(
    resolved: Resolved[TrainSettings],
    load_plan: LoadPlan,
    rows: TrainingData,
    outlook: Outlook | None,
    estimator: Estimator,
    reporter: Reporter,
    *,
    force: bool,
) -> KeptLayers | None:
    """Return the layers to keep unquantized; None if nothing is quantized, or nothing is left for them.

    Raises:
        OutOfMemoryError: the run itself exceeds the budget on a CPU, without `force`; on a GPU, its plan knows.
        ModelError: the base is stored quantized, the named model is an adapter, or the budget suffices for all layers,
            and the method was not planned: a plan for them all would have been taken.
        OutOfMemoryError: the comparison takes more memory than there is.
        DataError: there is one row alone.
    """
    if load_plan.layout.prequantized is None and not load_plan.layout.is_quantized:
        return None  # as `--quant auto` chose
    check_comparable(load_plan, BUDGET)
    settings, is_method_planned = resolved.settings, resolved.origin_of(METHOD) == PLANNED
    longest = longest_row(settings, rows)
    planned = planned_memory(settings, load_plan, outlook, estimator, longest_row=longest)
    budget, extra = settings.training.memory_budget, load_plan.layout.extra_bytes
    assert budget is not None, "checked by the caller"
    try:
        spare = planned.spare_bytes
    except QloraError as error:
        message = f"nothing is spent on layers in 16 bit, since memory can't be predicted: {error}"
        reporter.report(Noted(level="warning", message=message))
        return None
    if outlook is None and not force:
        _check_within(budget, planned, load_plan)
    of_all = f"all {counted(len(extra), 'quantized layer')} would take {format_bytes(sum(extra.values()))} more"
    if spare >= sum(extra.values()) and is_method_planned:
        spare = sum(extra.values()) - 1  # the run takes a little more in 16 bit than the weights alone
    if spare >= sum(extra.values()):
        raise ModelError(
            f"{format_bytes(budget)} suffice for every layer unquantized: {format_bytes(spare)} are left; {of_all}",
            hint="Leave it out, and use --quant none.",
            setting=BUDGET,
        )
    left = f"of {format_bytes(budget)}, {format_bytes(spare)} are left for layers in 16 bit; {of_all}"
    if spare < min(extra.values()):
        reporter.report(Noted(level="warning", message=f"{left}: none stays"))
        return None
    cost = f"reads the weights three times and computes {counted(2 * NUM_TOKENS, 'token')} of the rows in both"
    reporter.report(
        Noted(message=f"{left}. To choose them, the model is compared with itself unquantized, which {cost}")
    )
    try:
        return _measured(settings, load_plan, rows, planned, spare, reporter)
    except Exception as error:
        if isinstance(error, QloraError) or not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(
            f"comparing {load_plan.source.base_name} with itself unquantized took more memory than there is",
            hint="Free some, or choose the layers on a larger device: "
            "qlora load MODEL --error-on DATA --memory-budget SIZE --save DIR",
            setting=BUDGET,
        ) from error


def _check_within(budget: int, planned: PlannedMemory, load_plan: LoadPlan) -> None:
    if headroom_bytes(planned.estimate, planned.device) < 0:
        taken = planned.estimate.predicted.process_high_bytes
        raise OutOfMemoryError(
            f"training {load_plan.source.base_name} takes up to {format_bytes(taken)} on this machine's CPU, "
            f"libraries included, and the budget is {format_bytes(budget)}",
            hint="Raise it, or lower --max-length or --micro-batch-size. --force tries nevertheless.",
            setting=BUDGET,
        )


def _measured(
    settings: TrainSettings,
    load_plan: LoadPlan,
    rows: TrainingData,
    planned: PlannedMemory,
    spare: int,
    reporter: Reporter,
) -> KeptLayers | None:
    """Return the layers that are chosen on one half of some rows, with what they gain on the other half."""
    chosen_from = chosen_rows(rows.train, settings.data.dataset, 2 * NUM_TOKENS)
    check_halves(chosen_from, BUDGET)
    chosen_by, judged_by = predict_on_rows(load_plan, chosen_from, reporter).halves()
    loaded = load_planned(load_plan, reporter)
    reporter.report(PhaseStarted(title="Measuring what each layer costs"))
    before = measure_prediction_error(loaded, judged_by).mean_kl
    _, parts = parts_of_divergence(loaded, load_plan, chosen_by)
    already = settings.quantization.skip_modules or ()
    chosen = that_fit(parts, spare, lambda names: planned.lacking_bytes([*already, *names]))
    if not chosen:
        reporter.report(Noted(level="warning", message="no layer in 16 bit is predicted to fit: none stays"))
        return None
    kept = with_layers(loaded, load_plan, chosen_by, [part.name for part in chosen])
    result = KeptLayers(
        budget_bytes=settings.training.memory_budget or 0,
        spare_bytes=spare,
        extra_bytes=sum(part.extra_bytes for part in chosen),
        num_layers=len(parts),
        modules=tuple(part.name for part in chosen),
        mean_kl_quantized=before,
        mean_kl=measure_prediction_error(kept, judged_by).mean_kl,
        num_tokens=int(judged_by.mask.sum()),
    )
    reporter.report(Noted(message=result.sentence))
    del loaded, kept  # it is loaded again, as it is trained on
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return result


def that_fit(parts: Sequence[LayerPart], spare: int, lacking_bytes: Callable[[Sequence[str]], int]) -> list[LayerPart]:
    """Return the layers with the largest parts for their bytes with which the planned run is predicted to fit.

    The allocator takes more than the bytes of the weights: at first as many bytes less are tried as the run then
    lacks, and then halves of what is known to fit and what is not.
    """
    fitting: list[LayerPart] = []
    least, most, tried = 0, spare, spare
    for number in range(MAX_CHOICES):
        chosen = choose(parts, tried)
        lacking = lacking_bytes([part.name for part in chosen]) if chosen else 0
        if lacking:
            most = sum(part.extra_bytes for part in chosen)
        else:
            fitting, least = chosen, tried
            if number < 2:  # of what is left, too little to look for
                break
        tried = most - lacking if number == 0 and lacking < most else (least + most) // 2
    return fitting
