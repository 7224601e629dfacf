"""Settings of `qlora evaluate`, besides the rows."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from qlora_cli.settings.section import Section
from qlora_cli.settings.setting_metadata import Command, Metadata
from qlora_cli.settings.values import DistinctNames

EVALUATE = (Command.EVALUATE,)


class EvaluationSettings(Section):
    """Settings of `qlora evaluate`, besides the rows."""

    split: Annotated[str | None, Metadata(flag="--split", commands=EVALUATE)] = Field(
        default=None,
        min_length=1,
        description="Split of what --dataset names, a hub data set or a directory; test if not given.",
    )
    with_base: Annotated[bool | None, Metadata(flag="--base", off_flag="--no-base", commands=EVALUATE)] = Field(
        default=None, description="Evaluate the base without its adapter, too; the default for an adapter."
    )
    with_unquantized: Annotated[bool, Metadata(flag="--unquantized", commands=EVALUATE)] = Field(
        default=False,
        description="Evaluate the same model unquantized, too, after the first was freed: what quantization costs.",
    )
    merged: Annotated[Path | None, Metadata(flag="--merged", commands=EVALUATE)] = Field(
        default=None,
        description="Merged model to compare with; by default what qlora merge wrote into the run.",
    )
    batch_size: Annotated[int, Metadata(flag="--batch-size", commands=EVALUATE)] = Field(
        default=8, ge=1, description="Rows in a batch; halved if they do not fit."
    )
    tasks: Annotated[DistinctNames, Metadata(flag="--tasks", commands=EVALUATE)] = Field(
        default=(),
        description="Comma-separated tasks of lm-eval, or YAML files of your own; needs 'qlora-cli[eval]'.",
    )
    task_path: Annotated[Path | None, Metadata(flag="--task-path", commands=EVALUATE)] = Field(
        default=None, description="Directory with more tasks."
    )
    limit: Annotated[int | None, Metadata(flag="--limit", commands=EVALUATE)] = Field(
        default=None, ge=1, description="Documents of each task."
    )
