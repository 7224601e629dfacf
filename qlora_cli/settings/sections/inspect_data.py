"""Settings of `qlora inspect-data`."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from qlora_cli.settings.section import Section
from qlora_cli.settings.setting_metadata import Command, Metadata


class PreviewSettings(Section):
    """Settings of `qlora inspect-data`."""

    rows: Annotated[int, Metadata(flag="--rows", commands=(Command.INSPECT_DATA,))] = Field(
        default=3, ge=0, description="Rows to show token by token."
    )
    html: Annotated[Path | None, Metadata(flag="--html", commands=(Command.INSPECT_DATA,), metavar="FILE")] = Field(
        default=None, description="Write the report as a web page, in one file."
    )
