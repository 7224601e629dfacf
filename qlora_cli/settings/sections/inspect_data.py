"""What `qlora inspect-data` shows."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from qlora_cli.settings.field_marks import Command, Marks
from qlora_cli.settings.section import Section


class PreviewSettings(Section):
    """What `qlora inspect-data` shows."""

    rows: Annotated[int, Marks(flag="--rows", commands=(Command.INSPECT_DATA,))] = Field(
        default=3, ge=0, description="Rows to show token by token."
    )
    html: Annotated[Path | None, Marks(flag="--html", commands=(Command.INSPECT_DATA,), metavar="FILE")] = Field(
        default=None, description="Write all of it as a web page, in one file."
    )
