"""Choose how the base of a run is stored: the least quantization that fits on a GPU. Imports no torch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qlora_cli.errors import QloraError
from qlora_cli.memory.fitting.plan import PlanOn, describe_option
from qlora_cli.memory.fitting.suggestions import YES
from qlora_cli.memory.gpus import Gpu
from qlora_cli.memory.prediction import MethodOption
from qlora_cli.settings.choices import Quantization, quant_flag
from qlora_cli.settings.models import EstimateSettings
from qlora_cli.settings.open_method import METHOD
from qlora_cli.settings.rules.conflicts_lora import methods_for
from qlora_cli.settings.settle import with_settings
from qlora_cli.units import format_bytes

WORTH_WAITING = 1.5  # times as long as with the fastest method that fits, for the smaller error of another


@dataclass(frozen=True, kw_only=True)
class MethodChoice:
    """The method that was chosen, and what was predicted to choose it, the least quantization first."""

    method: Quantization
    options: tuple[MethodOption, ...]


def choose_method(
    settings: EstimateSettings, gpu: Gpu, plan: PlanOn, weights_bytes: Callable[[EstimateSettings, Gpu], int]
) -> MethodChoice:
    """Return the least quantization with which the run fits on `gpu` with its whole error band.

    One that quantizes takes at most `WORTH_WAITING` times as long as the fastest that fits. If none fits, it is the
    one that quantizes most. `plan` predicts a run, `weights_bytes` returns the memory of its weights alone.

    Raises:
        QloraError: the model can't be run with any method.
    """
    options: list[MethodOption] = []
    failures: list[QloraError] = []
    for method in methods_for(settings.lora):
        changed = with_settings(settings, {METHOD: method})
        try:
            weights = weights_bytes(changed, gpu)
            run = plan(changed, gpu) if weights <= gpu.usable_bytes else None
        except QloraError as error:  # some models can't be stored so
            failures.append(error)
            continue
        options.append(MethodOption(quantization=method.value, weights_bytes=weights, run=run))
        if _fits(options[-1]) and not method.is_quantized:
            break
    if not options:
        raise failures[-1]
    return MethodChoice(method=Quantization(_chosen(options).quantization), options=tuple(options))


def _fits(option: MethodOption) -> bool:
    return option.run is not None and option.run.fits == YES


def _chosen(options: Sequence[MethodOption]) -> MethodOption:
    fitting = [option for option in options if _fits(option)]
    if not fitting:
        return options[-1]
    times = {option.quantization: _seconds(option) for option in fitting}
    return next(option for option in fitting if times[option.quantization] <= WORTH_WAITING * min(times.values()))


def _seconds(option: MethodOption) -> float:
    """Return the seconds of a step; the same for all on a GPU whose speed is not known."""
    seconds = None if option.run is None else option.run.step_seconds
    return seconds or 0.0


def describe_choice(choice: MethodChoice) -> str:
    """Return the choice in one line, with the memory and time of each method that was looked at."""
    options = "; ".join(
        f"{option.quantization} "
        + (
            f"takes {format_bytes(option.weights_bytes)} for the weights alone, does not fit"
            if option.run is None
            else describe_option(option.run)
        )
        for option in choice.options
    )
    chosen = next(option for option in choice.options if option.quantization == choice.method.value)
    reason = "the least quantization that fits" if _fits(chosen) else "which takes the least"
    return f"{quant_flag([choice.method])}, {reason}: {options}"
