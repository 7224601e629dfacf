"""The comparison of a predicted peak with an earlier one, as plain values. Imports no torch."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class ChangedSetting:
    """A setting by its flag's name without dashes, with its values, as text; None where it is not listed."""

    setting: str
    before: str | None
    now: str | None


@dataclass(frozen=True, kw_only=True)
class LockCheck:
    """A comparison with an earlier prediction of the process's peak, read from `file`.

    `change` is the difference as a share of `locked_bytes`; `passed` says whether it is at most `max_change`, up or
    down. `changed_settings` are those that may be the reason.
    """

    file: Path
    locked_bytes: int
    predicted_bytes: int
    change: float
    max_change: float
    passed: bool
    written_by: str
    changed_settings: tuple[ChangedSetting, ...]
