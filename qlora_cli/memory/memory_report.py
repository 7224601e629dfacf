"""Make the report of `qlora inspect-memory`: predict, judge, solve, suggest. Only a new prediction imports torch."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from qlora_cli.alongside import alongside
from qlora_cli.errors import HardwareError, ModelError
from qlora_cli.events import PhaseStarted, Reporter
from qlora_cli.garbage import gc_disabled
from qlora_cli.memory import prediction_cache
from qlora_cli.memory.assumptions import assumptions
from qlora_cli.memory.catalogue import CatalogueModel
from qlora_cli.memory.costs.host_memory import with_host
from qlora_cli.memory.costs.run_files import has_weights
from qlora_cli.memory.costs.run_time import with_run
from qlora_cli.memory.costs.step_time import rates_on
from qlora_cli.memory.fitting.alternatives import (
    SLOW_TO_PREDICT,
    larger_model,
    largest_model,
    smallest_classes,
    smallest_gpu,
    unquantized_run,
)
from qlora_cli.memory.fitting.card_ranking import PlannedOnCard, rank_cards
from qlora_cli.memory.fitting.division import changes_results, is_given
from qlora_cli.memory.fitting.method_choice import MethodChoice, choose_method
from qlora_cli.memory.fitting.plan import PlannedRun, PlanOn, best_option, is_open, plan_run, planning
from qlora_cli.memory.fitting.solver import solve, spare_bytes, sweep
from qlora_cli.memory.fitting.strategy import NUM_GPUS, on_more_gpus, with_strategy
from qlora_cli.memory.fitting.suggestions import NO, YES, judge_fit, suggest
from qlora_cli.memory.gpus import GPUS, Gpu, find_gpu
from qlora_cli.memory.host_run import as_host_memory, host_assumptions, on_cpu
from qlora_cli.memory.model_facts import ModelFacts, facts_of_catalogue, find_model_facts
from qlora_cli.memory.prediction import (
    Estimate,
    GpuFit,
    HostMemory,
    MemoryReport,
    PlanOption,
    RankedCard,
    RunFigures,
    Sharding,
    Solution,
    figures_of_run,
)
from qlora_cli.memory.report_parts import FittingModel, LargerModel, SpareMemory
from qlora_cli.memory.request import MemoryRequest
from qlora_cli.memory.run_batches import FedRows, RunBatches, StepRows, average_step, run_batches, with_longest
from qlora_cli.settings.choices import Solvable, Strategy
from qlora_cli.settings.display import display_flags
from qlora_cli.settings.models import EstimateSettings
from qlora_cli.settings.open_method import METHOD, is_method_open, with_provisional_method
from qlora_cli.settings.settle import with_settings
from qlora_cli.timing.links import gather_seconds

if TYPE_CHECKING:
    from qlora_cli.memory.estimator import Estimator
    from qlora_cli.memory.tracing.shards import ShardedBase

MAX_LENGTH = Solvable.MAX_LENGTH.value
MOST_TOKENS = 8192  # of rows that are looked for unasked: longer ones take seconds each to predict
REFERENCE = "RTX 4090"  # gives kernels and CUDA context if no GPU is named


def inspect_memory(request: MemoryRequest, reporter: Reporter) -> MemoryReport:
    """Return the memory of a run, and whether it fits.

    Raises:
        ModelNotFoundError: no such model.
        ModelError: the model can't be read, or can't be trained with these settings.
        HardwareError: a GPU that was named can't compute with them.
    """
    start = time.monotonic()
    facts = find_model_facts(request.asked, reporter)
    _check_rank_may_vary(request, facts)
    key = prediction_cache.key_of(request, facts.description)
    cached = prediction_cache.load(key)
    if cached is not None:
        return _here(replace(cached, model=facts.name, estimate_seconds=time.monotonic() - start), facts)
    reporter.report(PhaseStarted(title=f"Predicting the memory of {facts.name}"))
    # Garbage collection would take a second, since it traverses all imported modules repeatedly.
    with gc_disabled():
        report = _predict(request, facts)
    report = replace(report, estimate_seconds=time.monotonic() - start)
    prediction_cache.store(key, report)
    return _here(report, facts)


def _here(report: MemoryReport, facts: ModelFacts) -> MemoryReport:
    """Return the report with nothing to download if the weights are on this disk, which no cached one knows."""
    if not any(map(has_weights, facts.weight_directories)):
        return report
    return replace(report, predicted=replace(report.predicted, download_bytes=0))


def _check_rank_may_vary(request: MemoryRequest, facts: ModelFacts) -> None:
    if facts.adapter is not None and "rank" in (*request.solve, *request.sweep):
        raise ModelError(
            f"the rank of {facts.adapter.directory} is {facts.adapter.config.r}, which training does not change",
            hint="Name the base model to ask about another rank.",
        )


def estimator_for(request: MemoryRequest, facts: ModelFacts) -> "Estimator":
    """Return the estimator for a request; imports torch."""
    from qlora_cli.memory.estimator import Estimator

    return Estimator(
        facts,
        backend=request.prediction.sdpa_backend,
        evaluates=request.prediction.evaluate,
        on_host=request.is_on_host,
        link=request.prediction.link,
    )


def _predict(request: MemoryRequest, facts: ModelFacts) -> MemoryReport:
    estimator = estimator_for(request, facts)
    gpu = request.gpus[0] if request.gpus else find_gpu(REFERENCE)
    opened = estimator.settled(with_provisional_method(request.asked))
    max_checkpoints = opened.settings.output.max_checkpoints
    asked = with_longest(opened.settings, request.rows)
    if request.is_on_host:
        asked = on_cpu(asked)
    choice = _choose_method(asked, request, estimator) if is_method_open(opened) and not request.is_on_host else None
    if choice is not None:
        asked = with_settings(asked, {METHOD: choice.method})
    if request.gpus and not request.is_on_host:
        asked = with_strategy(asked, gpu, _planning_on(asked, request, estimator))
    with alongside(lambda: _unquantized(request, asked, gpu, estimator)) as unquantized:
        return _report(request, facts, asked, gpu, estimator, choice, max_checkpoints, unquantized)


def _report(
    request: MemoryRequest,
    facts: ModelFacts,
    asked: EstimateSettings,
    gpu: Gpu,
    estimator: "Estimator",
    choice: MethodChoice | None,
    max_checkpoints: int,
    unquantized: Callable[[], PlanOption | None],
) -> MemoryReport:
    """Return the report on the run with the settings `asked`, which leave open what is planned."""
    plans = _plans(asked, request, estimator)
    settings: EstimateSettings = plans[0].chosen.settings if plans else asked
    estimate = estimator.estimate(settings, gpu)
    dtype = estimator.dtype_on(settings, gpu)
    shapes = estimator.shapes(settings, dtype)
    traced = estimator.traced(settings, gpu)
    fits, incapable = _on_gpus(request, plans, asked, estimator) if request.gpus else _over_catalogue(asked, estimator)
    misses = request.gpus and fits[0].fits != YES
    predict_planned = planning(estimator.estimate, estimator.recomputed_products)
    suggestions = suggest(settings, gpu, predict_planned, estimate) if misses else ()
    is_hopeless = misses and fits[0].fits == NO and all(suggestion.fits == NO for suggestion in suggestions)
    smallest, roomy = (None, None) if request.is_on_host else smallest_classes(asked, estimator.estimate)
    num_parameters = estimator.layout(settings, dtype).inventory.num_parameters
    fed = request.rows.feed(settings.training) if request.rows else None
    host = estimator.host_memory(settings, gpu, num_rows=_num_rows(request))
    return MemoryReport(
        model=facts.name,
        architecture=type(shapes).__name__,
        num_parameters=num_parameters,
        num_trainable_parameters=traced.num_trained,
        settings=_shown_settings(settings, estimate),
        data=fed.summary if fed else None,
        gpu=gpu.name,
        dtype=estimate.dtype,
        attention_backends=estimate.attention_backends,
        predicted=replace(
            _figures(request, settings, gpu, estimator, fed, host),
            disk_bytes=traced.files.disk_bytes(
                max_checkpoints=max_checkpoints, keeps_best=settings.training.eval_steps is not None
            ),
            download_bytes=estimator.weights_bytes(settings, dtype),
        ),
        components=estimate.components,
        phases=estimate.phases,
        ruling_phase=estimate.ruling_phase,
        reason=estimate.reason,
        paged_bytes=estimate.paged_bytes,
        pinned_host_bytes=estimate.pinned_host_bytes,
        host=host,
        sharding=_sharding(request, gpu, traced.sharded, estimator.num_micro_batches(settings)),
        plan=plans[0].plan if plans else None,
        methods=None if choice is None else choice.options,
        unquantized=unquantized(),
        spare=_spare(request, facts, settings, gpu, estimator),
        fits=fits,
        smallest_gpu=None if request.is_on_host else smallest_gpu(asked, estimator.estimate),
        smallest_class=smallest,
        roomy_class=roomy,
        suggestions=suggestions,
        longer_rows=_longer_rows(request, facts, asked, estimator) if request.gpus and fits[0].fits == YES else None,
        larger_model=_larger_model(request, facts, num_parameters) if request.gpus and fits[0].fits == YES else None,
        fitting_model=_largest_model(request, facts, asked, gpu, estimator) if is_hopeless else None,
        solutions=_solutions(request, asked, estimator),
        cards=_cards(request, asked, estimator),
        sweep=sweep(request.swept(asked), asked, gpu, estimator.estimate) if request.sweep else (),
        assumptions=(
            *facts.notes,
            *traced.notes,
            *assumptions(request, asked, gpu, incapable, max_checkpoints),
            *(host_assumptions(gpu, is_timed=estimate.time is not None) if request.is_on_host else ()),
        ),
        estimate_seconds=0.0,
    )


def _on_gpus(
    request: MemoryRequest, plans: list[PlannedRun], asked: EstimateSettings, estimator: "Estimator"
) -> tuple[tuple[GpuFit, ...], tuple[str, ...]]:
    """Return how the run, planned or as asked, fits each of the requested GPUs, none of which is incapable."""
    estimates = [planned.chosen.estimate for planned in plans] or [
        estimator.estimate(asked, gpu) for gpu in request.gpus
    ]
    return tuple(judge_fit(estimate, gpu) for estimate, gpu in zip(estimates, request.gpus, strict=True)), ()


def _figures(
    request: MemoryRequest,
    settings: EstimateSettings,
    gpu: Gpu,
    estimator: "Estimator",
    fed: FedRows | None,
    host: HostMemory,
) -> RunFigures:
    """Return the peaks of the run, on the GPU and the host, and, if its rows are known, its time."""
    figures = with_run(
        figures_of_run(estimator.estimate(settings, gpu)),
        settings,
        fed.batches if fed else run_batches(settings, request.prediction),
        gpu,
        estimator.estimate,
        price=request.prices.get(gpu.name, request.prediction.price),
    )
    return as_host_memory(figures) if request.is_on_host else with_host(figures, host)


def _sharding(request: MemoryRequest, gpu: Gpu, sharded: "ShardedBase | None", number: int) -> Sharding | None:
    """Return what `number` micro-batches of a step send; None without a sharded base."""
    if sharded is None:
        return None
    link, known, copied_bytes = request.prediction.link, rates_on(gpu), number * sharded.copied_bytes
    return Sharding(
        num_gpus=sharded.num_processes,
        shard_bytes=sharded.shard_bytes,
        received_bytes_per_step=number * sharded.received_bytes,
        link=link.value,
        receiving_seconds=gather_seconds(number * sharded.received_bytes, link),
        copied_bytes_per_step=copied_bytes,
        copying_seconds=None if known is None else copied_bytes / known.rates.host_copy_bytes,
    )


def _num_rows(request: MemoryRequest) -> int:
    return request.rows.num_rows if request.rows else request.prediction.rows or 0


def _unquantized(
    request: MemoryRequest, asked: EstimateSettings, gpu: Gpu, estimator: "Estimator"
) -> PlanOption | None:
    """Return the run with its base in 16 bit, if that fits on the first GPU, and nothing else was asked for."""
    if not request.gpus or request.is_on_host or request.asked.is_given(METHOD):
        return None
    num_parameters = estimator.layout(asked, estimator.dtype_on(asked, gpu)).inventory.num_parameters
    return unquantized_run(asked, gpu, num_parameters, _planning_on(asked, request, estimator))


def _plans(asked: EstimateSettings, request: MemoryRequest, estimator: "Estimator") -> list[PlannedRun]:
    """Return the plan for each GPU; none if the settings leave nothing open."""
    rows = _divisible_rows(asked, request, estimator) if request.gpus else None
    if request.is_on_host or (rows is None and not is_open(asked)):
        return []
    return [plan_run(asked, gpu, estimator.estimate, estimator.recomputed_products, rows) for gpu in request.gpus]


def _choose_method(asked: EstimateSettings, request: MemoryRequest, estimator: "Estimator") -> MethodChoice:
    """Return the least quantization that fits on the first GPU."""
    plan = _planning_on(asked, request, estimator)
    return choose_method(asked, request.gpus[0], plan, estimator.resident_bytes)


def _planning_on(asked: EstimateSettings, request: MemoryRequest, estimator: "Estimator") -> PlanOn:
    """Return what plans a run as `asked` but for how its base is stored."""
    rows = _divisible_rows(asked, request, estimator)

    def plan(settings: EstimateSettings, gpu: Gpu) -> PlanOption:
        return best_option(settings, gpu, estimator.estimate, estimator.recomputed_products, rows)

    return plan


def _divisible_rows(asked: EstimateSettings, request: MemoryRequest, estimator: "Estimator") -> StepRows | None:
    """Return the rows of a step, if they are known and `train` would plan how they are divided into micro-batches."""
    training = asked.training
    is_recorded = training.micro_batch_size > 1 or training.micro_batch_tokens is not None  # of a run
    if (
        is_given(request.asked)
        or is_recorded
        or changes_results(training, is_packed=asked.data.packing, balances_experts=estimator.balances_experts(asked))
    ):
        return None
    return request.rows.average_step(training) if request.rows else average_step(asked, request.prediction)


def _over_catalogue(settings: EstimateSettings, estimator: "Estimator") -> tuple[tuple[GpuFit, ...], tuple[str, ...]]:
    """Return the verdict for each GPU of the catalogue, and the names of those that can't run these settings."""
    fits: list[GpuFit] = []
    incapable: list[str] = []
    for gpu in GPUS:
        try:
            fits.append(judge_fit(estimator.estimate(settings, gpu), gpu))
        except HardwareError:  # bf16 before Ampere, for example
            incapable.append(gpu.name)
    return tuple(fits), tuple(incapable)


