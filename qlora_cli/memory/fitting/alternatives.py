"""Find what a run fits on, and what fits instead: the smallest cards for it, the largest model for a card.

Imports no torch.
"""

from collections.abc import Callable, Iterator

from qlora_cli.errors import HardwareError, QloraError
from qlora_cli.memory.catalogue import CatalogueModel, catalogue, find_in_catalogue
from qlora_cli.memory.fitting.plan import PlanOn
from qlora_cli.memory.fitting.suggestions import YES, judge_fit
from qlora_cli.memory.gpus import AMPERE, GPUS, Gpu, classes
from qlora_cli.memory.prediction import CardClass, Estimate, GpuFit, PlanOption
from qlora_cli.memory.report_parts import FittingModel, LargerModel
from qlora_cli.memory.request import Predict
from qlora_cli.settings.choices import UNQUANTIZED_METHOD
from qlora_cli.settings.files.preset_files import Preset, presets
from qlora_cli.settings.models import EstimateSettings
from qlora_cli.settings.open_method import METHOD
from qlora_cli.settings.settle import with_settings

ROOMY_SHARE = 0.75  # of the usable memory, at most, by a run that fits with ease
CLEARLY_LARGER = 1.25  # times as many parameters
MAX_PREDICTIONS = 3  # each takes a second or more
SLOW_TO_PREDICT = "linear_conv_kernel_dim"  # linear attention goes through rows in small steps: a minute and more
EMBEDDING_BYTES = 2  # of a value in 16 bit, as in embedding and head, which are not quantized

# Predicts a run of a model of the catalogue on a GPU.
PredictModel = Callable[[CatalogueModel, Gpu], Estimate]


def smallest_gpu(settings: EstimateSettings, predict: Predict) -> str | None:
    """Return the smallest GPU of the catalogue on which the run certainly fits. Larger ones need no prediction."""
    for gpu in sorted((gpu for gpu in GPUS if gpu.has_kernels), key=lambda gpu: gpu.usable_bytes):
        try:
            if judge_fit(predict(settings, gpu), gpu).fits == YES:
                return gpu.name
        except HardwareError:
            continue
    return None


def smallest_classes(settings: EstimateSettings, predict: Predict) -> tuple[CardClass | None, CardClass | None]:
    """Return the smallest class on each card of which the run certainly fits, and the smallest with room to spare.

    A quarter of the memory is left on the second, at the upper end of the error band. None where there is no such
    class.
    """
    smallest = None
    for fitting in _fitting_classes(settings, predict):
        smallest = smallest or fitting
        if fitting.process_high_bytes <= ROOMY_SHARE * fitting.usable_bytes:
            return smallest, fitting
    return smallest, None


def _fitting_classes(settings: EstimateSettings, predict: Predict) -> Iterator[CardClass]:
    newer = {gpu.size_gb: gpu for gpu in classes(AMPERE)}
    for every in classes():
        # Where old cards of a class can't compute with these settings, as with bf16, it is judged without them.
        for gpu in filter(None, (every, newer.get(every.size_gb))):
            try:
                fit = judge_fit(predict(settings, gpu), gpu)
            except HardwareError:
                continue
            if fit.fits == YES:
                yield _class_that_fits(gpu, fit)
            break


def _class_that_fits(gpu: Gpu, fit: GpuFit) -> CardClass:
    return CardClass(
        size_gb=gpu.size_gb,
        gpus=gpu.cards,
        usable_bytes=fit.usable_bytes,
        process_bytes=fit.process_bytes,
        process_high_bytes=fit.process_high_bytes,
    )


