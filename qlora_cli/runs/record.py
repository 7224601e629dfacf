"""What `run.json` says, as far as it can be read: a run that was killed, or is older than a key, is no error."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RUN_FILE = "run.json"
DEFAULT = "default"


@dataclass(frozen=True, kw_only=True)
class SettingUsed:
    """A setting of a run, and where its value came from."""

    path: str
    value: object
    origin: str

    @property
    def text(self) -> str:
        """The value as people read it."""
        return as_text(self.value)

    @property
    def is_default(self) -> bool:
        """Whether nobody set it."""
        return self.origin == DEFAULT


@dataclass(frozen=True)
class RunRecord:
    """The content of `run.json`. `problem` says why there is none."""

    content: Mapping[str, Any] = field(default_factory=dict)
    problem: str | None = None

    def section(self, *keys: str) -> Mapping[str, Any]:
        """Return the object at a place; an empty one if there is none."""
        found = self._at(*keys)
        return found if isinstance(found, dict) else {}

    def text(self, *keys: str) -> str | None:
        """Return the text at a place."""
        found = self._at(*keys)
        return found if isinstance(found, str) else None

    def integer(self, *keys: str) -> int | None:
        """Return the whole number at a place."""
        found = self._at(*keys)
        if isinstance(found, bool) or not isinstance(found, int | float) or not math.isfinite(found):
            return None
        return int(found)

    def texts(self, *keys: str) -> tuple[str, ...]:
        """Return the list of texts at a place; a text alone is a list of one."""
        found = self._at(*keys)
        return tuple(map(str, found)) if isinstance(found, list) else (found,) if isinstance(found, str) else ()

    @property
    def settings(self) -> tuple[SettingUsed, ...]:
        """Every setting, those that somebody set first."""
        origins = self.section("origins")
        used = [
            SettingUsed(
                path=f"{section}.{key}",
                value=value,
                origin=str(origins.get(f"{section}.{key}", DEFAULT)),
            )
            for section in self.section("settings")
            for key, value in self.section("settings", section).items()
        ]
        return tuple(sorted(used, key=lambda setting: setting.is_default))

    def _at(self, *keys: str) -> object:
        found: object = self.content
        for key in keys:
            found = found.get(key) if isinstance(found, Mapping) else None
        return found


def read_record(directory: Path) -> RunRecord:
    """Return what the run in `directory` recorded of itself."""
    try:
        found = json.loads((directory / RUN_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return RunRecord(problem=f"there is no {RUN_FILE}")
    except OSError as error:
        return RunRecord(problem=f"{RUN_FILE} can't be read: {error.strerror}")
    except (ValueError, RecursionError) as error:
        return RunRecord(problem=f"{RUN_FILE} is damaged: {error}")
    if not isinstance(found, dict):
        return RunRecord(problem=f"{RUN_FILE} is damaged: it holds no object")
    return RunRecord(found)


def as_text(value: object) -> str:
    """Return a value of JSON as people read it."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return ", ".join(map(as_text, value)) or "-"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {as_text(part)}" for key, part in value.items()) or "-"
    return str(value)
