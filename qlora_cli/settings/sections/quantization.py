"""How the frozen base is quantized on loading."""

from typing import Annotated

from pydantic import Field

from qlora_cli.settings.choices import (
    DEFAULT_METHOD,
    QUANTIZED,
    UNQUANTIZED_METHOD,
    Dtype,
    Quantization,
    Storage,
    methods_of,
)
from qlora_cli.settings.help_groups import HelpGroup
from qlora_cli.settings.section import Section
from qlora_cli.settings.setting_metadata import LOADERS, EffectiveWith, Metadata
from qlora_cli.settings.values import NameList

# The methods with which a setting has an effect: those of one module, or all that quantize.
OF_FOUR_BIT = EffectiveWith(key="method", values=methods_of("four_bit"))
OF_INT8 = EffectiveWith(key="method", values=methods_of("int8"))
OF_QUANTIZED = EffectiveWith(key="method", values=QUANTIZED)


class QuantizationSettings(Section):
    """How the frozen base is quantized on loading."""

    method: Annotated[
        Quantization,
        Metadata(flag="--quant", commands=LOADERS, affects_memory=True, is_inherited=True),
    ] = Field(
        default=DEFAULT_METHOD,
        description="Data type of the frozen linear layers; none keeps 16 or 32 bit. auto: the least quantization "
        "with which a training fits on the GPU.",
    )
    double_quant: Annotated[
        bool,
        Metadata(
            flag="--double-quant",
            group=HelpGroup.RARE,
            commands=LOADERS,
            affects_memory=True,
            is_inherited=True,
            effective_with=OF_FOUR_BIT,
        ),
    ] = Field(default=True, description="Quantize the quantization constants too (saves 0.37 bit a parameter).")
    compute_dtype: Annotated[Dtype, Metadata(affects_memory=True, is_inherited=True, effective_with=OF_FOUR_BIT)] = (
        Field(default=Dtype.AUTO, description="Dtype that 4-bit layers multiply in. auto: the same as model.dtype.")
    )
    quant_storage: Annotated[Storage, Metadata(affects_memory=True, is_inherited=True, effective_with=OF_FOUR_BIT)] = (
        Field(
            default=Storage.UINT8, description="Dtype that holds the packed 4-bit codes; FSDP needs that of the model."
        )
    )
    skip_modules: Annotated[
        NameList,
        Metadata(affects_memory=True, is_inherited=True, effective_with=OF_QUANTIZED),
    ] = Field(
        default=None, description="Comma-separated modules to keep unquantized, besides heads, routers and the like."
    )
    int8_threshold: Annotated[float, Metadata(affects_memory=True, is_inherited=True, effective_with=OF_INT8)] = Field(
        default=6.0, ge=0, description="LLM.int8: input features with a larger value are multiplied in 16 bit."
    )
    int8_has_fp16_weight: Annotated[bool, Metadata(affects_memory=True, is_inherited=True, effective_with=OF_INT8)] = (
        Field(
            default=False,
            description="LLM.int8: keep 16-bit weights, quantized in every product; saves no memory.",
        )
    )
    int8_cpu_offload: Annotated[bool, Metadata(affects_memory=True, is_inherited=True, effective_with=OF_INT8)] = (
        Field(
            default=False,
            description="LLM.int8: put what does not fit on the GPU on the CPU, in fp32; not for training.",
        )
    )


UNQUANTIZED = QuantizationSettings(method=UNQUANTIZED_METHOD)
