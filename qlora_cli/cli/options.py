"""Create the flags of settings from their metadata, which says which flag sets them, and which commands take it.

All flags of settings take text, so that pydantic validates all values and all problems are reported at once.
"""

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, cast

import typer
from pydantic.fields import FieldInfo

from qlora_cli.cli.completion import complete_preset, completion_of, completion_of_assignment
from qlora_cli.cli.failures import WHERE
from qlora_cli.cli.volume import Quiet, Verbose
from qlora_cli.cli.without_cache import ensure_cache
from qlora_cli.settings.display import display_default, is_switch, metavar
from qlora_cli.settings.files.preset_files import preset_file
from qlora_cli.settings.help_groups import HelpGroup
from qlora_cli.settings.models import KINDS, Section, metadata_of, sections_of
from qlora_cli.settings.setting_metadata import TRAINING_DATA, Command, Metadata

if TYPE_CHECKING:
    from qlora_cli.settings.resolve import Resolved, Sources

SettingsT = TypeVar("SettingsT", bound=Section)
Function = TypeVar("Function", bound=Callable[..., None])

SECTION_GROUPS = {  # of flags in help that have none of their own; those of a command's own section come first
    "model": HelpGroup.RARE,
    "quantization": HelpGroup.MEMORY,
    "lora": HelpGroup.ADAPTER,
    "data": HelpGroup.DATA,
    "training": HelpGroup.OPTIMIZATION,
    "output": HelpGroup.OUTPUT,
}
SEPARATOR = "__"  # of section and key in the name of a command's parameter: `lora__rank` takes lora.rank


def settings_of(command: Command) -> Iterator[tuple[str, FieldInfo]]:
    """Yield each setting that `command` has a flag or an argument for, as `section.key`, with its field."""
    kind = KINDS[command]
    for name, section in sections_of(kind).items():
        for key, field in section.model_fields.items():
            if name in kind.model_fields and metadata_of(f"{name}.{key}").is_taken_by(command):
                yield f"{name}.{key}", field


def parameter_of(path: str) -> str:
    """Return the name of a command's parameter for the setting `section.key`."""
    return path.replace(".", SEPARATOR)


def takes(command: Command, *, has_volume: bool = True) -> Callable[[Function], Function]:
    """Decorate a command with flags and arguments of all settings that it takes, and `--config`, `--set` and the like.

    `has_volume` adds `--quiet` and `--verbose`. The command's signature has only its own parameters;
    `resolve_settings` reads settings from the context.
    """

    def give(function: Function) -> Function:
        own = inspect.signature(function).parameters

        @functools.wraps(function)
        def wrapper(context: typer.Context, **given: Any) -> Any:
            return function(context, **{name: value for name, value in given.items() if name in own})

        fields = dict(sorted(settings_of(command), key=lambda entry: not entry[1].is_required()))
        arguments = [path for path in fields if command in metadata_of(path).argument_of]
        parameters = [own["context"], *(_argument(path, fields.pop(path), command) for path in arguments)]
        parameters += [_option(path, field, command) for path, field in fields.items()]
        parameters += [
            _parameter("config", Config),
            _parameter("assignments", Annotated[list[str] | None, _assign_option(command)]),
        ]
        if command in TRAINING_DATA:
            parameters += [_parameter("preset", PresetName)]
        if has_volume:
            parameters += [_parameter("quiet", Quiet, default=False), _parameter("verbose", Verbose, default=False)]
        parameters += [
            parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for name, parameter in own.items()
            if name != "context"
        ]
        wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        del wrapper.__wrapped__  # otherwise its type hints would be read
        return cast(Function, wrapper)

    return give


def _option(path: str, field: FieldInfo, command: Command) -> inspect.Parameter:
    """Return the parameter for the flag of a setting."""
    metadata = metadata_of(path)
    flag = cast(str, metadata.flag)
    if is_switch(field):
        kind: Any = bool | None
        option = typer.Option(
            f"{flag}/{off_flag(metadata)}", help=describe(field), show_default=False, rich_help_panel=group_of(path)
        )
    else:
        kind = list[str] | None if metadata.is_repeatable else str | None
        option = typer.Option(
            flag,
            help=describe(field),
            metavar=metavar(field),
            show_default=False,
            autocompletion=completion_of(path, field, command),
            rich_help_panel=group_of(path),
        )
    return _parameter(parameter_of(path), Annotated[kind, option])


