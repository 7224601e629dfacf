"""Predict a run's memory on its GPU, by the code of `qlora inspect-memory`, before its weights are read."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

from qlora_cli.errors import ModelError, OutOfMemoryError, QloraError
from qlora_cli.events import Noted, Reporter
from qlora_cli.loading.load_plan import LoadPlan
from qlora_cli.memory.assumptions import untraced
from qlora_cli.memory.estimator import Estimator
from qlora_cli.memory.fitting.plan import (
    PlannedRun,
    describe,
    full_name_of,
    is_open,
    name_of,
    plan_run,
    planning,
)
from qlora_cli.memory.fitting.suggestions import NO, YES, judge_fit, suggest
from qlora_cli.memory.gpus import Gpu, find_gpu
from qlora_cli.memory.model_facts import ModelFacts
from qlora_cli.memory.prediction import COMPONENTS, Components, Estimate
from qlora_cli.memory.request import Predict
from qlora_cli.memory.run_batches import StepRows
from qlora_cli.model_files.adapter_files import read_outline
from qlora_cli.model_files.checkpoint import read_json
from qlora_cli.model_files.given_model import CONFIG
from qlora_cli.runs.run_result import PredictedMemory
from qlora_cli.settings.models import EstimateDataSettings, EstimateSettings, TrainSettings
from qlora_cli.units import format_bytes

Value = TypeVar("Value")


def current_gpu(load_plan: LoadPlan) -> Gpu | None:
    """Return the GPU of a run with its current free memory; None for a run on the CPU."""
    if load_plan.device.type != "cuda":
        return None
    gpu = find_gpu("auto")
    # Free memory excludes our own CUDA context, which exists by now.
    return replace(gpu, total_bytes=min(gpu.total_bytes, load_plan.free_bytes + gpu.context_bytes))


@dataclass(frozen=True, kw_only=True)
class EarlierPlan:
    """What was planned for a run that is resumed: the `values` by `section.key`, and whether it ran out of memory."""

    values: Mapping[str, object]
    ran_out: bool


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """The predicted memory of a run on its GPU, and how to reduce it.

    `estimate_of` predicts other settings; `asked` are those of the run. `planned` is what was chosen for it, if the
    settings left something open.
    """

    predicted: PredictedMemory
    estimate: Estimate
    asked: EstimateSettings
    gpu: Gpu
    estimate_of: Predict
    planned: PlannedRun | None = None

    def leaner(self) -> "Outlook | None":
        """Return the outlook of the run with the plan that takes less memory than this one; None without one."""
        planned = None if self.planned is None else self.planned.next_leaner()
        if planned is None:
            return None
        chosen = planned.chosen
        return replace(
            self,
            predicted=_as_predicted(chosen.estimate, chosen.fits),
            estimate=chosen.estimate,
            asked=chosen.settings,
            planned=planned,
        )

    @property
    def checkpointing(self) -> str:
        """The kind of checkpointing in words."""
        return self.estimate.gradient_checkpointing if self.planned is None else name_of(self.planned.plan.chosen)

    @property
    def plan_name(self) -> str:
        """What is planned, in words."""
        return self.checkpointing if self.planned is None else full_name_of(self.planned.plan.chosen)

    def suggestions(self) -> str:
        """Return the changes of flags that are predicted to fit, with their memory; empty if there are none."""
        suggested = suggest(self.asked, self.gpu, self.estimate_of, self.estimate)
        return "; ".join(f"{one.flags} ({format_bytes(one.process_bytes)})" for one in suggested if one.fits != NO)


def check_memory(
    settings: TrainSettings,
    load_plan: LoadPlan,
    gpu: Gpu,
    reporter: Reporter,
    *,
    longest_row_tokens: int,
    force: bool,
    estimator: Estimator | None = None,
    earlier: EarlierPlan | None = None,
    step_rows: StepRows | None = None,
) -> Outlook | None:
    """Predict the memory on `gpu` of a run whose longest row has `longest_row_tokens`; None if that is impossible.

    What the settings leave open is planned, and how `step_rows` are divided into micro-batches; a run that is resumed
    stays with its `earlier` plan, if it still fits. `estimator` is one that has predicted runs of the model already.

    Raises:
        OutOfMemoryError: it does not fit, without `force`; names changes that would.
    """
    asked = as_asked(settings, load_plan, longest_row_tokens)
    estimator = estimator or estimator_of(settings, load_plan)
    predict, find_products = contained(estimator.estimate), contained(estimator.recomputed_products)
    planned = None
    try:
        if is_open(asked) or step_rows is not None:
            planned = plan_run(asked, gpu, predict, find_products, step_rows)
            if earlier is not None:
                planned = planned.resumed(earlier.values, ran_out=earlier.ran_out)
            asked, estimate = planned.chosen.settings, planned.chosen.estimate
        else:
            estimate = predict(asked, gpu)
    except QloraError as error:
        reporter.report(Noted(level="warning", message=f"its memory can't be predicted: {error}"))
        return None
    for sentence in untraced(settings.training, settings.model.attention):
        reporter.report(Noted(message=f"predicted memory: {sentence}"))
    if planned is not None:
        reason = ", since the run ran out of memory" if earlier is not None and earlier.ran_out else ""
        reporter.report(Noted(message=f"planned: {describe(planned.plan)}{reason}"))
    outlook = Outlook(
        predicted=_as_predicted(estimate, judge_fit(estimate, gpu).fits),
        estimate=estimate,
        asked=asked,
        gpu=gpu,
        estimate_of=planning(predict, find_products),
        planned=planned,
    )
    _judge(outlook, settings, reporter, force=force)
    return outlook


def estimator_of(settings: TrainSettings, load_plan: LoadPlan) -> Estimator:
    """Return the estimator for the run's model."""
    source = load_plan.source
    facts = ModelFacts(
        name=settings.model.name,
        content=read_json(source.path / CONFIG),
        path=source.path,
        adapter=None if source.adapter is None else read_outline(source.adapter),
    )
    evaluates = settings.data.eval_dataset is not None or settings.data.eval_split is not None
    return Estimator(facts, evaluates=evaluates, on_host=load_plan.device.type == "cpu")


