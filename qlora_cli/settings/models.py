"""The settings of all commands, by section, and the sections that each command needs.

The command line, `qlora config schema`, the settings file and `run.json` all use these models. A setting is declared
once, in the module of its section. Names are the field's own: rank, alpha, micro_batch_size, max_length.
"""

import functools
from pathlib import Path
from typing import Any

from pydantic import Field, TypeAdapter, create_model
from pydantic.fields import FieldInfo

from qlora_cli.settings.choices import Device
from qlora_cli.settings.section import Section
from qlora_cli.settings.sections.data import DataSettings
from qlora_cli.settings.sections.evaluate import EvaluationSettings
from qlora_cli.settings.sections.generate import AnswerSettings
from qlora_cli.settings.sections.inspect_data import PreviewSettings
from qlora_cli.settings.sections.inspect_memory import PredictionSettings
from qlora_cli.settings.sections.load import SavingSettings
from qlora_cli.settings.sections.lora import LoraSettings
from qlora_cli.settings.sections.merge import MergeSettings
from qlora_cli.settings.sections.model import ModelSettings
from qlora_cli.settings.sections.output import OutputSettings
from qlora_cli.settings.sections.quantization import UNQUANTIZED, QuantizationSettings
from qlora_cli.settings.sections.training import TrainingSettings
from qlora_cli.settings.setting_metadata import Command, Metadata, field_metadata
from qlora_cli.settings.values import Datasets, Prompts

__all__ = [
    "SECTIONS",
    "UNQUANTIZED",
    "AnswerSettings",
    "ChatSettings",
    "DataSettings",
    "EstimateDataSettings",
    "EstimateSettings",
    "EvaluateSettings",
    "EvaluationSettings",
    "GenerateSettings",
    "InspectDataSettings",
    "InspectMemoryOfDataSettings",
    "InspectMemorySettings",
    "LoadCommandSettings",
    "LoadSettings",
    "LoraSettings",
    "MergeCommandSettings",
    "MergeSettings",
    "ModelSettings",
    "OutputSettings",
    "PredictionSettings",
    "PreviewSettings",
    "PromptedSettings",
    "QuantizationSettings",
    "SavingSettings",
    "Section",
    "TrainSettings",
    "TrainingSettings",
    "json_schema",
]


class LoadSettings(Section):
    """The settings needed to load a model."""

    model: ModelSettings
    quantization: QuantizationSettings = Field(default_factory=QuantizationSettings)


class LoadCommandSettings(LoadSettings):
    """The settings of `qlora load`."""

    load: SavingSettings = Field(default_factory=SavingSettings)


class TrainSettings(LoadSettings):
    """The settings of `qlora train`."""

    lora: LoraSettings = Field(default_factory=LoraSettings)
    data: DataSettings
    training: TrainingSettings = Field(default_factory=TrainingSettings)
    output: OutputSettings


class InspectDataSettings(LoadSettings):
    """The settings of `qlora inspect-data`: those of `train` that determine which tokens are trained."""

    data: DataSettings
    training: TrainingSettings = Field(default_factory=TrainingSettings)
    inspect_data: PreviewSettings = Field(default_factory=PreviewSettings)


class EvaluateDataSettings(DataSettings):
    """The rows to evaluate on; by default those that the run held out."""

    dataset: Datasets | None = Field(  # type: ignore[assignment]
        default=None,
        description="Rows to evaluate on, named as training data is; may be repeated. Of a run: by default those that "
        "it held out.",
    )


class EvaluateSettings(LoadSettings):
    """The settings of `qlora evaluate`: what is measured, and those of `train` that determine the trained tokens."""

    data: EvaluateDataSettings = Field(default_factory=EvaluateDataSettings)
    training: TrainingSettings = Field(default_factory=TrainingSettings)
    evaluate: EvaluationSettings = Field(default_factory=EvaluationSettings)


class ChatSettings(LoadSettings):
    """The settings of `qlora chat`."""

    generate: AnswerSettings = Field(default_factory=AnswerSettings)


class PromptedSettings(AnswerSettings):
    """The settings of generation, with prompts."""

    prompts: Prompts = Field(description="What to answer; may be given several times. - reads it from stdin.")


class GenerateSettings(LoadSettings):
    """The settings of `qlora generate`."""

    generate: PromptedSettings


class MergeModelSettings(ModelSettings):
    """The base to merge into, which the adapters name."""

    name: str | None = Field(default=None, description="Not read: adapters name their base.")  # type: ignore[assignment]
    device: Device = Field(
        default=Device.AUTO, description="Where models run to be compared; merging itself needs no GPU."
    )