def unquantized_run(settings: EstimateSettings, gpu: Gpu, num_parameters: int, plan: PlanOn) -> PlanOption | None:
    """Return the run with its base in 16 bit as it would be planned, if that fits on `gpu`, too.

    With `settings`, its base of `num_parameters` is quantized. None if its weights alone do not fit, which takes no
    prediction, or the model can't be run so.
    """
    unquantized_bytes = EMBEDDING_BYTES * num_parameters + gpu.context_bytes
    if not settings.quantization.method.is_quantized or unquantized_bytes > gpu.usable_bytes:
        return None
    changed = with_settings(settings, {METHOD: UNQUANTIZED_METHOD})
    try:
        option = plan(changed, gpu)
    except QloraError:  # a checkpoint that is quantized itself
        return None
    return option if option.fits == YES else None


def larger_model(gpu: Gpu, num_parameters: int, max_length: int) -> LargerModel | None:
    """Return the largest model that has a preset for cards with no more memory than `gpu`, without a prediction.

    None if none is clearly larger than one of `num_parameters`, or trains on rows of `max_length` tokens. Presets
    compute in bf16, and their memory is that of cards which do.
    """
    if gpu.capability < AMPERE:
        return None
    candidates = [
        _as_larger_model(preset)
        for preset in presets()
        if preset.usable_bytes <= gpu.usable_bytes and preset.max_length_tokens >= max_length
    ]
    larger = [model for model in candidates if model.num_parameters >= CLEARLY_LARGER * num_parameters]
    return max(larger, key=lambda model: (model.num_parameters, model.max_length_tokens), default=None)


def _as_larger_model(preset: Preset) -> LargerModel:
    model = find_in_catalogue(preset.model)
    assert model is not None and model.num_parameters is not None, f"{preset.model} is in the catalogue"  # noqa: PT018
    return LargerModel(
        preset=preset.name,
        num_parameters=model.num_parameters,
        max_length_tokens=preset.max_length_tokens,
        process_high_bytes=preset.predicted_bytes,
    )


def largest_model(
    settings: EstimateSettings, gpu: Gpu, too_large: Estimate, num_parameters: int, predict: PredictModel
) -> FittingModel | None:
    """Return the largest model of the catalogue whose run with `settings` fits on `gpu`.

    `too_large` is the estimate for a model with `num_parameters`, which does not fit. Others are expected to take as
    much as their weights do in proportion; only the first few that could fit are predicted. None if none of these
    fits.
    """
    bits = settings.quantization.method.traits.bits
    expected = too_large.predicted.process_high_bytes / too_large.components.weights_bytes
    num_predictions, limit_bytes = 0, float(gpu.usable_bytes)
    for model, size in _smaller_models(num_parameters, bits):
        if size * expected > limit_bytes:
            continue
        if num_predictions == MAX_PREDICTIONS:
            break
        num_predictions += 1
        try:
            estimate = predict(model, gpu)
        except QloraError:  # not with these settings
            continue
        if judge_fit(estimate, gpu).fits == YES:
            assert model.num_parameters is not None
            return FittingModel(
                model=model.name,
                num_parameters=model.num_parameters,
                process_bytes=estimate.predicted.process_bytes,
                process_high_bytes=estimate.predicted.process_high_bytes,
            )
        expected = estimate.predicted.process_high_bytes / size
    return None


def stored_bytes(model: CatalogueModel, bits: int) -> float:
    """Return about what the weights of a model take, when all but the embedding and the head have `bits` each."""
    assert model.num_parameters is not None
    config = model.config
    num_rows = config["vocab_size"] * (1 if config.get("tie_word_embeddings", True) else 2)
    num_embedded: int = num_rows * config.get("hidden_size", config.get("n_embd", 0))
    return EMBEDDING_BYTES * num_embedded + (model.num_parameters - num_embedded) * bits / 8


def _smaller_models(num_parameters: int, bits: int) -> Iterator[tuple[CatalogueModel, float]]:
    """Yield the models with fewer parameters, the largest first, one of those with as many, with their bytes."""
    by_count = {model.num_parameters: model for model in reversed(catalogue()) if model.num_parameters}
    for count in sorted((count for count in by_count if count and count < num_parameters), reverse=True):
        model = by_count[count]
        if SLOW_TO_PREDICT not in model.config:
            yield model, stored_bytes(model, bits)
