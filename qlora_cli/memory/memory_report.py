"""The answer of `qlora inspect-memory`: predict, judge, solve, suggest. Torch is imported only for a new question."""

import time
from dataclasses import replace
from typing import TYPE_CHECKING

from qlora_cli.errors import HardwareError, ModelError
from qlora_cli.events import PhaseStarted, Reporter
from qlora_cli.garbage import uncollected
from qlora_cli.memory import prediction_cache
from qlora_cli.memory.gpus import GPUS, Gpu, find_gpu
from qlora_cli.memory.model_facts import ModelFacts, find_facts
from qlora_cli.memory.prediction import Estimate, GpuFit, MemoryReport, Solution
from qlora_cli.memory.request import MemoryRequest
from qlora_cli.memory.solver import solve, sweep
from qlora_cli.memory.suggestions import YES, fit_on, suggest
from qlora_cli.memory.untraced import untraced
from qlora_cli.settings.models import EstimateSettings
from qlora_cli.settings.shown import shown_flags

if TYPE_CHECKING:
    from qlora_cli.memory.estimator import Estimator

REFERENCE = "RTX 4090"  # whose kernels and CUDA context are taken if no GPU is named


def inspect_memory(request: MemoryRequest, reporter: Reporter) -> MemoryReport:
    """Return what the run asked about takes, and whether it fits.

    Raises:
        ModelNotFoundError: no such model.
        ModelError: the model can't be read, or can't be trained so.
        HardwareError: a GPU that was named can't compute so.
    """
    start = time.monotonic()
    facts = find_facts(request.asked, reporter)
    _check_askable(request, facts)
    key = prediction_cache.key_of(request, facts.description)
    known = prediction_cache.recall(key)
    if known is not None:
        return replace(known, model=facts.name, estimate_seconds=time.monotonic() - start)
    reporter.report(PhaseStarted(title=f"Predicting the memory of {facts.name}"))
    # Looking through all that is imported for garbage, again and again, takes a second.
    with uncollected():
        report = _answer(request, facts)
    report = replace(report, estimate_seconds=time.monotonic() - start)
    prediction_cache.keep(key, report)
    return report


def _check_askable(request: MemoryRequest, facts: ModelFacts) -> None:
    if facts.adapter is not None and "rank" in (*request.solve, *request.sweep):
        raise ModelError(
            f"the rank of {facts.adapter.directory} is {facts.adapter.config.r}, which training on keeps",
            hint="Name the base model to ask about another rank.",
        )


def estimator_for(request: MemoryRequest, facts: ModelFacts) -> "Estimator":
    """Return what predicts for a request; imports torch."""
    from qlora_cli.memory.estimator import Estimator

    return Estimator(
        facts,
        backend=request.prediction.sdpa_backend,
        evaluates=request.prediction.evaluate,
    )


def _answer(request: MemoryRequest, facts: ModelFacts) -> MemoryReport:
    estimator = estimator_for(request, facts)
    ask = estimator.estimate
    gpu = request.gpus[0] if request.gpus else find_gpu(REFERENCE)
    settings = estimator.settled(request.asked).settings
    estimate = ask(settings, gpu)
    dtype = estimator.dtype_on(settings, gpu)
    shapes = estimator.shapes(settings, dtype)
    traced = estimator.traced(settings, gpu)
    left_out: tuple[str, ...] = ()
    if request.gpus:
        fits = tuple(fit_on(ask(settings, gpu), gpu) for gpu in request.gpus)
    else:
        fits, left_out = _over_catalogue(settings, estimator)
    misses = request.gpus and fits[0].fits != YES
    return MemoryReport(
        model=facts.name,
        architecture=type(shapes).__name__,
        num_parameters=estimator.layout(settings, dtype).inventory.num_parameters,
        num_trainable_parameters=traced.num_trained,
        settings=_shown(settings, estimate),
        gpu=gpu.name,
        dtype=estimate.dtype,
        attention_backends=estimate.attention_backends,
        predicted=estimate.predicted,
        components=estimate.components,
        phases=estimate.phases,
        ruling_phase=estimate.ruling_phase,
        reason=estimate.reason,
        paged_bytes=estimate.paged_bytes,
        pinned_host_bytes=estimate.pinned_host_bytes,
        fits=fits,
        smallest_gpu=_smallest(settings, estimator),
        suggestions=suggest(settings, gpu, ask, estimate) if misses else (),
        solutions=_solutions(request, settings, estimator),
        sweep=sweep(request.swept(settings), settings, gpu, ask) if request.sweep else (),
        assumptions=(*facts.notes, *traced.notes, *_assumptions(request, settings, gpu, left_out)),
        estimate_seconds=0.0,
    )


