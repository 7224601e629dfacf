"""The flags: which setting each one sets. Help, choices and defaults come from the setting itself.

Every flag of a setting takes text, so that pydantic sees all values and all problems are told at once.
"""

from collections.abc import Iterable
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from qlora_cli.settings.models import SECTIONS, LoadSettings
from qlora_cli.settings.resolve import Resolved, Sources, choices_of, resolve

SettingsT = TypeVar("SettingsT", bound=LoadSettings)

FLAGS: dict[str, str] = {
    "model.name": "--model",
    "model.revision": "--revision",
    "model.dtype": "--dtype",
    "model.device": "--device",
    "model.attention": "--attention",
    "quantization.method": "--quant",
    "quantization.double_quant": "--double-quant",
    "lora.rank": "--rank",
    "lora.alpha": "--alpha",
    "lora.target_modules": "--target-modules",
    "data.dataset": "--dataset",
    "data.eval_dataset": "--eval-dataset",
    "data.max_length": "--max-length",
    "training.learning_rate": "--learning-rate",
    "training.epochs": "--epochs",
    "training.max_steps": "--max-steps",
    "training.micro_batch_size": "--micro-batch-size",
    "training.gradient_accumulation_steps": "--gradient-accumulation-steps",
    "training.gradient_checkpointing": "--gradient-checkpointing",
    "training.optimizer": "--optimizer",
    "training.seed": "--seed",
    "output.directory": "--output",
    "output.report_to": "--report-to",
}
METAVARS: tuple[tuple[type, str], ...] = ((int, "INTEGER"), (float, "NUMBER"), (Path, "DIRECTORY"))


def setting(path: str) -> Any:
    """Return the option of the setting `section.key`, described by the setting itself."""
    flag = FLAGS[path]
    if path == "quantization.double_quant":
        return typer.Option(f"{flag}/--no-{flag.removeprefix('--')}", help=describe(path), show_default=False)
    return typer.Option(flag, help=describe(path), metavar=metavar(path), show_default=False)


def describe(path: str) -> str:
    """Return a setting's line of help with its default."""
    section, key = path.split(".")
    field = SECTIONS[section].model_fields[key]
    text = field.description or ""
    if field.is_required() or field.default is None:
        return text
    default = field.default.value if isinstance(field.default, Enum) else field.default
    return f"{text} [default: {str(default).lower() if isinstance(default, bool) else default}]"


def metavar(path: str) -> str:
    """Return what a flag takes: its choices, or the kind of value."""
    if choices := choices_of(path):
        return "|".join(choices)
    section, key = path.split(".")
    annotation = str(SECTIONS[section].model_fields[key].annotation)
    for kind, name in METAVARS:
        if kind.__name__ in annotation:
            return name
    return "TEXT"


Model = Annotated[str | None, setting("model.name")]
Revision = Annotated[str | None, setting("model.revision")]
Dtype = Annotated[str | None, setting("model.dtype")]
Device = Annotated[str | None, setting("model.device")]
Attention = Annotated[str | None, setting("model.attention")]
Quant = Annotated[str | None, setting("quantization.method")]
DoubleQuant = Annotated[bool | None, setting("quantization.double_quant")]
Rank = Annotated[str | None, setting("lora.rank")]
Alpha = Annotated[str | None, setting("lora.alpha")]
TargetModules = Annotated[str | None, setting("lora.target_modules")]
DatasetName = Annotated[str | None, setting("data.dataset")]
EvalDataset = Annotated[str | None, setting("data.eval_dataset")]
MaxLength = Annotated[str | None, setting("data.max_length")]
LearningRate = Annotated[str | None, setting("training.learning_rate")]
Epochs = Annotated[str | None, setting("training.epochs")]
MaxSteps = Annotated[str | None, setting("training.max_steps")]
MicroBatchSize = Annotated[str | None, setting("training.micro_batch_size")]
GradientAccumulationSteps = Annotated[str | None, setting("training.gradient_accumulation_steps")]
GradientCheckpointing = Annotated[str | None, setting("training.gradient_checkpointing")]
Optimizer = Annotated[str | None, setting("training.optimizer")]
Seed = Annotated[str | None, setting("training.seed")]
Output = Annotated[str | None, setting("output.directory")]
ReportTo = Annotated[str | None, setting("output.report_to")]
Config = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="YAML file of settings; flags and --set override it.")
]
Assign = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Any setting, by its full name; may be repeated."),
]
Json = Annotated[bool, typer.Option("--json", help="Print exactly one JSON object on stdout.")]

# The parameter of a command that takes each setting, by the flag's name: `--max-length` is `max_length`.
PARAMETERS = {path: flag.removeprefix("--").replace("-", "_") for path, flag in FLAGS.items()}


def read_sources(context: typer.Context) -> Sources:
    """Return what the command line gave, from the parameters of the command that is running."""
    given: dict[str, Any] = context.params
    flags = {
        path: (_given_as(context, path, given[name]), given[name])
        for path, name in PARAMETERS.items()
        if given.get(name) is not None
    }
    assignments: Iterable[str] = given.get("assignments") or ()
    return Sources(config=given.get("config"), assignments=tuple(assignments), flags=flags)


def resolve_settings(context: typer.Context, kind: type[SettingsT]) -> Resolved[SettingsT]:
    """Return the validated settings of the command that is running.

    Raises:
        SettingsError: with every problem found.
    """
    names = {path: _name_of(context, path) for path in FLAGS}
    return resolve(read_sources(context), kind, names)


def _given_as(context: typer.Context, path: str, value: Any) -> str:
    """Return what was typed for a setting: a switch that is off was `--no-…`."""
    name = _name_of(context, path)
    return f"--no-{name.removeprefix('--')}" if value is False else name


def _name_of(context: typer.Context, path: str) -> str:
    """Return what the running command calls a setting: a flag, or an argument in capitals."""
    name = PARAMETERS[path]
    positional = {parameter.name for parameter in context.command.params if parameter.param_type_name == "argument"}
    return name.upper() if name in positional else FLAGS[path]
