"""Recognise a checkpoint that is quantized already, from its config alone, and say what can be done with it.

Bitsandbytes checkpoints are loaded as they are. Those of any other quantizer are refused: their codes can't
be trained through by a QLoRA step as written here, and reading them as anything else would be another model.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qlora_cli.errors import ModelError
from qlora_cli.settings.choices import Quantization
from qlora_cli.settings.models import QuantizationSettings

BITSANDBYTES = "bitsandbytes"
QLORA = "qlora"  # ours: the keys of bitsandbytes, for checkpoints whose experts are quantized too

ORIGINAL = "Take the 16-bit model that it was made from; qlora quantizes that on loading."


def _dequantize(config_class: str) -> str:
    return (
        f"{ORIGINAL} If there is none: load it in transformers with {config_class}(dequantize=True), "
        "save_pretrained() it, and give that directory."
    )


# quant_method of config.json: what the format is, and the way out.
_OTHERS: dict[str, tuple[str, str]] = {
    "gptq": ("its weights are GPTQ integers with zero points of their own", ORIGINAL),
    "awq": ("its weights are AWQ integers, scaled by activation", ORIGINAL),
    "auto-round": ("its weights are AutoRound integers with zero points of their own", ORIGINAL),
    "aqlm": ("its weights are codes of additive codebooks that were learnt for it", ORIGINAL),
    "vptq": ("its weights are vector-quantized with codebooks that were learnt for it", ORIGINAL),
    "spqr": ("its weights are SpQR codes with sparse outliers", ORIGINAL),
    "quanto": ("its weights are quanto tensors", ORIGINAL),
    "eetq": ("its weights are EETQ integers, packed for one kernel", ORIGINAL),
    "hqq": ("its weights are HQQ integers with optimized zero points", ORIGINAL),
    "higgs": ("its weights are HIGGS codes of a rotated grid", ORIGINAL),
    "bitnet": ("its weights have three values only, and were trained so", "Take its bf16 variant, if it has one."),
    "torchao": ("its weights are torchao tensors", ORIGINAL),
    "quark": ("its weights are quantized by AMD Quark", ORIGINAL),
    "modelopt": ("its weights are quantized by NVIDIA ModelOpt", ORIGINAL),
    "fp_quant": ("its weights are FP-Quant codes of a rotated grid", ORIGINAL),
    "sinq": ("its weights are SINQ integers with scales on both axes", ORIGINAL),
    "fouroversix": ("its weights are 4-bit floats with scales chosen block by block", ORIGINAL),
    "metal": ("its weights are packed for Apple GPUs", ORIGINAL),
    "gemma": ("its weights are quantized by Gemma's own scheme", ORIGINAL),
    "gguf": ("its weights are GGUF blocks", ORIGINAL),
    "compressed-tensors": ("its weights are compressed-tensors", _dequantize("CompressedTensorsConfig")),
    "fbgemm_fp8": ("its weights are 8-bit floats (FBGEMM)", ORIGINAL),
    "fp8": ("its weights are 8-bit floats with block scales", _dequantize("FineGrainedFP8Config")),
    "mxfp8": ("its weights are 8-bit floats in MX blocks", ORIGINAL),
    "mxfp4": ("its experts are 4-bit floats in MX blocks", _dequantize("Mxfp4Config")),
    "nvfp4": ("its weights are 4-bit floats in NVFP4 blocks", ORIGINAL),
    "mlx": ("its weights are packed integers of Apple's MLX", ORIGINAL),
}


@dataclass(frozen=True, kw_only=True)
class Prequantized:
    """How the weights of a checkpoint are quantized. `config` is its `quantization_config` as written."""

    method: Quantization
    double_quant: bool
    config: Mapping[str, Any]


def read_prequantized(config: Mapping[str, Any], name: str) -> Prequantized | None:
    """Return how the checkpoint with this `config.json` is quantized, or None if it is not.

    Raises:
        ModelError: it was quantized by something that can't be trained on here, or its config is unreadable.
    """
    found = _quantization_config(config)
    if found is None:
        return None
    method = _quant_method(found)
    if method not in {BITSANDBYTES, QLORA}:
        raise _refusal(method, name)
    if method == QLORA:
        found = {**found, "load_in_4bit": True}  # left out of the file, as transformers would take it for its own
    return Prequantized(
        method=_bitsandbytes_method(found, name),
        double_quant=bool(found.get("load_in_4bit")) and bool(found.get("bnb_4bit_use_double_quant")),
        config=found,
    )


def check_settings(found: Prequantized, settings: QuantizationSettings, name: str) -> None:
    """Refuse settings that were given and that an already quantized checkpoint contradicts.

    Which modules it keeps in 16 bit is seen in the model: `plan_layout` compares them.

    Raises:
        ModelError: naming each of them with what the checkpoint has.
    """
    stored = stored_settings(found)
    wrong = [
        f"quantization.{key} is {_shown(getattr(settings, key))}, the checkpoint has {_shown(stored[key])}"
        for key in sorted(settings.model_fields_set & stored.keys())
        if getattr(settings, key) != stored[key]
    ]
    if wrong:
        raise ModelError(
            f"{name} is quantized already, and not as asked: {'; '.join(wrong)}",
            hint="Leave these settings out to load it as it is, or give the 16-bit model.",
        )


def _quantization_config(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    text_config = config.get("text_config")
    places = [config, text_config] if isinstance(text_config, Mapping) else [config]
    for place in places:
        for key in ("quantization_config", "compression_config", "quantization"):
            if isinstance(found := place.get(key), Mapping) and found:
                return found
    return None


def _quant_method(found: Mapping[str, Any]) -> str:
    method = found.get("quant_method")
    if isinstance(method, str) and method:
        return method.lower()
    if found.get("load_in_4bit") or found.get("load_in_8bit"):
        return BITSANDBYTES  # written before the key existed
    # MLX writes no method, only how wide its groups and codes are.
    return "mlx" if {"group_size", "bits"} <= found.keys() else ""


def _refusal(method: str, name: str) -> ModelError:
    if method in _OTHERS:
        reason, way_out = _OTHERS[method]
        return ModelError(f"{name} is quantized with {method}: {reason}, and can't be trained here", hint=way_out)
    called = f"an unknown method, {method!r}" if method else "a method that its config.json does not name"
    return ModelError(f"{name} is quantized with {called}", hint=ORIGINAL)


def _bitsandbytes_method(found: Mapping[str, Any], name: str) -> Quantization:
    in_4bit, in_8bit = bool(found.get("load_in_4bit")), bool(found.get("load_in_8bit"))
    if in_4bit == in_8bit:
        raise ModelError(
            f"the quantization_config of {name} must set one of load_in_4bit and load_in_8bit",
            hint="Save the quantized model again with save_pretrained(), or give the 16-bit model.",
        )
    if in_8bit:
        return Quantization.INT8
    kind = found.get("bnb_4bit_quant_type", "fp4")  # bitsandbytes' own default
    if kind not in {Quantization.NF4.value, Quantization.FP4.value}:
        raise ModelError(f"{name} is quantized with bitsandbytes to {kind!r}, neither nf4 nor fp4", hint=ORIGINAL)
    return Quantization(kind)


def stored_settings(found: Prequantized) -> dict[str, object]:
    """Return the settings that are baked into the stored weights; dtypes of computing are free."""
    if not found.method.is_4bit:
        # Not whether 16-bit weights are kept: the checkpoint holds none.
        return {"method": found.method, "int8_has_fp16_weight": False}
    storage = str(found.config.get("bnb_4bit_quant_storage") or "uint8").removeprefix("torch.")
    names = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
    return {
        "method": found.method,
        "double_quant": found.double_quant,
        "quant_storage": names.get(storage, storage),
    }


def _shown(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
