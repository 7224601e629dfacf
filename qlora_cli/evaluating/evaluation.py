"""Evaluate base and adapter from one loaded model, then the merged model, on the same tokens."""

import gc
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from peft import PeftModel

from qlora_cli.adapters.initialization import base_change
from qlora_cli.data.feeding.prepare import PreparedData
from qlora_cli.errors import DataError, ModelError
from qlora_cli.evaluating.answer_losses import ComparedBy, figures_of
from qlora_cli.evaluating.compared_rows import ComparedRows, MeasuredAnswers
from qlora_cli.evaluating.evaluation_checks import check_evaluation
from qlora_cli.evaluating.evaluation_plan import plan_evaluation
from qlora_cli.evaluating.evaluation_result import (
    EvaluatedAnswers,
    Evaluation,
    Kind,
    PreferenceResult,
    QuantizationCost,
    SourceResult,
    TaskResult,
)
from qlora_cli.evaluating.losses import MeasuredRows, RowLosses, measure_losses
from qlora_cli.evaluating.merged_model import Merged, find_merged
from qlora_cli.evaluating.quantization_cost import (
    QuantizedModel,
    note_on_initialization,
    plan_unquantized,
    quantization_cost,
)
from qlora_cli.evaluating.rows import HeldOutRows
from qlora_cli.evaluating.statistics import summarize, summarize_preference
from qlora_cli.evaluating.tasks import Tasks, find_tasks
from qlora_cli.events import Noted, PhaseStarted, Reporter
from qlora_cli.hardware.cudnn import without_cudnn_attention
from qlora_cli.loading.load_plan import LoadPlan
from qlora_cli.loading.loader import LoadedModel, load_planned
from qlora_cli.settings.models import EvaluateSettings, EvaluationSettings
from qlora_cli.settings.resolve import Resolved
from qlora_cli.units import counted

TITLES: dict[Kind, str] = {
    "model": "the model",
    "base": "the base",
    "adapter": "the adapter",
    "unquantized": "the model unquantized",
    "merged": "the merged model",
}
COMPARED: tuple[Kind, ...] = ("model", "adapter", "unquantized")  # as quantized, and as it was before


@without_cudnn_attention()
def evaluate(resolved: Resolved[EvaluateSettings], reporter: Reporter) -> Evaluation:
    """Measure loss and perplexity of a model, its base, and others that were asked for, and run the tasks on each.

    Raises:
        QloraError: of the type of the problem.
    """
    check_evaluation(resolved)
    request = resolved.settings.evaluate
    if request.tasks:
        reporter.report(PhaseStarted(title="Finding the tasks"))
    tasks = find_tasks(request)
    plan = plan_evaluation(resolved, reporter)
    load_plan = plan.load_plan
    base_note = _check_base(request, load_plan, reporter)
    unquantized = plan_unquantized(load_plan, plan.outline, reporter) if request.with_unquantized else None
    merged = find_merged(request, load_plan, reporter)
    needs_rows = not request.tasks or request.with_unquantized
    rows = plan.read_rows(reporter) if plan.has_rows or needs_rows else None
    if merged is not None and rows is not None:
        merged.check_rows(rows)
    compared = None if rows is None else plan.compared(rows)
    has_base = base_note is None and (request.with_base is not False or compared is not None)
    num_known = load_plan.num_own_rows if has_base and load_plan.adapter is not None else None
    by = ComparedBy.of_settings(plan.settled.training)
    benchmark = _Benchmark(
        request=request,
        rows=rows,
        compared=compared,
        by=by,
        tasks=tasks,
        reporter=reporter,
        num_known=num_known,
        keeps_states=unquantized is not None,
    )
    if unquantized is not None and (init_note := note_on_initialization(load_plan)) is not None:
        benchmark.note(init_note)
    _evaluate_first(benchmark, load_plan, has_merged=merged is not None, has_base=has_base)
    gc.collect()
    torch.cuda.empty_cache()
    if unquantized is not None:
        _evaluate_unquantized(benchmark, unquantized)
        gc.collect()
        torch.cuda.empty_cache()
    if merged is not None:
        _evaluate_merged(benchmark, merged)
    return Evaluation(
        model=load_plan.source.name,
        base_model=load_plan.source.base_name,
        adapter=load_plan.source.adapter,
        adapter_step=load_plan.source.adapter_step,
        run_is_done=load_plan.source.run_is_done,
        merged=merged.path if merged is not None else None,
        device=str(load_plan.device),
        compute_dtype=load_plan.dtype.name.value,
        dataset=rows.data.report.name if rows is not None else None,
        fingerprint=rows.data.report.fingerprint if rows is not None else None,
        is_training_data=rows is not None and rows.is_training_data,
        sources=tuple(benchmark.sources),
        compared_answers=None if compared is None else _evaluated_answers(compared, by),
        quantization_cost=benchmark.quantization_cost,
        tasks=tuple(benchmark.figures),
        notes=(*((base_note,) if base_note else ()), *(rows.notes if rows is not None else ()), *benchmark.notes),
    )


