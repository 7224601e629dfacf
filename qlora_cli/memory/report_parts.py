"""Parts of a report on memory: other models, what a budget leaves, an earlier prediction. Imports no torch."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class FittingModel:
    """A model of the catalogue whose run fits where that of the requested model can't."""

    model: str
    num_parameters: int
    process_bytes: int
    process_high_bytes: int


@dataclass(frozen=True, kw_only=True)
class LargerModel:
    """A larger model that fits, too, with the settings of its `preset`, and rows of up to `max_length_tokens`."""

    preset: str
    num_parameters: int
    max_length_tokens: int
    process_high_bytes: int


@dataclass(frozen=True, kw_only=True)
class SpareMemory:
    """What a run leaves of the `budget_bytes` that it may take, for layers that stay unquantized.

    `spare_bytes` are those that weights may take in addition, so that the run fits with its whole error band.
    `process_bytes` is the predicted peak with these spent. All of the `num_layers` that are quantized would take
    `extra_bytes`.
    """

    budget_bytes: int
    spare_bytes: int
    process_bytes: int
    num_layers: int
    extra_bytes: int


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
