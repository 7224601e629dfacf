"""What `qlora merge` merges, into what, and what it writes."""

from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationInfo, field_validator

from qlora_cli.settings.choices import BaseWeights, ExportFormat, GgufType, MergeDtype
from qlora_cli.settings.section import Section
from qlora_cli.settings.sections.pushing import HubPrivate, PushToHub
from qlora_cli.settings.setting_metadata import Command, EffectiveWith, Metadata
from qlora_cli.settings.values import Datasets, Formats, Nats, Weights

MERGE = (Command.MERGE,)
OF_GGUF = EffectiveWith(key="formats", values=(ExportFormat.GGUF,))


class MergeSettings(Section):
    """What `qlora merge` merges, into what, and what it writes. Merging itself is done on the CPU."""

    adapters: Annotated[Datasets, Metadata(metavar="RUN_OR_ADAPTER", argument_of=MERGE, is_repeatable=True)] = Field(
        description="Run directory, adapter directory or hub id of an adapter; several are added together."
    )
    weights: Annotated[Weights, Metadata(flag="--weight", commands=MERGE, metavar="NUMBER", is_repeatable=True)] = (
        Field(
            default=(),
            validate_default=True,
            description="How much an adapter counts, in their order; 1 if not given.",
        )
    )
    output: Annotated[Path | None, Metadata(flag="--output", commands=MERGE)] = Field(
        default=None, description="Where the result goes: merged/ in the run, or NAME-merged here, if it is not given."
    )
    base: Annotated[BaseWeights, Metadata(flag="--base", commands=MERGE)] = Field(
        default=BaseWeights.AUTO,
        description="Weights to merge into: as stored, or dequantized, as training saw them. auto measures both.",
    )
    dtype: Annotated[MergeDtype, Metadata(flag="--dtype", commands=MERGE)] = Field(
        default=MergeDtype.KEEP, description="What the result is written in; keep is each tensor's own."
    )
    formats: Annotated[Formats, Metadata(flag="--format", commands=MERGE, is_repeatable=True)] = Field(
        default=(ExportFormat.HF,), description="What is written; may be given several times."
    )
    verify: Annotated[bool, Metadata(flag="--verify", commands=MERGE)] = Field(
        default=True, description="Compare the result with the base that has the adapter on it."
    )
    max_divergence: Annotated[Nats | None, Metadata(flag="--max-divergence", commands=MERGE, metavar="NATS")] = Field(
        default=None,
        description="Largest mean KL divergence a token that rounding may make; no bound if it is not given.",
    )
    revision: Annotated[str | None, Metadata(flag="--revision", commands=MERGE)] = Field(
        default=None, description="Branch, tag or commit of an adapter on the hub."
    )
    llama_cpp: Annotated[Path | None, Metadata(flag="--llama-cpp", commands=MERGE, effective_with=OF_GGUF)] = Field(
        default=None, description="Checkout of llama.cpp, for --format gguf."
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
