"""Settings of `qlora load`, besides those of loading."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from qlora_cli.settings.section import Section
from qlora_cli.settings.setting_metadata import Command, Metadata


class SavingSettings(Section):
    """Settings of `qlora load`, besides those of loading."""

    save: Annotated[Path | None, Metadata(flag="--save", commands=(Command.LOAD,))] = Field(
        default=None, description="Directory to write the quantized checkpoint to."
    )
    error: Annotated[bool, Metadata(flag="--error", commands=(Command.LOAD,))] = Field(
        default=False, description="Measure the quantization error of every weight."
    )
