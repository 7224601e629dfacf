"""Settings that can't work with a base or an adapter that a run calibrates on its rows."""

from collections.abc import Iterator, Mapping
from typing import Any

from qlora_cli.settings.choices import LoraInit
from qlora_cli.settings.rules.conflict import Conflict

BASE, ADAPTER = "training.calibrate", "lora.init_lora_weights"
TWO_STEPS = "Calibrate the base first: qlora load MODEL --calibrate DATA --save DIR"


def calibrating_conflicts(validated: Mapping[str, Any]) -> Iterator[Conflict]:
    """Yield the conflicts of `validated` settings of a run."""
    training, model, init = validated["training"], validated["model"], validated["lora"].init_lora_weights
    yield from _base_conflicts(training.calibrate, model, init)
    calibrated = {BASE: training.calibrate, ADAPTER: init == LoraInit.CALIBRATED}
    hints = {BASE: TWO_STEPS, ADAPTER: "Use loftq, or one GPU."}
    for path in (path for path, is_calibrated in calibrated.items() if is_calibrated):
        if training.num_gpus > 1:
            yield path, "is done by one process, and --num-gpus starts several", hints[path]
        if getattr(validated.get("data"), "streaming", False):
            yield path, "needs some of all rows before the first step, and data.streaming reads none", "Leave one out."
    if not any(calibrated.values()):
        message = "training.calibration_tokens has no effect without --calibrate or --lora-init calibrated"
        yield "training.calibration_tokens", message, "Add one of them, or leave it out."


def _base_conflicts(calibrates: bool, model: Any, init: LoraInit) -> Iterator[Conflict]:
    """Yield what changes the base of a run that makes its own: it would change twice."""
    if not calibrates:
        return
    for key, value in (("new_tokens", model.new_tokens), ("rope_scaling", model.rope_scaling)):
        if value:
            message = f"model.{key} can't be used with --calibrate: the base that the run makes would have it already"
            yield f"model.{key}", message, TWO_STEPS
    if init == LoraInit.LOFTQ:
        message = "loftq can't be used with --calibrate: it makes up for the error of the weights, not of the layers"
        yield ADAPTER, message, "Use calibrated, which weights the error as --calibrate does."
