"""Settings that can't work with what a run measures of its base on its rows: codes, an adapter, layers in 16 bit."""

from collections.abc import Iterator, Mapping
from typing import Any

from qlora_cli.settings.choices import LEAST_FIRST, UNQUANTIZED_METHOD, LoraInit, quant_flag
from qlora_cli.settings.rules.conflict import Conflict

BASE, ADAPTER = "training.calibrate", "lora.init_lora_weights"
BUDGET = "training.memory_budget"
BY_ONE_PROCESS = (BASE, ADAPTER, BUDGET)
TWO_STEPS = "Calibrate the base first: qlora load MODEL --calibrate DATA --save DIR"


def calibrating_conflicts(validated: Mapping[str, Any]) -> Iterator[Conflict]:
    """Yield the conflicts of `validated` settings of a run."""
    training, model, init = validated["training"], validated["model"], validated["lora"].init_lora_weights
    yield from _base_conflicts(training.calibrate, model, init)
    yield from _budget_conflicts(validated)
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


def _budget_conflicts(validated: Mapping[str, Any]) -> Iterator[Conflict]:
    """Yield what leaves no layers to choose by the rows, or no one process to do it."""
    training, method = validated["training"], validated["quantization"].method
    if training.memory_budget is None:
        return
    how = "qlora load MODEL --error-on DATA --memory-budget SIZE --save DIR"
    if training.num_gpus > 1:
        yield BUDGET, "is spent by one process, and --num-gpus starts several", f"Choose the layers first: {how}"
    if method == UNQUANTIZED_METHOD:
        hint = f"Leave one of them out, or use {quant_flag(LEAST_FIRST[1:])}."
        yield BUDGET, f"is spent on layers in 16 bit, as all are with {quant_flag([method])}", hint
    if getattr(validated.get("data"), "streaming", False):
        yield (
            BUDGET,
            "is spent by some of all rows, and data.streaming reads none before the first step",
            "Leave one out.",
        )


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
