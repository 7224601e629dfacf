"""`--quant auto`: how the base is stored stays open until the memory of the run is known."""

from typing import TypeVar

from qlora_cli.settings.choices import Quantization
from qlora_cli.settings.models import EstimateSettings, InspectMemorySettings, TrainSettings
from qlora_cli.settings.resolve import Resolved
from qlora_cli.settings.rules.conflicts_lora import methods_for
from qlora_cli.settings.settle import InferredSettings, settle
from qlora_cli.settings.value_sources import Origin

METHOD = "quantization.method"
LEFT_OPEN = Origin(kind="provisional", where=f"--quant {Quantization.AUTO.value}")

RunT = TypeVar("RunT", TrainSettings, EstimateSettings, InspectMemorySettings)


def with_provisional_method(asked: Resolved[RunT]) -> Resolved[RunT]:
    """Return the settings with the method that takes the least memory instead of `auto`; others unchanged.

    It does not count as given: what a checkpoint or a run is stored in takes its place.
    """
    if asked.settings.quantization.method != Quantization.AUTO:
        return asked
    values = {METHOD: methods_for(asked.settings.lora)[-1]}
    return settle(asked, [InferredSettings(values=values, origin=LEFT_OPEN, is_fixed=True)])


def is_method_open(resolved: Resolved[RunT]) -> bool:
    """Return whether the method is still the provisional one."""
    return resolved.origin_of(METHOD) == LEFT_OPEN