def _largest_model(
    request: MemoryRequest, facts: ModelFacts, settings: EstimateSettings, gpu: Gpu, estimator: "Estimator"
) -> FittingModel | None:
    """Return the largest model of the catalogue that fits instead; None for the adapter or the run of one model."""
    if facts.adapter is not None or facts.settings or gpu.is_host:
        return None

    def predict(model: CatalogueModel, gpu: Gpu) -> Estimate:
        other = estimator_for(request, facts_of_catalogue(model))
        return other.estimate(with_longest(other.settled(request.asked).settings, request.rows), gpu)

    estimate = estimator.estimate(settings, gpu)
    num_parameters = estimator.layout(settings, estimator.dtype_on(settings, gpu)).inventory.num_parameters
    return largest_model(settings, gpu, estimate, num_parameters, predict)


def _larger_model(request: MemoryRequest, facts: ModelFacts, num_parameters: int) -> LargerModel | None:
    """Return a larger model for the first GPU; None for the adapter or the run of one model, or several GPUs."""
    asked = request.asked.settings
    is_usual = asked.training.num_gpus == 1 and not asked.training.objective.compares
    if facts.adapter is not None or facts.settings or request.is_on_host or not is_usual:
        return None
    return larger_model(request.gpus[0], num_parameters, asked.data.max_length)


