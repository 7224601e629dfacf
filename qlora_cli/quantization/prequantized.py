"""Recognise an already quantized checkpoint from its config, and accept or refuse it.

Bitsandbytes checkpoints are loaded as they are. Those of any other quantizer are refused: a QLoRA step can't
backpropagate through their codes here, and reading them in another way would give another model.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from qlora_cli.errors import ModelError
from qlora_cli.model_files.model_config import quantization_config_of
from qlora_cli.quantization.methods import all_methods, method_of
from qlora_cli.quantization.methods.bitsandbytes import BITSANDBYTES
from qlora_cli.quantization.methods.method import ORIGINAL
from qlora_cli.settings.choices import Quantization


def _dequantize(config_class: str) -> str:
    return (
        f"{ORIGINAL} If there is none: load it in transformers with {config_class}(dequantize=True), "
        "save_pretrained() it, and give that directory."
    )


# quant_method of config.json: what the format is, and the way out.
_UNSUPPORTED: dict[str, tuple[str, str]] = {
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
    """The quantization of a checkpoint.

    Attributes:
        method: The method.
        settings: The settings of the section `quantization` that the weights fix; compute dtypes can be chosen.
        config: Its `quantization_config` as written.
    """

    method: Quantization
    settings: Mapping[str, object]
    config: Mapping[str, Any]

    @property
    def unquantized(self) -> list[str] | None:
        """The modules that are not quantized, if the config names any."""
        unquantized: list[str] | None = self.config.get(method_of(self.method).skip_modules_key)
        return unquantized

    def renamed(self, rename: Callable[[str], str]) -> "Prequantized":
        """Return a copy in which `rename` is applied to the names of the unquantized modules."""
        if not self.unquantized:
            return self
        skip_modules_key = method_of(self.method).skip_modules_key
        return replace(self, config={**self.config, skip_modules_key: [rename(name) for name in self.unquantized]})


def read_prequantized(config: Mapping[str, Any], name: str) -> Prequantized | None:
    """Return how the checkpoint with this `config.json` is quantized, or None if it is not.

    Raises:
        ModelError: it was quantized by a method that can't be trained here, or its config is invalid.
    """
    content = quantization_config_of(config)
    if content is None:
        return None
    quant_method = _quant_method(content)
    claims = [
        (method, claim) for method in all_methods() if (claim := method.claim(quant_method, content)) is not None
    ]
    if not claims and quant_method != BITSANDBYTES:
        raise _refusal(quant_method, name)
    if len(claims) != 1:
        raise ModelError(
            f"the quantization_config of {name} must set one of {' and '.join(_stored_keys())}",
            hint="Save the quantized model again with save_pretrained(), or give the 16-bit model.",
        )
    ((method, claimed),) = claims
    settings = method.stored_settings(claimed, name)
    return Prequantized(method=Quantization(str(settings["method"])), settings=settings, config=claimed)


def check_settings(checkpoint: Prequantized, given: Mapping[str, object], name: str) -> None:
    """Check that the settings `given` by the user agree with an already quantized checkpoint.

    The modules in 16 bit are known from the model only: `plan_layout` compares them.

    Raises:
        ModelError: some differ; names each with the value of the checkpoint.
    """
    wrong = [
        f"quantization.{key} is {_shown(given[key])}, the checkpoint has {_shown(checkpoint.settings[key])}"
        for key in sorted(given.keys() & checkpoint.settings.keys())
        if given[key] != checkpoint.settings[key]
    ]
    if wrong:
        raise ModelError(
            f"{name} is already quantized, and not as requested: {'; '.join(wrong)}",
            hint="Leave these settings out to load it as it is, or give the 16-bit model.",
        )


def _quant_method(config: Mapping[str, Any]) -> str:
    method = config.get("quant_method")
    if isinstance(method, str) and method:
        return method.lower()
    if any(config.get(key) for key in _stored_keys()):
        return BITSANDBYTES  # written before the key existed
    # MLX writes no method, only the widths of its groups and codes.
    return "mlx" if {"group_size", "bits"} <= config.keys() else ""


def _stored_keys() -> list[str]:
    return [method.stored_key for method in all_methods() if method.stored_key is not None]


def _refusal(method: str, name: str) -> ModelError:
    if method in _UNSUPPORTED:
        reason, way_out = _UNSUPPORTED[method]
        return ModelError(f"{name} is quantized with {method}: {reason}, and can't be trained here", hint=way_out)
    called = f"an unknown method, {method!r}" if method else "a method that its config.json does not name"
    return ModelError(f"{name} is quantized with {called}", hint=ORIGINAL)


def _shown(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
