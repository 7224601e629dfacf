"""What `qlora load` does besides loading."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from qlora_cli.settings.field_marks import Command, Marks
from qlora_cli.settings.section import Section


class SavingSettings(Section):
    """What `qlora load` does besides loading."""

    save: Annotated[Path | None, Marks(flag="--save", commands=(Command.LOAD,))] = Field(
        default=None, description="Write the quantized checkpoint here."
    )
    error: Annotated[bool, Marks(flag="--error", commands=(Command.LOAD,))] = Field(
        default=False, description="Measure the quantization error of every weight."
    )