def _solutions(request: MemoryRequest, settings: EstimateSettings, estimator: "Estimator") -> tuple[Solution, ...]:
    return tuple(
        solve(setting, settings, gpu, estimator.estimate, most=_num_positions(settings, gpu, estimator))
        for setting in request.solve
        for gpu in request.gpus
    )


def _num_positions(settings: EstimateSettings, gpu: Gpu, estimator: "Estimator") -> int | None:
    from qlora_cli.tokenizing.positions import num_positions

    return num_positions(estimator.shapes(settings, estimator.dtype_on(settings, gpu)).config)


def _spare(
    request: MemoryRequest, facts: ModelFacts, settings: EstimateSettings, gpu: Gpu, estimator: "Estimator"
) -> SpareMemory | None:
    """Return what a memory budget leaves for layers in 16 bit; None where `train` can't choose them."""
    budget_bytes, dtype = request.asked.settings.training.memory_budget, estimator.dtype_on(settings, gpu)
    layout = estimator.layout(settings, dtype)
    is_loaded_so = layout.is_quantized and layout.prequantized is None and facts.adapter is None
    if budget_bytes is None or not is_loaded_so or settings.training.num_gpus > 1:
        return None
    estimate, extra = estimator.estimate(settings, gpu), layout.extra_bytes
    spare, extra_bytes = spare_bytes(estimate, gpu), sum(extra.values())
    return SpareMemory(
        budget_bytes=budget_bytes,
        spare_bytes=spare,
        process_bytes=estimate.predicted.process_bytes + min(spare, extra_bytes),
        num_layers=len(extra),
        extra_bytes=extra_bytes,
    )


