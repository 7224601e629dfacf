"""Where a result is pushed to: the adapter of a run, or a merged model."""

from typing import Annotated, Protocol

from pydantic import Field

from qlora_cli.settings.help_groups import HelpGroup
from qlora_cli.settings.setting_metadata import Command, Metadata, OnResume
from qlora_cli.settings.values import Repository

MAKERS = (Command.TRAIN, Command.MERGE)

PushToHub = Annotated[
    Repository | None,
    Metadata(
        flag="--push-to-hub", group=HelpGroup.OUTPUT, commands=MAKERS, metavar="OWNER/NAME", on_resume=OnResume.FREE
    ),
    Field(description="Hub repository that the adapter, or the merged model, is pushed to at the end."),
]
HubPrivate = Annotated[
    bool,
    Metadata(flag="--private", off_flag="--public", commands=MAKERS, on_resume=OnResume.FREE),
    Field(description="Whether that repository is private, if it is created."),
]


class Pushed(Protocol):
    """The settings of a section with a result that may be pushed."""

    @property
    def push_to_hub(self) -> str | None:
        """The repository, as `OWNER/NAME`; None if nothing is pushed."""

    @property
    def hub_private(self) -> bool:
        """Whether the repository is private, if it is created."""
