"""The presets: a settings file for each of the models that people train most, on a card that it fits on."""

import json
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from importlib.resources import files
from pathlib import Path

from qlora_cli.errors import UsageError

FOLDER = "presets"
TABLE = "predicted.json"


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A preset: `predicted_bytes` is what its run is predicted to need on any card sold with `card_gb`, at most.

    That is with each layer recomputed: a run keeps more where it fits, which is faster. `usable_bytes` is the memory
    of the smallest such card.
    """

    name: str
    model: str
    card_gb: int
    max_length_tokens: int
    predicted_bytes: int
    usable_bytes: int


@cache
def presets() -> tuple[Preset, ...]:
    """Return every preset, by family and size of the model, then of the card."""
    return tuple(Preset(**entry) for entry in json.loads(_file(TABLE).read_text(encoding="utf-8")))


def preset_file(name: str) -> Path:
    """Return the settings file of a preset.

    Raises:
        UsageError: there is none of that name.
    """
    names = [preset.name for preset in presets()]
    if name not in names:
        near = get_close_matches(name, names, n=3, cutoff=0.4)
        hint = f"Did you mean {' or '.join(near)}? " if near else ""
        raise UsageError(f"there is no preset {name}", hint=f"{hint}qlora presets lists all.")
    return _file(f"{name}.yaml")


def _file(name: str) -> Path:
    return Path(str(files("qlora_cli").joinpath(FOLDER, name)))