def _argument(path: str, field: FieldInfo, command: Command) -> inspect.Parameter:
    """Return the parameter for a setting that is an argument."""
    metadata = metadata_of(path)
    argument = typer.Argument(
        metavar=argument_name(metadata),
        help=describe(field),
        show_default=False,
        autocompletion=completion_of(path, field, command),
    )
    kind: Any = list[str] | None if metadata.is_repeatable else str | None
    return _parameter(parameter_of(path), Annotated[kind, argument])


def _assign_option(command: Command | None = None) -> Any:
    return typer.Option(
        "--set",
        metavar="SECTION.KEY=VALUE",
        help="Any setting, by its full name; may be repeated.",
        rich_help_panel=HelpGroup.ESSENTIALS,
        autocompletion=None if command is None else completion_of_assignment(command),
    )


def _parameter(name: str, annotation: Any, default: object = None) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def group_of(path: str) -> str:
    """Return the group of a setting's flag in help."""
    return metadata_of(path).group or SECTION_GROUPS.get(path.partition(".")[0], HelpGroup.ESSENTIALS)


def off_flag(metadata: Metadata) -> str:
    """Return the flag that turns a switch off."""
    return metadata.off_flag or f"--no-{cast(str, metadata.flag).removeprefix('--')}"


def argument_name(metadata: Metadata) -> str:
    """Return the name of a setting as an argument: `MODEL` for `--model`."""
    return metadata.metavar or f"{metadata.flag}".removeprefix("--").replace("-", "_").upper()


def describe(field: FieldInfo) -> str:
    """Return the help of a setting, with its default."""
    default = display_default(field)
    return f"{field.description or ''}{'' if default is None else f' [default: {default}]'}"


Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE",
        help="YAML file of settings; flags and --set override it.",
        rich_help_panel=HelpGroup.ESSENTIALS,
    ),
]
PresetName = Annotated[
    str | None,
    typer.Option(
        "--preset",
        metavar="NAME",
        help="Settings for a common model and card, which all others override; qlora presets lists them.",
        rich_help_panel=HelpGroup.ESSENTIALS,
        autocompletion=complete_preset,
    ),
]
Assign = Annotated[list[str] | None, _assign_option()]
Json = Annotated[bool, typer.Option("--json", help="Print exactly one JSON object on stdout.")]
Force = Annotated[
    bool,
    typer.Option(
        "--force",
        help="Go on although the run is predicted not to fit on the GPU.",
        rich_help_panel=HelpGroup.RARE,
    ),
]


def is_setting_parameter(parameter: Any) -> bool:
    """Return whether a parameter of a command sets settings."""
    return SEPARATOR in parameter.name or parameter.name in {"config", "assignments", "preset"}


def read_sources(context: typer.Context) -> "Sources":
    """Return the sources of settings on the command line, from the parameters of the running command."""
    from qlora_cli.settings.resolve import Sources  # reads YAML: not for the help

    given: dict[str, Any] = context.params
    flags = {}
    for name, value in given.items():
        section, separator, key = name.partition(SEPARATOR)
        if separator and value not in (None, ()):  # a repeatable flag that is not given is an empty tuple
            path = f"{section}.{key}"
            flags[path] = (_flag_as_given(context, path, value), value)
    assignments: Iterable[str] = given.get("assignments") or ()
    preset = given.get("preset")
    file = None if preset is None else preset_file(preset)
    return Sources(preset=file, config=given.get("config"), assignments=tuple(assignments), flags=flags)


def resolve_settings(context: typer.Context, kind: type[SettingsT]) -> "Resolved[SettingsT]":
    """Return the validated settings of the running command.

    Raises:
        SettingsError: with every problem found.
    """
    from qlora_cli.settings.resolve import resolve  # likewise

    named = (name.partition(SEPARATOR) for name in context.params if SEPARATOR in name)
    paths = [f"{section}.{key}" for section, _, key in named]
    resolved = resolve(read_sources(context), kind, {path: _name_of(context, path) for path in paths})
    context.meta[WHERE] = resolved.where_of
    ensure_cache(context)
    return resolved


def _flag_as_given(context: typer.Context, path: str, value: Any) -> str:
    """Return the flag or argument as given: that of a switch that is turned off is `--no-…`."""
    return off_flag(metadata_of(path)) if value is False else _name_of(context, path)


def _name_of(context: typer.Context, path: str) -> str:
    """Return the name of a setting in the running command: a flag, or an argument in capitals."""
    name = parameter_of(path)
    positional = {parameter.name for parameter in context.command.params if parameter.param_type_name == "argument"}
    metadata = metadata_of(path)
    return argument_name(metadata) if name in positional else cast(str, metadata.flag)