def _evaluated_answers(compared: ComparedRows, by: ComparedBy) -> EvaluatedAnswers:
    return EvaluatedAnswers(
        rows="pairs" if compared.has_pairs else "labels",
        num_rows=len(compared.data.selected),
        objective=by.objective.value,
        beta=by.beta,
    )


def _check_base(request: EvaluationSettings, load_plan: LoadPlan, reporter: Reporter) -> str | None:
    """Return the note that the base is not evaluated; None if the model with its adapter disabled is its base."""
    if request.with_base is not None and load_plan.source.adapter is None:
        message = f"has no effect: {load_plan.source.name} has no adapter"
        raise ModelError(message, hint="Leave it out.", setting="evaluate.with_base")
    reason = base_change(load_plan.adapter.lora) if load_plan.adapter is not None else None
    if reason is None or request.with_base is False:
        return None
    if request.with_base:
        raise ModelError(
            f"the base of {load_plan.source.name} can't be shown: {reason}",
            hint=f"Leave --base out, and evaluate the base by itself: qlora evaluate {load_plan.source.base_name}",
            setting="evaluate.with_base",
        )
    note = f"the base is left out: {reason}; evaluate it by itself: qlora evaluate {load_plan.source.base_name}"
    reporter.report(Noted(level="warning", message=note))
    return note


