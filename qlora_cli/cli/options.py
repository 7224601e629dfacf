"""The flags: which setting each one sets. Help, choices and defaults come from the setting itself.

Every flag of a setting takes text, so that pydantic sees all values and all problems are told at once.
"""

import functools
import inspect
from collections.abc import Callable, Collection, Iterable
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

import typer

from qlora_cli.settings.models import SECTIONS, LoadSettings
from qlora_cli.settings.resolve import Resolved, Sources, choices_of, resolve

SettingsT = TypeVar("SettingsT", bound=LoadSettings)
Command = TypeVar("Command", bound=Callable[..., None])

FLAGS: dict[str, str] = {
    "model.name": "--model",
    "model.revision": "--revision",
    "model.base_model": "--base-model",
    "model.dtype": "--dtype",
    "model.device": "--device",
    "model.attention": "--attention",
    "model.offload_embedding": "--offload-embedding",
    "model.new_tokens": "--new-tokens",
    "model.resize_vocab": "--resize-vocab",
    "model.rope_scaling": "--rope-scaling",
    "model.chat_template": "--chat-template",
    "model.allow_pickle": "--allow-pickle",
    "model.trust_remote_code": "--trust-remote-code",
    "quantization.method": "--quant",
    "quantization.double_quant": "--double-quant",
    "lora.rank": "--rank",
    "lora.alpha": "--alpha",
    "lora.target_modules": "--target-modules",
    "data.dataset": "--dataset",
    "data.eval_dataset": "--eval-dataset",
    "data.eval_split": "--eval-split",
    "data.format": "--format",
    "data.columns": "--columns",
    "data.loss_on": "--loss-on",
    "data.max_length": "--max-length",
    "data.on_long": "--on-long",
    "data.accept_lost": "--accept-lost",
    "data.on_bad_row": "--on-bad-row",
    "data.drop_duplicates": "--drop-duplicates",
    "data.packing": "--packing",
    "data.streaming": "--streaming",
    "training.learning_rate": "--learning-rate",
    "training.epochs": "--epochs",
    "training.max_steps": "--max-steps",
    "training.micro_batch_size": "--micro-batch-size",
    "training.gradient_accumulation_steps": "--gradient-accumulation-steps",
    "training.gradient_checkpointing": "--gradient-checkpointing",
    "training.auto_micro_batch": "--auto-micro-batch",
    "training.optimizer": "--optimizer",
    "training.schedule": "--schedule",
    "training.sampling": "--sampling",
    "training.longest_first": "--longest-first",
    "training.seed": "--seed",
    "training.on_nan": "--on-nan",
    "training.eval_steps": "--eval-steps",
    "training.save_steps": "--save-steps",
    "training.sample_prompts": "--sample-prompt",
    "output.directory": "--output",
    "output.resume": "--resume",
    "output.report_to": "--report-to",
    "output.push_to_hub": "--push-to-hub",
}
# The parameter of a command that takes each setting, by the flag's name: `--max-length` is `max_length`.
PARAMETERS = {path: flag.removeprefix("--").replace("-", "_") for path, flag in FLAGS.items()}
REPEATABLE = ("data.dataset", "data.eval_dataset", "training.sample_prompts")
METAVARS: tuple[tuple[type, str], ...] = ((int, "INTEGER"), (float, "NUMBER"), (Path, "DIRECTORY"))


def setting(path: str) -> inspect.Parameter:
    """Return the parameter of a command that takes the setting `section.key`, described by the setting itself."""
    flag = FLAGS[path]
    if is_switch(path):
        kind: Any = bool | None
        option = typer.Option(f"{flag}/--no-{flag.removeprefix('--')}", help=describe(path), show_default=False)
    else:
        kind = list[str] | None if is_repeatable(path) else str | None
        option = typer.Option(flag, help=describe(path), metavar=metavar(path), show_default=False)
    return _parameter(PARAMETERS[path], Annotated[kind, option])


def _parameter(name: str, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def is_switch(path: str) -> bool:
    """Whether the setting is on or off."""
    section, key = path.split(".")
    return SECTIONS[section].model_fields[key].annotation is bool


def is_repeatable(path: str) -> bool:
    """Whether the setting's flag may be given several times."""
    return path in REPEATABLE


def takes(
    *sections: str, positional: str | None = None, without: Collection[str] = ()
) -> Callable[[Command], Command]:
    """Give a command the flags of every setting in `sections`, and `--config` and `--set`.

    The command itself names only what is its own; settings are read from the context by `resolve_settings`.
    `positional` is a setting that is given as an argument, not by its flag; `without` are settings that mean nothing
    to the command, which get no flag.
    """
    assert set(without) <= FLAGS.keys(), "a setting without a flag can't be left out"

    def give(command: Command) -> Command:
        own = inspect.signature(command).parameters

        @functools.wraps(command)
        def wrapper(context: typer.Context, **given: Any) -> Any:
            return command(context, **{name: value for name, value in given.items() if name in own})

        parameters = [own["context"]]
        if positional is not None:
            argument = typer.Argument(help=describe(positional), show_default=False)
            parameters.append(_parameter(PARAMETERS[positional], Annotated[str | None, argument]))
        given_otherwise = {positional, *without}
        paths = (path for path in FLAGS if path.split(".")[0] in sections and path not in given_otherwise)
        parameters += [setting(path) for path in paths]
        parameters += [_parameter("config", Config), _parameter("assignments", Assign)]
        parameters += [
            parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for name, parameter in own.items()
            if name != "context"
        ]
        wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        del wrapper.__wrapped__  # what would otherwise be read for type hints
        return cast(Command, wrapper)

    return give


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


Config = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="YAML file of settings; flags and --set override it.")
]
Assign = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Any setting, by its full name; may be repeated."),
]
Json = Annotated[bool, typer.Option("--json", help="Print exactly one JSON object on stdout.")]


def read_sources(context: typer.Context) -> Sources:
    """Return what the command line gave, from the parameters of the command that is running."""
    given: dict[str, Any] = context.params
    flags = {
        path: (_given_as(context, path, given[name]), given[name])
        for path, name in PARAMETERS.items()
        if given.get(name) not in (None, ())  # of a flag that may be repeated, no value is an empty tuple
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
