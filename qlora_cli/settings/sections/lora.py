"""The adapter."""

from typing import Annotated

from pydantic import Field

from qlora_cli.settings.choices import LoraInit
from qlora_cli.settings.help_groups import HelpGroup
from qlora_cli.settings.section import Section
from qlora_cli.settings.setting_metadata import Metadata
from qlora_cli.settings.values import Alphas, NameList, Ranks, TargetModules, TargetParameters


class LoraSettings(Section):
    """The adapter, the only part that trains."""

    rank: Annotated[int, Metadata(flag="--rank", group=HelpGroup.ESSENTIALS, affects_memory=True)] = Field(
        default=16, ge=1, le=4096, description="Rank of the LoRA matrices."
    )
    alpha: Annotated[float, Metadata(flag="--alpha")] = Field(
        default=32, gt=0, description="LoRA's scale: updates are multiplied by alpha / rank."
    )
    dropout: Annotated[float, Metadata(affects_memory=True)] = Field(
        default=0.0, ge=0, lt=1, description="Dropout on the input of the LoRA branch."
    )
    target_modules: Annotated[TargetModules, Metadata(flag="--target-modules", affects_memory=True)] = Field(
        default="all-linear",
        description="Comma-separated names of the linear layers that get an adapter, or all-linear.",
    )
    target_parameters: Annotated[TargetParameters, Metadata(affects_memory=True)] = Field(
        default=None,
        description="Comma-separated names of fused expert parameters that get an adapter too, or all-experts.",
    )
    rank_pattern: Annotated[Ranks, Metadata(affects_memory=True)] = Field(
        default=None, description="Other ranks for some layers, as q_proj=32,layers.0.mlp.down_proj=8."
    )
    alpha_pattern: Alphas = Field(default=None, description="Other alphas for some layers, given the same way.")
    use_rslora: bool = Field(
        default=False, description="Scale by alpha / sqrt(rank), so that a large rank keeps learning (rsLoRA)."
    )
    use_dora: Annotated[bool, Metadata(affects_memory=True)] = Field(
        default=False, description="Train the magnitude of each weight separately from its direction (DoRA); slower."
    )
    init_lora_weights: Annotated[LoraInit, Metadata(flag="--lora-init", affects_memory=True)] = Field(
        default=LoraInit.DEFAULT,
        description="Initialization of the LoRA matrices: pissa takes the principal components of an unquantized "
        "base, loftq the error of 4-bit quantization, calibrated that error as your rows meet it.",
    )
    modules_to_save: Annotated[NameList, Metadata(affects_memory=True)] = Field(
        default=None, description="Comma-separated modules to train in full, in fp32, and save with the adapter."
    )
