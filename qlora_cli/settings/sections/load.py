"""Settings of `qlora load`, besides those of loading."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from qlora_cli.settings.section import Section
from qlora_cli.settings.setting_metadata import Command, Metadata
from qlora_cli.settings.values import Datasets, NumBytes


class SavingSettings(Section):
    """Settings of `qlora load`, besides those of loading."""

    save: Annotated[Path | None, Metadata(flag="--save", commands=(Command.LOAD,))] = Field(
        default=None, description="Directory to write the quantized checkpoint to."
    )
    calibrate: Annotated[
        Datasets | None, Metadata(flag="--calibrate", commands=(Command.LOAD,), metavar="DATA", is_repeatable=True)
    ] = Field(
        default=None,
        description="Choose the 4-bit codes by what the model computes on this data, named as for train: about half "
        "the error of its predictions, in the same bytes.",
    )
    calibration_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Tokens of --calibrate to compute, in whole rows; by default 8 for each feature of the widest "
        "layer.",
    )
    error: Annotated[bool, Metadata(flag="--error", commands=(Command.LOAD,))] = Field(
        default=False, description="Measure the quantization error of every weight."
    )
    error_on: Annotated[
        Datasets | None, Metadata(flag="--error-on", commands=(Command.LOAD,), metavar="DATA", is_repeatable=True)
    ] = Field(
        default=None,
        description="Measure what quantization costs on this data, named as for train: the divergence of the "
        "predictions from those of the unquantized model, and the error of each layer's output.",
    )
    memory_budget: Annotated[
        NumBytes | None, Metadata(flag="--memory-budget", commands=(Command.LOAD,), metavar="SIZE")
    ] = Field(
        default=None,
        description="What the weights may take, such as 6GiB: layers stay in 16 bit as far as it allows, those first "
        "that cost predictions on --error-on's data most for their bytes.",
    )
