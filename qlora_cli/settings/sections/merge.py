"""Settings of `qlora merge`."""

from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationInfo, field_validator

from qlora_cli.settings.choices import BaseWeights, ExportFormat, GgufType, MergeDtype
from qlora_cli.settings.help_groups import HelpGroup
from qlora_cli.settings.section import Section
from qlora_cli.settings.sections.pushing import HubPrivate, PushToHub
from qlora_cli.settings.setting_metadata import Command, EffectiveWith, Metadata, Named
from qlora_cli.settings.values import Datasets, Formats, Nats, Weights

MERGE = (Command.MERGE,)
OF_GGUF = EffectiveWith(key="formats", values=(ExportFormat.GGUF,))
CONVERTED = EffectiveWith(key="formats", values=(ExportFormat.GGUF, ExportFormat.GGUF_LORA))


class MergeSettings(Section):
    """Settings of `qlora merge`. Merging itself runs on the CPU."""

    adapters: Annotated[
        Datasets, Metadata(metavar="RUN_OR_ADAPTER", argument_of=MERGE, is_repeatable=True, names=Named.RUN)
    ] = Field(description="Run directory, adapter directory or hub id of an adapter; several are added together.")
    weights: Annotated[Weights, Metadata(flag="--weight", commands=MERGE, metavar="NUMBER", is_repeatable=True)] = (
        Field(
            default=(),
            validate_default=True,
            description="Weight of each adapter, in their order; 1 if not given.",
        )
    )
    output: Annotated[Path | None, Metadata(flag="--output", commands=MERGE)] = Field(
        default=None, description="Output directory; by default merged/ in the run, or NAME-merged here."
    )
    overwrite: Annotated[bool, Metadata(flag="--overwrite", commands=MERGE)] = Field(
        default=False, description="Replace an earlier merge in the output directory."
    )
    base: Annotated[BaseWeights, Metadata(flag="--base", commands=MERGE)] = Field(
        default=BaseWeights.AUTO,
        description="Weights to merge into: as stored, or dequantized, as in training. auto measures both.",
    )
    dtype: Annotated[MergeDtype, Metadata(flag="--dtype", group=HelpGroup.MEMORY, commands=MERGE)] = Field(
        default=MergeDtype.KEEP, description="Dtype of the result; keep is that of each tensor in the base."
    )
    formats: Annotated[Formats, Metadata(flag="--format", commands=MERGE, is_repeatable=True)] = Field(
        default=(ExportFormat.HF,), description="Format of the result; may be given several times."
    )
    verify: Annotated[bool, Metadata(flag="--verify", commands=MERGE)] = Field(
        default=True, description="Compare the result with the base with the adapter attached."
    )
    max_divergence: Annotated[Nats | None, Metadata(flag="--max-divergence", commands=MERGE, metavar="NATS")] = Field(
        default=None,
        description="Largest mean KL divergence per token that rounding may cause; no limit if not given.",
    )
    revision: Annotated[str | None, Metadata(flag="--revision", commands=MERGE)] = Field(
        default=None, description="Branch, tag or commit of an adapter on the hub."
    )
    llama_cpp: Annotated[Path | None, Metadata(flag="--llama-cpp", commands=MERGE, effective_with=CONVERTED)] = Field(
        default=None,
        description="Checkout of llama.cpp, for --format gguf; by default its converter is downloaded once.",
    )
    gguf_type: Annotated[GgufType, Metadata(flag="--gguf-type", commands=MERGE, effective_with=OF_GGUF)] = Field(
        default=GgufType.AUTO, description="Type of the weights in the GGUF file."
    )
    push_to_hub: PushToHub = None
    hub_private: HubPrivate = True

    @field_validator("weights")
    @classmethod
    def _one_for_each(cls, weights: tuple[float, ...], info: ValidationInfo) -> tuple[float, ...]:
        return weights or (1.0,) * len(info.data.get("adapters", ()))
