"""Plan the quantization residuals that LoftQ initializes an adapter with.

LoftQ (arXiv 2310.08659) alternates between quantizing W - BA and fitting BA to W - Q. This is its first step, in which
Q is the ordinary quantized weight: the adapter then fits the ordinary quantized base, and nothing else has to be
stored. The original weights are in memory only while they are read, so the residuals are computed then. PEFT's
`replace_lora_weights_loftq` reads the weights again, by the names of modules, which for some architectures differ from
those in the files, and ignores the scale of the adapter.
"""

from transformers import PreTrainedModel

from qlora_cli.adapters.targets import adapted_layers, rank_of, target_modules
from qlora_cli.errors import ModelError
from qlora_cli.quantization.residuals import QuantizationResiduals
from qlora_cli.quantization.storage_plan import StoragePlan
from qlora_cli.settings.choices import METHODS, LoraInit, quant_flag
from qlora_cli.settings.models import LoraSettings

SETTING = "lora.init_lora_weights"


def plan_residuals(
    shapes: PreTrainedModel, layout: StoragePlan, settings: LoraSettings
) -> QuantizationResiduals | None:
    """Return the residuals to compute for the adapter of `settings` while a model is read; None if it needs none.

    `shapes` is the model on the meta device, stored as `layout` says.

    Raises:
        ModelError: no adapted layer has a residual.
    """
    if settings.init_lora_weights != LoraInit.LOFTQ:
        return None
    return residuals_to_fit(shapes, layout, settings)


def residuals_to_fit(shapes: PreTrainedModel, layout: StoragePlan, settings: LoraSettings) -> QuantizationResiduals:
    """Return the residuals that the adapter of `settings` is fitted to, none of them computed yet.

    Raises:
        ModelError: no adapted layer has a residual.
    """
    init = settings.init_lora_weights.value
    if layout.prequantized is not None:
        raise ModelError(
            f"{init} needs the weights as they were before quantization, and the checkpoint holds them quantized",
            hint="Give the 16-bit model, or use another lora.init_lora_weights.",
            setting=SETTING,
        )
    ranks = ranks_to_fit(shapes, layout, settings)
    if not layout.settings.method.traits.measures_error or not ranks:
        measurable = quant_flag(method for method in METHODS if method.traits.measures_error)
        raise ModelError(
            f"{init} is initialized from the 4-bit quantization error, and no adapted layer is stored in 4 bit",
            hint=f"Use {measurable}, or another lora.init_lora_weights.",
            setting=SETTING,
        )
    return QuantizationResiduals(ranks=ranks)


def ranks_to_fit(shapes: PreTrainedModel, layout: StoragePlan, settings: LoraSettings) -> dict[str, int]:
    """Return the rank of the adapter of each quantized weight that has one, by full name."""
    modules, _ = target_modules(shapes, settings)
    layers = [name for name in adapted_layers(shapes, modules) if name not in layout.unquantized]
    return {f"{name}.weight": rank_of(name, settings) for name in layers}