def _over_catalogue(settings: EstimateSettings, estimator: "Estimator") -> tuple[tuple[GpuFit, ...], tuple[str, ...]]:
    """Return the verdict for each GPU of the catalogue, and those that can't compute so."""
    found: list[GpuFit] = []
    left_out: list[str] = []
    for gpu in GPUS:
        try:
            found.append(fit_on(estimator.estimate(settings, gpu), gpu))
        except HardwareError:  # bf16 before Ampere, for one
            left_out.append(gpu.name)
    return tuple(found), tuple(left_out)


def _smallest(settings: EstimateSettings, estimator: "Estimator") -> str | None:
    """Return the catalogue's smallest GPU on which the run fits for sure: larger ones need no prediction."""
    for gpu in sorted(GPUS, key=lambda gpu: gpu.usable_bytes):
        try:
            if fit_on(estimator.estimate(settings, gpu), gpu).fits == YES:
                return gpu.name
        except HardwareError:
            continue
    return None


def _solutions(request: MemoryRequest, settings: EstimateSettings, estimator: "Estimator") -> tuple[Solution, ...]:
    from qlora_cli.tokenizing.positions import num_positions

    return tuple(
        solve(
            setting,
            settings,
            gpu,
            estimator.estimate,
            most=num_positions(estimator.shapes(settings, estimator.dtype_on(settings, gpu)).config),
        )
        for setting in request.solve
        for gpu in request.gpus
    )


def _shown(settings: EstimateSettings, estimate: Estimate) -> dict[str, str]:
    """Return the settings that memory depends on, by the flag's name without dashes."""
    lora = settings.lora
    targets = lora.target_modules or lora.target_parameters or ()
    return {
        **shown_flags(settings.quantization),
        "dtype": estimate.dtype,
        "rank": str(lora.rank),
        "target-modules": targets if isinstance(targets, str) else ",".join(targets),
        "micro-batch-size": str(settings.training.micro_batch_size),
        "gradient-accumulation-steps": str(settings.training.gradient_accumulation_steps),
        "max-length": str(settings.data.max_length),
        "gradient-checkpointing": estimate.gradient_checkpointing,
        "attention": settings.model.attention.value,
        "optimizer": settings.training.optimizer.value,
    }


def _assumptions(request: MemoryRequest, settings: EstimateSettings, gpu: Gpu, left_out: tuple[str, ...]) -> list[str]:
    found = []
    if not request.gpus:
        found.append(f"no GPU was named: kernels and CUDA context are those of the {gpu.name}")
    if left_out:
        found.append(f"not judged, since they can't compute so: {', '.join(left_out)}")
    if settings.data.packing:
        found.append("rows are packed to the full length, with a mask that keeps them apart")
    elif settings.training.micro_batch_size > 1:
        found.append(f"each micro-batch has a row of {settings.data.max_length:,} tokens and shorter, padded ones")
    else:
        found.append(f"every row has {settings.data.max_length:,} tokens")
    found.append("every token is trained; with a loss on answers only, a little less is taken")
    if settings.model.new_tokens:
        found.append("new tokens have rows in the embedding already")
    found += untraced(settings.training)
    found.append("one GPU, nothing else on it, PyTorch's allocator as it comes (no PYTORCH_CUDA_ALLOC_CONF)")
    return found
