"""Settings of the adapter that can't work together, or with the others, whatever the model."""

from qlora_cli.settings.choices import LoraInit, Quantization, quant_flag
from qlora_cli.settings.conflict import Conflict
from qlora_cli.settings.models import LoraSettings


def lora_conflicts(lora: LoraSettings, method: Quantization) -> list[Conflict]:
    """Return path, message and hint of each conflict; `method` is how the base is stored."""
    return [*_expert_conflicts(lora), *_init_conflicts(lora, method), *_module_conflicts(lora)]


def _expert_conflicts(lora: LoraSettings) -> list[Conflict]:
    """Return what can't be had for fused experts."""
    if lora.target_parameters is None:
        return []
    found = []
    if lora.dropout:
        message = "lora.dropout can't be applied to fused experts: their update is part of the weight"
        found.append(("lora.dropout", message, "Set it to 0, or leave lora.target_parameters out."))
    if lora.use_dora:
        message = "lora.use_dora can't be applied to fused experts: PEFT has no magnitudes for them"
        found.append(("lora.use_dora", message, "Leave it or lora.target_parameters out."))
    if lora.init_lora_weights.needs_layers:
        message = (
            f"lora.init_lora_weights={lora.init_lora_weights.value} can't be applied to fused experts: it is made for "
            "the weight of one layer"
        )
        hint = "Use default or gaussian, or leave lora.target_parameters out."
        found.append(("lora.init_lora_weights", message, hint))
    return found


def _init_conflicts(lora: LoraSettings, method: Quantization) -> list[Conflict]:
    """Return what the first values of the matrices can't be made of."""
    path, init = "lora.init_lora_weights", lora.init_lora_weights
    if init == LoraInit.PISSA and method.is_quantized:
        message = (
            "PiSSA can't be used on a quantized base: it takes the principal parts out of the weights, and what is "
            "left would have to be quantized anew, to a base that fits this adapter only"
        )
        return [(path, message, "Use --quant none, or loftq, which begins with what quantization lost.")]
    if init == LoraInit.LOFTQ and not method.traits.measures_error:
        message = (
            f"loftq begins with what 4-bit quantization lost, and with --quant {method.value} there is no such loss"
        )
        measurable = quant_flag(other for other in Quantization if other.traits.measures_error)
        return [(path, message, f"Use {measurable}, or another lora.init_lora_weights.")]
    odd = [rank for rank in (lora.rank, *(lora.rank_pattern or {}).values()) if rank % 2]
    if init == LoraInit.ORTHOGONAL and odd:
        message = f"orthogonal needs even ranks, a half for A and a half for B, and {odd[0]} is asked for"
        return [(path, message, "Change lora.rank or lora.rank_pattern.")]
    return []


def _module_conflicts(lora: LoraSettings) -> list[Conflict]:
    targets = () if lora.target_modules == "all-linear" else lora.target_modules
    return [
        (
            "lora.modules_to_save",
            f"{name} is in lora.modules_to_save, to train whole, and in lora.target_modules, to get an adapter",
            "Leave it out of one of them.",
        )
        for name in lora.modules_to_save or ()
        if name in targets
    ]
