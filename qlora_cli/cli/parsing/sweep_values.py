"""What `--sweep` takes: `NAME=VALUES`, the values as `512..32768` (doubling), `1,2,4` or `8`."""

import re
from collections.abc import Sequence

from pydantic import ValidationError

from qlora_cli.errors import Problem
from qlora_cli.memory.fitting.solver import SETTINGS
from qlora_cli.memory.request import doubled
from qlora_cli.settings.models import SECTIONS, value_adapter
from qlora_cli.settings.value_sources import did_you_mean

EXAMPLE = "For example: --sweep max-length=512..32768 (doubling), or --sweep rank=8,16,64"
MAX_DIGITS = 9


def read_sweeps(texts: Sequence[str], where: str = "--sweep") -> tuple[dict[str, tuple[int, ...]], list[Problem]]:
    """Return the values of each setting in ascending order, by its flag's name without dashes, and the problems.

    A text may contain several specifications, separated by blanks; `where` says where they were given.
    """
    sweeps: dict[str, tuple[int, ...]] = {}
    problems: list[Problem] = []
    for spec in (spec for text in texts for spec in text.split()):
        name, equals, values = spec.partition("=")
        location = f"{where} {spec}"
        if not equals:
            problems.append(Problem(where=location, message="expected NAME=VALUES", hint=EXAMPLE))
        elif name not in SETTINGS:
            hint = did_you_mean(name, list(SETTINGS)) or f"Sweep {', '.join(SETTINGS)}."
            problems.append(Problem(where=location, message=f"{name!r} can't be swept", hint=hint))
        elif name in sweeps:
            hint = f"Give all values at once, as in {name}=8,16,64."
            problems.append(Problem(where=location, message=f"{name} is given twice", hint=hint))
        else:
            bounds = read_values(values)
            if (
                message := _wrong_value(name, bounds)
                if bounds
                else "expected values such as 512..32768 (rising), 8,16 or 8"
            ):
                problems.append(Problem(where=location, message=message, hint=EXAMPLE))
            sweeps[name] = bounds or ()
    return sweeps, problems


def read_values(text: str) -> tuple[int, ...] | None:
    """Return the distinct numbers in `text`, in ascending order; a range `first..last` doubles.

    The last number is always included. None if the text is invalid, or the range descends.
    """
    number = rf"\d{{1,{MAX_DIGITS}}}"
    if bounds := re.fullmatch(rf"({number})\.\.({number})", text):
        first, last = int(bounds[1]), int(bounds[2])
        return doubled(first, last) if 0 < first <= last else None
    if re.fullmatch(rf"{number}(,{number})*", text):
        return tuple(sorted({int(value) for value in text.split(",")}))
    return None


def _wrong_value(name: str, values: tuple[int, ...]) -> str | None:
    """Return the problem with the first invalid value."""
    section, key = SETTINGS[name].split(".")
    adapter = value_adapter(SECTIONS[section], key)
    for value in values:
        try:
            adapter.validate_python(value)
        except ValidationError as error:
            expected = error.errors()[0]["msg"].replace("Input should be", "must be")
            return f"{name} {expected}, got {value}"
    return None
