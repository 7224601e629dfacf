"""Settings of the adapter that can't work together, or with the others, whatever the model."""

from qlora_cli.settings.choices import LEAST_FIRST, METHODS, LoraInit, Quantization, quant_flag
from qlora_cli.settings.models import LoraSettings
from qlora_cli.settings.rules.conflict import Conflict


def lora_conflicts(lora: LoraSettings, method: Quantization) -> list[Conflict]:
    """Return the conflicts of the adapter's settings; `method` is how the base is stored."""
    # What is left open is chosen without a conflict, if there is such a method.
    methods = [method] if method in METHODS else [*methods_for(lora), *LEAST_FIRST][:1]
    return [*_expert_conflicts(lora), *_init_conflicts(lora, methods[0]), *_module_conflicts(lora)]


def methods_for(lora: LoraSettings) -> list[Quantization]:
    """Return the methods that can be chosen for a run with these settings, the one that quantizes least first."""
    return [method for method in LEAST_FIRST if not _init_conflicts(lora, method)]


def _expert_conflicts(lora: LoraSettings) -> list[Conflict]:
    """Return the settings that can't be applied to fused experts."""
    if lora.target_parameters is None:
        return []
    conflicts = []
    if lora.dropout:
        message = "lora.dropout can't be applied to fused experts: their update is part of the weight"
        conflicts.append(("lora.dropout", message, "Set it to 0, or leave lora.target_parameters out."))
    if lora.use_dora:
        message = "lora.use_dora can't be applied to fused experts: PEFT has no magnitudes for them"
        conflicts.append(("lora.use_dora", message, "Leave it or lora.target_parameters out."))
    if lora.init_lora_weights.needs_layers:
        message = (
            f"lora.init_lora_weights={lora.init_lora_weights.value} can't be applied to fused experts: it is defined "
            "for the weight of a single layer"
        )
        hint = "Use default or gaussian, or leave lora.target_parameters out."
        conflicts.append(("lora.init_lora_weights", message, hint))
    return conflicts


def _init_conflicts(lora: LoraSettings, method: Quantization) -> list[Conflict]:
    """Return why the matrices can't be initialized as asked."""
    path, init = "lora.init_lora_weights", lora.init_lora_weights
    if init == LoraInit.PISSA and method.is_quantized:
        message = (
            "PiSSA can't be used on a quantized base: it subtracts the principal components from the weights, and the "
            "residual would have to be quantized again, to a base that fits this adapter only"
        )
        return [(path, message, "Use --quant none, or loftq, which is initialized from the quantization error.")]
    if init.fits_quantization_error and not method.traits.measures_error:
        message = f"{init.value} needs the error of 4-bit quantization, and --quant {method.value} has none"
        measurable = quant_flag(other for other in METHODS if other.traits.measures_error)
        return [(path, message, f"Use {measurable}, or another lora.init_lora_weights.")]
    odd = [rank for rank in (lora.rank, *(lora.rank_pattern or {}).values()) if rank % 2]
    if init == LoraInit.ORTHOGONAL and odd:
        message = f"orthogonal needs even ranks, half for A and half for B, got {odd[0]}"
        return [(path, message, "Change lora.rank or lora.rank_pattern.")]
    return []


def _module_conflicts(lora: LoraSettings) -> list[Conflict]:
    targets = () if lora.target_modules == "all-linear" else lora.target_modules
    return [
        (
            "lora.modules_to_save",
            f"{name} is both in lora.modules_to_save, to be trained in full, and in lora.target_modules, to get an "
            "adapter",
            "Leave it out of one of them.",
        )
        for name in lora.modules_to_save or ()
        if name in targets
    ]
