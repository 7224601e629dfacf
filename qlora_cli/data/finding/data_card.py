"""What the README.md of a data set says of its files: which belong to which split of which config.

Only `configs` is read, which data sets of the hub have in the YAML above the text.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from glob import escape
from io import TextIOWrapper
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from qlora_cli.data.finding.file_types import is_data, may_be_path, printable
from qlora_cli.data.finding.globs import matches
from qlora_cli.data.finding.split_names import TRAIN
from qlora_cli.data.limits import listed
from qlora_cli.errors import DataError
from qlora_cli.files import existing_path, open_regular
from qlora_cli.settings.yaml_limits import MOST_BYTES, UNREADABLE, refused

CARD = "README.md"
MOST_CHARACTERS = 4 * MOST_BYTES  # of a card that are read; those of data sets with hundreds of configs have a tenth
FRONT_MATTER = re.compile(r"(?s)\ufeff?---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)")
CONFIGS = re.compile(r"(?m)^configs:.*(?:\r?\n(?:[ \t#-].*|[ \t]*$))*")
DEFAULT = "default"


@dataclass(frozen=True, kw_only=True)
class CardConfig:
    """A config of a data set: the patterns of its files by split, or none; and the folder that they are in."""

    name: str
    patterns: Mapping[str, Sequence[str]]
    folder: Path
    is_default: bool


def configs_of(directory: Path) -> list[CardConfig]:
    """Return the configs that the card in `directory` names; none if it has no card, or one without any.

    Raises:
        DataError: they are not written as `datasets` reads them, or name files elsewhere.
    """
    card = directory / CARD
    try:
        with TextIOWrapper(open_regular(card), encoding="utf-8", errors="replace") as file:
            front = FRONT_MATTER.match(file.read(MOST_CHARACTERS))
    except OSError:  # there is none, or none that may be read: names of files tell as well
        return []
    block = CONFIGS.search(front[1]) if front else None
    if block is None:
        return []
    try:
        if (refusal := refused(block[0])) is not None:
            raise ValueError(refusal.message)
        return [_config(directory, value) for value in yaml.safe_load(block[0])["configs"] or ()]
    except UNREADABLE as error:
        raise DataError(
            f"{printable(card)}: its configs can't be read ({str(error).partition(chr(10))[0]})",
            hint=f"Correct it, or name the files: {printable(directory)}/*.parquet",
        ) from error


def choose_config(configs: Sequence[CardConfig], asked: str | None, name: str) -> CardConfig:
    """Return the config that is asked for, or the one that stands for all.

    Raises:
        DataError: there is no such config, or it has to be named.
    """
    default = [config for config in configs if config.is_default] or [c for c in configs if c.name == DEFAULT]
    found = [config for config in configs if config.name == asked] if asked else default or configs
    if len(found) == 1 or (found and not asked and default):
        return found[0]
    names = [config.name for config in configs]
    said = f"no config {asked}" if asked else "several configs"
    raise DataError(
        f"{name} has {said}: its {CARD} names {listed(names)}", hint=f"For the first one write {name}:{names[0]}"
    )


def files_of(config: CardConfig) -> dict[str, tuple[Path, ...]]:
    """Return the files of each split; a pattern may find none where not all of the data set was downloaded."""
    return {
        split: tuple(sorted({path for pattern in patterns for path in _found(config.folder, pattern)}))
        for split, patterns in config.patterns.items()
    }


def _found(folder: Path, pattern: str) -> list[Path]:
    path = existing_path(folder / pattern)
    if path is not None and path.is_file():
        return [path]
    if path is not None and path.is_dir():
        pattern = f"{pattern}/**"
    found = [path for path in matches(f"{escape(str(folder))}/{pattern}") if path.is_file()]
    return [path for path in found if is_data(path)] or found


def _config(directory: Path, value: Any) -> CardConfig:
    if not isinstance(value, Mapping):
        raise TypeError(f"{_shown(value)} is no config")
    folder = directory / _inside(value.get("data_dir") or ".")
    patterns = _patterns(value["data_files"]) if value.get("data_files") else {}
    return CardConfig(
        name=str(value.get("config_name") or DEFAULT),
        patterns={split: tuple(map(_inside, found)) for split, found in patterns.items()},
        folder=folder,
        is_default=value.get("default") is True,
    )


def _patterns(value: Any) -> dict[str, list[str]]:
    """Return patterns by split: of a pattern, a list of them, or of objects with `split` and `path`."""
    if isinstance(value, str):
        return {TRAIN: [value]}
    if isinstance(value, list) and value and all(isinstance(each, dict) for each in value):
        value = {each["split"]: each["path"] for each in value}
    elif isinstance(value, list):
        value = {TRAIN: value}
    if not isinstance(value, dict):
        raise TypeError(f"{_shown(value)} names no files")
    return {str(split): found if isinstance(found, list) else [found] for split, found in value.items()}


def _shown(value: object) -> str:
    return listed([repr(value)])


def _inside(pattern: object) -> str:
    """Return a pattern that stays in its directory.

    Raises:
        ValueError: it leads out of it, or can be no path.
    """
    if not may_be_path(pattern):
        raise ValueError(f"{_shown(pattern)} can be no path")
    path = PurePosixPath(pattern)
    if "://" in pattern or path.is_absolute() or ".." in path.parts:
        raise ValueError(f"{_shown(pattern)} is not in this directory")
    return pattern
