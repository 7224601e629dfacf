"""The results of the checks, as plain values, for `qlora doctor`. Imports no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeAlias

Json: TypeAlias = "Mapping[str, Json] | Sequence[Json] | str | int | float | bool | None"


class Status(StrEnum):
    """The status of a check. It is skipped if another result, or a setting, makes it meaningless."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"
    SKIPPED = "skipped"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The outcome of a check: one line with its figures; `advice` says what to do if it is not ok."""

    status: Status
    finding: str
    advice: str | None = None
    details: Mapping[str, Json] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Check:
    """A check with its outcome."""

    name: str
    status: Status
    finding: str
    advice: str | None
    details: Mapping[str, Json]


@dataclass(frozen=True, kw_only=True)
class Report:
    """All checks in order. `can_train` is false if a check failed that training depends on."""

    can_train: bool
    checks: tuple[Check, ...]


def ok(finding: str, **details: Json) -> Outcome:
    """Return a positive outcome."""
    return Outcome(status=Status.OK, finding=finding, details=details)


def warning(finding: str, advice: str, **details: Json) -> Outcome:
    """Return the outcome that something works with limitations."""
    return Outcome(status=Status.WARNING, finding=finding, advice=advice, details=details)


def failed(finding: str, advice: str, **details: Json) -> Outcome:
    """Return the outcome that something does not work."""
    return Outcome(status=Status.FAILED, finding=finding, advice=advice, details=details)


def skipped(finding: str, advice: str, **details: Json) -> Outcome:
    """Return the outcome that there was nothing to check, with the reason."""
    return Outcome(status=Status.SKIPPED, finding=finding, advice=advice, details=details)