def _judge(outlook: Outlook, settings: TrainSettings, reporter: Reporter, *, force: bool) -> None:
    """Report a run that may not fit, and what would; refuse it if it can't, without `force`."""
    fit = judge_fit(outlook.estimate, outlook.gpu)
    if fit.fits == YES:
        return
    suggestions = outlook.suggestions()
    what = (
        f"training {settings.model.name} takes {format_bytes(fit.process_bytes)} (at most "
        f"{format_bytes(fit.process_high_bytes)}) on {fit.gpu}, and {format_bytes(fit.usable_bytes)} are usable"
    )
    if fit.fits == NO and not force and not settings.training.auto_micro_batch:
        larger = "larger GPUs, or more of them" if settings.training.shards_base else "a larger GPU"
        none = f"No change of flags makes it fit: use {larger}."
        hint = f"It would fit with {suggestions}." if suggestions else none
        raise OutOfMemoryError(what, hint=f"{hint} --force tries nevertheless.")
    more = f"; more headroom with {suggestions}" if suggestions else ""
    verdict = "it is predicted not to fit" if fit.fits == NO else "memory is tight"
    reporter.report(Noted(level="warning", message=f"{verdict}: {what}{more}"))


def contained(predict: Callable[[EstimateSettings, Gpu], Value]) -> Callable[[EstimateSettings, Gpu], Value]:
    """Return `predict` with every failure of it as a `ModelError`: a prediction that fails must not end a run."""

    def contained(settings: EstimateSettings, gpu: Gpu) -> Value:
        try:
            return predict(settings, gpu)
        except QloraError:
            raise
        except Exception as error:  # whatever the model's code or a library raises
            raise ModelError(
                f"{type(error).__name__}: {error}", hint="This is a bug in the prediction; please report it."
            ) from error

    return contained


def as_asked(settings: TrainSettings, load_plan: LoadPlan, longest_row_tokens: int) -> EstimateSettings:
    """Return the settings of the run for the estimator, with the length of the longest row."""
    return EstimateSettings(
        model=load_plan.settings.model,
        quantization=load_plan.settings.quantization,
        lora=settings.lora,
        data=EstimateDataSettings(max_length=max(8, longest_row_tokens), packing=settings.data.packing),
        training=settings.training,
    )


def _as_predicted(estimate: Estimate, fits: str) -> PredictedMemory:
    """Return the figures to compare with measurements, whose peaks count from after loading."""
    training = [phase.allocated_bytes for phase in estimate.phases if phase.name != "load"]
    return PredictedMemory(
        gpu=estimate.gpu,
        allocated_bytes=max(training),
        reserved_bytes=estimate.predicted.reserved_bytes,
        process_bytes=estimate.predicted.process_bytes,
        fits=fits,
        consumers=_consumers(estimate.components),
    )


def _consumers(components: Components) -> dict[str, int]:
    """Return the bytes of each component at the peak, the largest first."""
    sizes = {name: getattr(components, f"{name}_bytes") for name in COMPONENTS}
    return {name: size for name, size in sorted(sizes.items(), key=lambda item: -item[1]) if size}
