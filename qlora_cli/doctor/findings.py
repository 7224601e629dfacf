"""What the checks found, as plain values: the result that `qlora doctor` shows. Imports no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeAlias

Json: TypeAlias = "Mapping[str, Json] | Sequence[Json] | str | int | float | bool | None"


class Status(StrEnum):
    """How a check went. Skipped is what another finding, or the user's wish, left without meaning."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"
    SKIPPED = "skipped"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a check found, in one line with its numbers; `advice` is what to do where it is not ok."""

    status: Status
    finding: str
    advice: str | None = None
    details: Mapping[str, Json] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Check:
    """An outcome and whose it is."""

    name: str
    status: Status
    finding: str
    advice: str | None
    details: Mapping[str, Json]


@dataclass(frozen=True, kw_only=True)
class Report:
    """All checks in their order. `can_train` is false if one failed that training depends on."""

    can_train: bool
    checks: tuple[Check, ...]


def ok(finding: str, **details: Json) -> Outcome:
    """Return that all is well."""
    return Outcome(status=Status.OK, finding=finding, details=details)


def warning(finding: str, advice: str, **details: Json) -> Outcome:
    """Return that something works worse than it could."""
    return Outcome(status=Status.WARNING, finding=finding, advice=advice, details=details)


def failed(finding: str, advice: str, **details: Json) -> Outcome:
    """Return that something does not work."""
    return Outcome(status=Status.FAILED, finding=finding, advice=advice, details=details)


def skipped(finding: str, advice: str, **details: Json) -> Outcome:
    """Return why there was nothing to check."""
    return Outcome(status=Status.SKIPPED, finding=finding, advice=advice, details=details)
