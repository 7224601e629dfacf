"""The output of a run: its directory, tracker and repository."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from qlora_cli.settings.choices import ReportTo
from qlora_cli.settings.help_groups import HelpGroup
from qlora_cli.settings.section import Section
from qlora_cli.settings.sections.pushing import HubPrivate, PushToHub
from qlora_cli.settings.setting_metadata import Metadata, Named, OnResume
from qlora_cli.settings.values import Resume


class OutputSettings(Section):
    """The output of a run: its directory, tracker and repository."""

    directory: Annotated[
        Path, Metadata(flag="--output", group=HelpGroup.ESSENTIALS, on_resume=OnResume.FREE, names=Named.RUN)
    ] = Field(description="Run directory: empty, new, or that of a run to resume.")
    resume: Annotated[Resume, Metadata(flag="--resume", group=HelpGroup.RARE, on_resume=OnResume.FREE)] = Field(
        default="auto",
        description="auto: resume from the last good checkpoint in the run directory, if there is one; never; or the "
        "path of a checkpoint.",
    )
    max_checkpoints: Annotated[int, Metadata(on_resume=OnResume.FREE)] = Field(
        default=2, ge=1, description="Number of checkpoints to keep, besides the best one; older ones are deleted."
    )
    report_to: Annotated[ReportTo, Metadata(flag="--report-to", on_resume=OnResume.FREE)] = Field(
        default=ReportTo.NONE, description="Tracker that the run is also reported to."
    )
    push_to_hub: PushToHub = None
    hub_private: HubPrivate = True