class MergeCommandSettings(Section):
    """The settings of `qlora merge`: the base, and what is merged into it."""

    model: MergeModelSettings = Field(default_factory=MergeModelSettings)
    merge: MergeSettings


class EstimateDataSettings(DataSettings):
    """The rows of a predicted run, of which only the length matters."""

    dataset: Datasets | None = Field(  # type: ignore[assignment]
        default=None,
        description="Training data, named as for train: predicts its longest row, and the time of the run over its "
        "micro-batches. Not read if only a settings file names it.",
    )


class EstimateSettings(LoadSettings):
    """The settings of a prediction: those of `train` without the data and the output."""

    lora: LoraSettings = Field(default_factory=LoraSettings)
    data: EstimateDataSettings = Field(default_factory=EstimateDataSettings)
    training: TrainingSettings = Field(default_factory=TrainingSettings)

    @property
    def longest_row_tokens(self) -> int:
        """The most tokens that a row may have: of a pair, those of both sequences."""
        return self.training.objective.num_sequences * self.data.max_length


class EstimateOutputSettings(OutputSettings):
    """The output of a predicted run, of which only the number of checkpoints matters."""

    directory: Path | None = Field(default=None, description="Not written: nothing is trained.")  # type: ignore[assignment]


class InspectMemorySettings(EstimateSettings):
    """The settings of `qlora inspect-memory`: those of the run and of its prediction."""

    output: EstimateOutputSettings = Field(default_factory=EstimateOutputSettings)
    inspect_memory: PredictionSettings = Field(default_factory=PredictionSettings)


class InspectMemoryOfDataSettings(InspectMemorySettings):
    """The settings of `qlora inspect-memory --dataset`: the rules for data apply, since it is read."""

    data: DataSettings  # type: ignore[assignment]


SECTIONS: dict[str, type[Section]] = {
    "model": ModelSettings,
    "quantization": QuantizationSettings,
    "lora": LoraSettings,
    "data": DataSettings,
    "training": TrainingSettings,
    "output": OutputSettings,
    "load": SavingSettings,
    "inspect_data": PreviewSettings,
    "inspect_memory": PredictionSettings,
    "generate": AnswerSettings,
    "evaluate": EvaluationSettings,
    "merge": MergeSettings,
}


# The settings of each command.
KINDS: dict[Command, type[Section]] = {
    Command.LOAD: LoadCommandSettings,
    Command.TRAIN: TrainSettings,
    Command.INSPECT_MEMORY: InspectMemorySettings,
    Command.INSPECT_DATA: InspectDataSettings,
    Command.MERGE: MergeCommandSettings,
    Command.GENERATE: GenerateSettings,
    Command.CHAT: ChatSettings,
    Command.EVALUATE: EvaluateSettings,
}


def field_of(path: str) -> FieldInfo:
    """Return the field of the setting `section.key`."""
    section, key = path.split(".")
    return SECTIONS[section].model_fields[key]


@functools.cache
def value_adapter(section: type[Section], key: str) -> TypeAdapter[Any]:
    """Return what validates a value of the field `key` of a section without the rest of it."""
    return TypeAdapter(section.model_fields[key].rebuild_annotation())


def metadata_of(path: str) -> Metadata:
    """Return the metadata of the setting `section.key`."""
    return field_metadata(field_of(path))


def all_settings() -> list[str]:
    """Return all settings, as `section.key`."""
    return [f"{section}.{key}" for section, model in SECTIONS.items() for key in model.model_fields]


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of a settings file; nothing is required, because flags may give the rest."""
    sections: dict[str, Any] = {name: (kind, ...) for name, kind in SECTIONS.items()}
    file: type[Section] = create_model("Settings", __base__=Section, **sections)
    schema = file.model_json_schema()
    for part in (schema, *schema["$defs"].values()):
        part.pop("required", None)
    schema["title"] = "Settings of qlora"
    schema["description"] = "What a settings file may contain."
    return schema


def sections_of(kind: type[Section]) -> dict[str, type[Section]]:
    """Return the class of each section: that of `kind` if it has one, otherwise the common one."""
    sections = dict(SECTIONS)
    for name, field in kind.model_fields.items():
        assert isinstance(field.annotation, type), name
        assert issubclass(field.annotation, Section), name
        sections[name] = field.annotation
    return sections
