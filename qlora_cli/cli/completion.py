"""Complete the values of flags and arguments in a shell: choices, cards, models, settings, runs. Imports no torch.

Where nothing is offered, the shell completes paths. It is imported when a shell asks, not for help.
"""

from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path

from pydantic.fields import FieldInfo

from qlora_cli.settings.display import choices_of, is_switch
from qlora_cli.settings.files.preset_files import presets
from qlora_cli.settings.models import KINDS, metadata_of, sections_of
from qlora_cli.settings.setting_metadata import Command, Named

Complete = Callable[[str], list[str]]

MOST_FOLDERS = 500  # that are looked through for runs


def completion_of(path: str, field: FieldInfo, command: Command) -> Complete | None:
    """Return what completes the value of the setting `section.key` for a command; None leaves it to the shell."""
    if choices := choices_of(field):
        return lambda incomplete: _starting(incomplete, choices)
    match metadata_of(path).names:
        case Named.CARD:
            return complete_card
        case Named.MODEL:
            return _complete_short_model if command is Command.INSPECT_MEMORY else _complete_model
        case Named.RUN:
            return complete_run
        case None:
            return None


def completion_of_assignment(command: Command) -> Complete:
    """Return what completes `--set` for a command: `section.key=`, then the values of that setting."""

    def complete(incomplete: str) -> list[str]:
        path, equals, value = incomplete.partition("=")
        fields = _fields_of(command)
        if not equals:
            return [f"{name}=" for name in _starting(incomplete, fields)]
        if path not in fields:
            return []
        values = ["true", "false"] if is_switch(fields[path]) else None
        complete_value = completion_of(path, fields[path], command)
        found = values or (complete_value(value) if complete_value else [])
        return [f"{path}={one}" for one in _starting(value, found)]

    return complete


def complete_run(incomplete: str) -> list[str]:
    """Return the run directories that start with what is typed, at most two folders below it."""
    from qlora_cli.runs.directory import RunDirectory

    typed, _, _ = incomplete.rpartition("/")
    prefix = f"{typed}/" if "/" in incomplete else ""
    folder = Path(prefix or ".").expanduser()
    try:
        below = islice(_folders(folder), MOST_FOLDERS)
        return _starting(
            incomplete, [f"{prefix}{path.relative_to(folder)}" for path in below if RunDirectory(path).is_run]
        )
    except OSError:  # a folder that can't be read has nothing to offer
        return []


def complete_card(incomplete: str) -> list[str]:
    """Return the cards of the catalogue and their classes."""
    from qlora_cli.memory.gpus import GPUS, classes

    names = ["auto", "cpu", *(one.name for one in classes()), *(one.name for one in GPUS)]
    return _starting(incomplete, names)


def complete_preset(incomplete: str) -> list[str]:
    """Return the names of presets."""
    return _starting(incomplete, [preset.name for preset in presets()])


def _complete_model(incomplete: str) -> list[str]:
    from qlora_cli.memory.catalogue import catalogue

    hub_ids = [name for one in catalogue() for name in (one.hub_id, *one.aliases) if "/" in name]
    return [*complete_run(incomplete), *_starting(incomplete, hub_ids)]


def _complete_short_model(incomplete: str) -> list[str]:
    from qlora_cli.memory.catalogue import catalogue

    return [*_starting(incomplete, [one.name for one in catalogue()]), *_complete_model(incomplete)]


def _fields_of(command: Command) -> Mapping[str, FieldInfo]:
    sections = sections_of(KINDS[command])
    return {f"{name}.{key}": field for name, kind in sections.items() for key, field in kind.model_fields.items()}


def _folders(folder: Path) -> Iterator[Path]:
    from qlora_cli.runs.directory import RunDirectory

    for path in _below(folder):
        yield path
        if not RunDirectory(path).is_run:
            yield from _below(path)


def _below(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.iterdir()) if path.is_dir() and not path.name.startswith(".")]


def _starting(incomplete: str, values: "Mapping[str, object] | list[str]") -> list[str]:
    return [value for value in values if value.startswith(incomplete)]