def _longer_rows(
    request: MemoryRequest, facts: ModelFacts, settings: EstimateSettings, estimator: "Estimator"
) -> Solution | None:
    """Return the longest rows with which the run fits, which fits as it is; None if they are no longer than its own.

    They are not looked for where rows are known or joined, nor on a CPU, nor for a model that is slow to predict.
    """
    joins_rows = settings.data.packing or settings.training.micro_batch_tokens is not None
    is_known = request.rows is not None or joins_rows or MAX_LENGTH in request.solve or MAX_LENGTH in request.sweep
    if is_known or request.is_on_host or SLOW_TO_PREDICT in facts.content:
        return None
    gpu, length = request.gpus[0], settings.data.max_length
    positions = _num_positions(settings, gpu, estimator)
    most = MOST_TOKENS if positions is None else min(MOST_TOKENS, positions)
    if length >= most:
        return None
    longest = solve(MAX_LENGTH, settings, gpu, estimator.estimate, most=most, tries_most_first=True)
    if longest.value is None or longest.value <= length:
        return None
    is_open = longest.value == most and most != positions
    return replace(longest, limited_by=None) if is_open else longest


def _cards(request: MemoryRequest, asked: EstimateSettings, estimator: "Estimator") -> tuple[RankedCard, ...] | None:
    """Return the best cards for the run; None if they were not asked for."""
    order = request.card_order
    if order is None:
        return None

    def plan(run: EstimateSettings, gpu: Gpu) -> PlannedOnCard:
        plans = _plans(run, replace(request, gpus=(gpu,)), estimator)
        if plans:
            chosen = plans[0].chosen
            return PlannedOnCard(
                settings=chosen.settings, estimate=chosen.estimate, step_seconds=chosen.step_seconds or 0.0
            )
        estimate = estimator.estimate(run, gpu)
        assert estimate.time is not None, f"{gpu.name} has rates"
        return PlannedOnCard(settings=run, estimate=estimate, step_seconds=estimate.time.step_seconds)

    def batches_of(settings: EstimateSettings) -> RunBatches:
        fed = request.rows.feed(settings.training).batches if request.rows else None
        batches = fed or run_batches(settings, request.prediction)
        assert batches is not None, "checked with the flags"
        return batches

    strategy, is_number_open = request.asked.settings.training.strategy, not request.asked.is_given(NUM_GPUS)
    runs = tuple(on_more_gpus(asked, strategy=strategy, is_number_open=is_number_open))

    def rank(runs: Sequence[EstimateSettings]) -> tuple[RankedCard, ...]:
        return rank_cards(
            runs,
            request.ranked_gpus,
            order,
            request.prices,
            plan=plan,
            predict=estimator.estimate,
            least_bytes=estimator.resident_bytes,
            batches_of=batches_of,
        )

    # Of the whole catalogue, several cards are slow to predict, and never needed where one suffices.
    return rank(runs) if request.gpus or request.prices else rank(runs[:1]) or rank(runs)