@dataclass(kw_only=True)
class _Benchmark:
    """The measurements for each model, and the results so far. `base` is what others are compared with.

    Only tokens with ids below `num_known` are counted, if the base has fewer than the adapter. With `keeps_states`,
    hidden states are kept, so that the requested model, in `quantized`, is compared with it unquantized. The
    answers of `compared` rows are compared by `by`, with those by the base, `reference`.
    """

    request: EvaluationSettings
    rows: HeldOutRows | None
    compared: ComparedRows | None
    by: ComparedBy
    tasks: Tasks | None
    reporter: Reporter
    num_known: int | None
    keeps_states: bool
    quantized: QuantizedModel | None = None
    quantization_cost: QuantizationCost | None = None
    base: RowLosses | None = None
    reference: MeasuredAnswers | None = None
    notes: list[str] = field(default_factory=list)
    sources: list[SourceResult] = field(default_factory=list)
    figures: list[TaskResult] = field(default_factory=list)

    def measure(self, kind: Kind, path: str, loaded: LoadedModel) -> None:
        """Evaluate a model in its current state: its adapter may be disabled."""
        if self.rows is not None:
            self._measure_rows(kind, path, loaded, self.rows.data)
        if self.tasks is not None and (kind != "base" or self.request.with_base is not False):
            title = f"{', '.join(self.tasks.names)} on {TITLES[kind]}"
            self.reporter.report(PhaseStarted(title=f"Evaluating {title}"))
            self.figures += self.tasks.run(
                kind,
                loaded.model,
                loaded.tokenizer,
                dtype=loaded.dtype.torch_dtype,
                title=title,
                reporter=self.reporter,
            )

    def _measure_rows(self, kind: Kind, path: str, loaded: LoadedModel, data: PreparedData) -> None:
        self.reporter.report(PhaseStarted(title=f"Evaluating {TITLES[kind]}"))
        measured, preference = None, None
        if self.compared is None:
            losses = self._losses(kind, loaded, data)
        else:
            measured = self.compared.measure(partial(self._losses, kind, loaded))
            losses = measured.answers
        if kind == "base" and losses.num_left_out:
            self._note_skipped_tokens(losses)
        if bad := int((~np.isfinite(losses.nll)).sum()):
            message = f"the loss of {TITLES[kind]} is not finite in {counted(bad, 'row')}"
            self.reporter.report(Noted(level="warning", message=f"{message}; is it in another --dtype?"))
        quantization = loaded.settings.quantization.method.value
        shown = losses
        if self.compared is not None and measured is not None:
            shown, preference = self.compared.chosen(losses), self._preference(kind, measured)
        if kind != "base" or self.request.with_base is not False:
            self.sources.append(summarize(kind, path, quantization, shown, self.base, preference))
        if kind == "base":
            self.reference = measured
            self.base = shown if self.request.with_base is not False else None
        if kind == "unquantized":
            assert self.quantized is not None, "measured before"
            self.quantization_cost = quantization_cost(self.quantized, losses, loaded)
            self.quantized = None  # its states are as many bytes as those of the other
        elif self.keeps_states and kind in COMPARED:
            self.quantized = QuantizedModel(source=kind, quantization=quantization, losses=losses)

    def _preference(self, kind: Kind, measured: MeasuredAnswers) -> PreferenceResult | None:
        """Return what a model makes of the answers, as compared with the base on which its adapter was trained."""
        assert self.compared is not None, "there is something to compare"
        reference = None if kind == "unquantized" else self.reference
        figures = figures_of(self.compared.losses(measured, reference), self.by)
        return None if figures is None else summarize_preference(figures)

    def _losses(self, kind: Kind, loaded: LoadedModel, rows: MeasuredRows) -> RowLosses:
        return measure_losses(
            loaded.model,
            rows,
            pad_token_id=loaded.tokenizer.pad_token_id,
            dtype=loaded.dtype.torch_dtype,
            batch_size=self.request.batch_size,
            num_known=self.num_known,
            keeps_states=self.keeps_states and kind in COMPARED,
            title=TITLES[kind],
            reporter=self.reporter,
        )

    def note(self, message: str) -> None:
        """Report a warning that belongs to the figures."""
        self.notes.append(message)
        self.reporter.report(Noted(level="warning", message=message))

    def _note_skipped_tokens(self, losses: RowLosses) -> None:
        new = f"{counted(losses.num_left_out, 'token')} to predict"
        if not losses.tokens.any():
            raise DataError(
                f"there is nothing to compare with the base: {new}, all of them new, which the base does not have",
                hint="Use --no-base, or other rows.",
            )
        self.note(f"{new} that the base does not have: left out of every loss; --no-base counts them")


def _evaluate_first(benchmark: _Benchmark, load_plan: LoadPlan, *, has_merged: bool, has_base: bool) -> None:
    """Load the named model and evaluate it, with and without its adapter; it is not kept in memory."""
    loaded = load_planned(load_plan, benchmark.reporter)
    for kind, path, state in _states(loaded, has_merged=has_merged, has_base=has_base):
        with state:
            benchmark.measure(kind, path, loaded)


def _states(
    loaded: LoadedModel, *, has_merged: bool, has_base: bool
) -> Iterator[tuple[Kind, str, AbstractContextManager[None]]]:
    """Yield what to evaluate the loaded model as, with the context that puts it into that state."""
    source, model = loaded.source, loaded.model
    if not isinstance(model, PeftModel):
        yield "base" if has_merged else "model", source.name, nullcontext()
        return
    if has_base:
        yield "base", source.base_name, model.disable_adapter()
    yield "adapter", str(source.adapter), nullcontext()


def _evaluate_unquantized(benchmark: _Benchmark, load_plan: LoadPlan) -> None:
    loaded, source = load_planned(load_plan, benchmark.reporter), load_plan.source
    benchmark.measure("unquantized", source.name if source.adapter is None else str(source.adapter), loaded)


def _evaluate_merged(benchmark: _Benchmark, merged: Merged) -> None:
    loaded = load_planned(merged.load_plan, benchmark.reporter)
    benchmark.measure("merged", str(merged.path), loaded)
