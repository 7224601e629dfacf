"""The rows to train and evaluate on."""

from typing import Annotated

from pydantic import Field

from qlora_cli.settings.choices import LossOn, Mixing, OnBadRow, OnLong
from qlora_cli.settings.help_groups import HelpGroup
from qlora_cli.settings.objectives import DataFormat
from qlora_cli.settings.section import Section
from qlora_cli.settings.setting_metadata import DATA, TRAINING_DATA, Metadata, OnResume
from qlora_cli.settings.values import Columns, Datasets, HeldOut, Name


class DataSettings(Section):
    """The rows to train and evaluate on."""

    dataset: Annotated[
        Datasets,
        Metadata(
            flag="--dataset",
            group=HelpGroup.ESSENTIALS,
            commands=DATA,
            on_resume=OnResume.FREE,
            is_repeatable=True,
        ),
    ] = Field(
        description="Training data: a .jsonl, .json, .csv, .tsv, .parquet or .arrow file, a directory or a glob of "
        "them, DIRECTORY::SPLIT, or a hub id as ID[@REVISION][:CONFIG[:SPLIT]]; #500 after it takes a sample, *2 "
        "every row twice. May be given several times.",
    )
    eval_dataset: Annotated[
        Datasets | None,
        Metadata(
            flag="--eval-dataset",
            commands=TRAINING_DATA,
            affects_memory=True,
            on_resume=OnResume.FREE,
            is_repeatable=True,
        ),
    ] = Field(default=None, description="Held-out data, named the same way.")
    split: str = Field(
        default="train",
        min_length=1,
        description="Split to train on, of hub data sets and of directories that have any.",
    )
    eval_split: Annotated[
        HeldOut,
        Metadata(flag="--eval-split", group=HelpGroup.ESSENTIALS, commands=TRAINING_DATA, affects_memory=True),
    ] = Field(
        default=None,
        description="Rows to hold out of the training data, as a share (5% or 0.05) or a number; or the split to "
        "evaluate on, of a hub data set or a directory that has any.",
    )
    eval_group: Annotated[
        Name | None, Metadata(flag="--eval-group", group=HelpGroup.RARE, commands=TRAINING_DATA, metavar="COLUMN")
    ] = Field(
        default=None,
        description="Column that groups rows, such as a user or a document: rows with the same value are held out "
        "together, or trained.",
    )
    format: Annotated[
        DataFormat,
        Metadata(flag="--format", commands=DATA, on_resume=OnResume.FREE),
    ] = Field(default=DataFormat.AUTO, description="How rows are read; auto goes by the columns.")
    columns: Annotated[
        Columns,
        Metadata(flag="--columns", commands=DATA, on_resume=OnResume.FREE),
    ] = Field(
        default=None, description="Names of a format's columns in this data, as prompt=question,completion=reply."
    )
    loss_on: Annotated[LossOn, Metadata(flag="--loss-on", commands=DATA)] = Field(
        default=LossOn.COMPLETIONS,
        description="Train on all answers (completions, assistant turns), on the last one of a row, or on all tokens.",
    )
    max_length: Annotated[
        int,
        Metadata(flag="--max-length", group=HelpGroup.ESSENTIALS, commands=DATA, affects_memory=True),
    ] = Field(default=2048, ge=8, description="Longest row in tokens.")
    on_long: Annotated[OnLong, Metadata(flag="--on-long", commands=DATA)] = Field(
        default=OnLong.TRUNCATE,
        description="What to do with longer rows: truncate, drop, or error; reported in any case.",
    )
    accept_lost: Annotated[
        bool,
        Metadata(
            flag="--accept-lost",
            group=HelpGroup.RARE,
            commands=DATA,
            on_resume=OnResume.FREE,
        ),
    ] = Field(
        default=False,
        description="Continue if more than 1 % of the tokens to train are lost in rows that are too long, or if the "
        "chat template omits reasoning, or text next to tool calls, that is to be trained.",
    )
    on_bad_row: Annotated[
        OnBadRow,
        Metadata(
            flag="--on-bad-row",
            group=HelpGroup.RARE,
            commands=DATA,
            on_resume=OnResume.FREE,
        ),
    ] = Field(
        default=OnBadRow.ERROR,
        description="What to do with a row that can't be read; skipped ones are written to a file.",
    )
    drop_duplicates: Annotated[bool, Metadata(flag="--drop-duplicates", commands=DATA)] = Field(
        default=False, description="Train on each distinct row once."
    )
    mixing: Annotated[Mixing, Metadata(flag="--mixing", group=HelpGroup.RARE, commands=TRAINING_DATA)] = Field(
        default=Mixing.WEIGHTS,
        description="Meaning of the weights of several data sets: how often each row is used (weights), or "
        "probabilities, until the first data set is exhausted (first_exhausted) or all of them are (all_exhausted). "
        "For a stream they are always probabilities.",
    )
    packing: Annotated[bool, Metadata(flag="--packing", group=HelpGroup.MEMORY, affects_memory=True)] = Field(
        default=False,
        description="Pack short rows into rows of up to max_length, separate from each other.",
    )
    streaming: Annotated[bool, Metadata(flag="--streaming", group=HelpGroup.RARE)] = Field(
        default=False,
        description="Read and tokenize rows while training, for data that does not fit on the disk; needs max_steps.",
    )
