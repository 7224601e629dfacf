"""Read from a data set's card, its README.md, which files belong to which split of which config.

Only `configs` is read, a key of the YAML front matter that data sets on the hub have.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from glob import escape
from io import TextIOWrapper
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from qlora_cli.data.finding.file_types import is_data_file, may_be_path, printable
from qlora_cli.data.finding.globs import expand_glob
from qlora_cli.data.finding.split_names import TRAIN
from qlora_cli.data.limits import join_names
from qlora_cli.errors import DataError
from qlora_cli.files import existing_path, open_regular
from qlora_cli.settings.files.yaml_limits import MAX_BYTES, UNREADABLE, find_violation

CARD = "README.md"
MAX_CARD_CHARACTERS = 4 * MAX_BYTES  # read of a card; one with hundreds of configs has a tenth of that
FRONT_MATTER = re.compile(r"(?s)\ufeff?---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)")
CONFIGS = re.compile(r"(?m)^configs:.*(?:\r?\n(?:[ \t#-].*|[ \t]*$))*")
DEFAULT = "default"


@dataclass(frozen=True, kw_only=True)
class CardConfig:
    """A config of a data set: glob patterns of its files by split, or none, and the folder they are relative to."""

    name: str
    patterns: Mapping[str, Sequence[str]]
    folder: Path
    is_default: bool


def read_card_configs(directory: Path) -> list[CardConfig]:
    """Return the configs that the card in `directory` declares; none without a card, or if it declares none.

    Raises:
        DataError: they are not in the form that `datasets` reads, or name files outside of the directory.
    """
    card = directory / CARD
    try:
        with TextIOWrapper(open_regular(card), encoding="utf-8", errors="replace") as file:
            front = FRONT_MATTER.match(file.read(MAX_CARD_CHARACTERS))
    except OSError:  # no card, or an unreadable one: file names identify splits too
        return []
    block = CONFIGS.search(front[1]) if front else None
    if block is None:
        return []
    try:
        if (refusal := find_violation(block[0])) is not None:
            raise ValueError(refusal.message)
        return [_read_config(directory, value) for value in yaml.safe_load(block[0])["configs"] or ()]
    except UNREADABLE as error:
        raise DataError(
            f"{printable(card)}: its configs can't be read ({str(error).partition(chr(10))[0]})",
            hint=f"Correct it, or name the files: {printable(directory)}/*.parquet",
        ) from error


def select_config(configs: Sequence[CardConfig], requested: str | None, name: str) -> CardConfig:
    """Return the requested config, or the default one.

    Raises:
        DataError: there is no such config, or none was requested and there is no default.
    """
    default = [config for config in configs if config.is_default] or [c for c in configs if c.name == DEFAULT]
    matching = [config for config in configs if config.name == requested] if requested else default or configs
    if len(matching) == 1 or (matching and not requested and default):
        return matching[0]
    names = [config.name for config in configs]
    problem = f"no config {requested}" if requested else "several configs"
    raise DataError(
        f"{name} has {problem}: its {CARD} names {join_names(names)}",
        hint=f"For the first one write {name}:{names[0]}",
    )


def split_files(config: CardConfig) -> dict[str, tuple[Path, ...]]:
    """Return the files of each split; a pattern may match none if only a part of the data set was downloaded."""
    return {
        split: tuple(sorted({path for pattern in patterns for path in _matching_files(config.folder, pattern)}))
        for split, patterns in config.patterns.items()
    }


def _matching_files(folder: Path, pattern: str) -> list[Path]:
    path = existing_path(folder / pattern)
    if path is not None and path.is_file():
        return [path]
    if path is not None and path.is_dir():
        pattern = f"{pattern}/**"
    files = [path for path in expand_glob(f"{escape(str(folder))}/{pattern}") if path.is_file()]
    return [path for path in files if is_data_file(path)] or files


def _read_config(directory: Path, value: Any) -> CardConfig:
    if not isinstance(value, Mapping):
        raise TypeError(f"{_format_value(value)} is not a config")
    folder = directory / _relative_pattern(value.get("data_dir") or ".")
    patterns = _patterns(value["data_files"]) if value.get("data_files") else {}
    return CardConfig(
        name=str(value.get("config_name") or DEFAULT),
        patterns={split: tuple(map(_relative_pattern, globs)) for split, globs in patterns.items()},
        folder=folder,
        is_default=value.get("default") is True,
    )


def _patterns(value: Any) -> dict[str, list[str]]:
    """Return glob patterns by split from one pattern, a list of them, or a list of objects with `split` and `path`."""
    if isinstance(value, str):
        return {TRAIN: [value]}
    if isinstance(value, list) and value and all(isinstance(entry, dict) for entry in value):
        value = {entry["split"]: entry["path"] for entry in value}
    elif isinstance(value, list):
        value = {TRAIN: value}
    if not isinstance(value, dict):
        raise TypeError(f"{_format_value(value)} names no files")
    return {str(split): globs if isinstance(globs, list) else [globs] for split, globs in value.items()}


def _format_value(value: object) -> str:
    return join_names([repr(value)])


def _relative_pattern(pattern: object) -> str:
    """Return `pattern` if it stays within its directory.

    Raises:
        ValueError: it leads outside, or is not a valid path.
    """
    if not may_be_path(pattern):
        raise ValueError(f"{_format_value(pattern)} can't be a path")
    path = PurePosixPath(pattern)
    if "://" in pattern or path.is_absolute() or ".." in path.parts:
        raise ValueError(f"{_format_value(pattern)} is not in this directory")
    return pattern