def _shown_settings(settings: EstimateSettings, estimate: Estimate) -> dict[str, str]:
    """Return the settings that memory depends on, keyed by the flag's name without dashes."""
    lora = settings.lora
    targets = lora.target_modules or lora.target_parameters or ()
    tokens = settings.training.micro_batch_tokens
    return {
        **display_flags(settings.quantization),
        **({"objective": settings.training.objective.value} if settings.training.objective.compares else {}),
        "dtype": estimate.dtype,
        "rank": str(lora.rank),
        "target-modules": targets if isinstance(targets, str) else ",".join(targets),
        "micro-batch-size": str(settings.training.micro_batch_size),
        "gradient-accumulation-steps": str(settings.training.gradient_accumulation_steps),
        **({} if tokens is None else {"micro-batch-tokens": str(tokens)}),
        **({} if settings.training.num_gpus == 1 else {"num-gpus": str(settings.training.num_gpus)}),
        **({"strategy": Strategy.FSDP.value} if settings.training.shards_base else {}),
        **({"offload-base": "on"} if settings.training.offload_base else {}),
        "max-length": str(settings.data.max_length),
        "gradient-checkpointing": estimate.gradient_checkpointing,
        "attention": settings.model.attention.value,
        "optimizer": settings.training.optimizer.value,
    }
