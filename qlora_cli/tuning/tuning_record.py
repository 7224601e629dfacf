"""`tune.json`: the trials that are done, and what they hold for. It is written after each, so that none is lost.

Trials count only for the same settings, rows and base; another learning rate or number of steps is another trial.
"""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError, model_validator

from qlora_cli.errors import OutputDirectoryError
from qlora_cli.evaluating.paired_losses import LossesOfRows
from qlora_cli.files import read_small
from qlora_cli.runs.record import as_text
from qlora_cli.tuning.halving import RateTrial
from qlora_cli.units import Whole
from qlora_cli.writing import PRIVATE_FILE, write_file

RECORD_FILE = "tune.json"
SETTINGS_FILE = "tuned.yaml"
PAGE_FILE = "tune.html"
MOST_NAMED = 3  # settings that differ, in an error
# What says nothing about the loss of a trial, and what each trial has of its own.
WITHOUT_EFFECT = (
    "output.",
    "training.learning_rate",
    "training.epochs",
    "training.max_steps",
    "training.logging_steps",
    "training.eval_steps",
    "training.save_steps",
    "training.early_stopping_patience",
    "training.load_best_model_at_end",
    "training.general_text",
    "training.sample_prompts",
    "training.sample_tokens",
    "training.on_nan",
    "training.max_nan_skips",
)


class _Kept(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")


class KeptTrial(_Kept):
    """A trial as it is kept: `row_nll` in the order of the rows, None if it has none."""

    learning_rate: float
    num_steps: Whole
    row_nll: tuple[float, ...] | None
    diverged: str | None
    seconds: float

    @model_validator(mode="after")
    def _is_measured_or_diverged(self) -> "KeptTrial":
        if self.diverged is None and (self.row_nll is None or not all(map(math.isfinite, self.row_nll))):
            raise ValueError("a trial that did not diverge needs losses")
        return self


class TrialBasis(_Kept):
    """What all trials of a directory have in common.

    Attributes:
        settings: Those that a trial depends on, by `section.key`.
        base: A digest of the base's files.
        train_fingerprint, eval_fingerprint: Those of the rows.
        num_rows: The held-out rows that are measured.
        device, compute_dtype: How it is computed.
    """

    settings: dict[str, JsonValue]
    base: str | None
    train_fingerprint: str
    eval_fingerprint: str
    num_rows: Whole
    device: str
    compute_dtype: str

    def differing(self, other: "TrialBasis") -> Iterator[str]:
        """Yield what is not the same in `other`, in words."""
        for path in sorted({*self.settings, *other.settings}):
            before, now = self.settings.get(path), other.settings.get(path)
            if before != now:
                yield f"{path} ({as_text(before)}, now {as_text(now)})"
        names = {
            "train_fingerprint": "rows to train on",
            "eval_fingerprint": "held-out rows",
            "num_rows": "held-out rows",
            "base": "files of the base",
            "device": "device",
            "compute_dtype": "compute dtype",
        }
        yield from dict.fromkeys(word for name, word in names.items() if getattr(self, name) != getattr(other, name))


class TuneRecord(_Kept):
    """What was measured in a directory.

    Attributes:
        basis: What the trials have in common.
        row_tokens: The trained tokens of each held-out row that is measured.
        start_nll: Their losses before training, each summed over the row's trained tokens.
        trials: The trials that are done.
    """

    basis: TrialBasis
    row_tokens: tuple[Whole, ...]
    start_nll: tuple[float, ...]
    trials: tuple[KeptTrial, ...] = ()

    @model_validator(mode="after")
    def _has_a_loss_for_each_row(self) -> "TuneRecord":
        num_rows = len(self.row_tokens)
        if num_rows != self.basis.num_rows or sum(self.row_tokens) < 1 or min(self.row_tokens) < 0:
            raise ValueError("must have rows with trained tokens")
        losses = [self.start_nll, *(trial.row_nll for trial in self.trials if trial.row_nll is not None)]
        if any(len(of_rows) != num_rows for of_rows in losses) or not all(map(math.isfinite, self.start_nll)):
            raise ValueError("must have a loss for each row")
        return self

    @property
    def start(self) -> LossesOfRows:
        """The losses before training."""
        return self._losses(self.start_nll)

    def trial(self, learning_rate: float, num_steps: int) -> RateTrial | None:
        """Return a trial that is done; None if it is not."""
        for kept in self.trials:
            if (kept.learning_rate, kept.num_steps) == (learning_rate, num_steps):
                return RateTrial(
                    learning_rate=learning_rate,
                    num_steps=num_steps,
                    rows=None if kept.row_nll is None else self._losses(kept.row_nll),
                    diverged=kept.diverged,
                    seconds=kept.seconds,
                )
        return None

    def _losses(self, row_nll: tuple[float, ...]) -> LossesOfRows:
        tokens = np.array(self.row_tokens, np.int64)
        # The rows of all trials are the same, in the same order.
        return LossesOfRows(digests=np.arange(len(tokens)), nll=np.array(row_nll, np.float64), tokens=tokens)

    def with_trial(self, kept: KeptTrial) -> "TuneRecord":
        """Return the record with one more trial."""
        return TuneRecord(**{**dict(self), "trials": (*self.trials, kept)})

    def check_basis(self, basis: TrialBasis, file: Path) -> None:
        """Check that the trials, which are in `file`, hold for what is asked for now.

        Raises:
            OutputDirectoryError: they do not; says what differs.
        """
        if differing := list(self.basis.differing(basis)):
            more = f" and {len(differing) - MOST_NAMED} more" if len(differing) > MOST_NAMED else ""
            raise OutputDirectoryError(
                f"the trials in {file} were measured with other {', '.join(differing[:MOST_NAMED])}{more}",
                hint="Give the same settings to go on with them, or choose another --output.",
            )


def settings_of_trials(settings: Mapping[str, Mapping[str, JsonValue]]) -> dict[str, JsonValue]:
    """Return those of a run's settings, by section, that the loss of a trial depends on, by `section.key`."""
    paths = {f"{section}.{key}": value for section, values in settings.items() for key, value in values.items()}
    return {path: value for path, value in paths.items() if not path.startswith(WITHOUT_EFFECT)}


def read_tune_record(directory: Path) -> TuneRecord | None:
    """Return the record in a directory; None if there is none.

    Raises:
        OutputDirectoryError: it can't be read.
    """
    file = directory / RECORD_FILE
    try:
        return TuneRecord.model_validate_json(read_small(file))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecursionError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        raise OutputDirectoryError(
            f"{file} can't be read: {reason}", hint="Delete it to start over, or choose another --output."
        ) from error


def write_tune_record(directory: Path, record: TuneRecord) -> None:
    """Write the record, complete or not at all.

    Raises:
        OSError: it can't be written, such as on a full disk.
    """
    write_file(directory / RECORD_FILE, json.dumps(record.model_dump(mode="json")) + "\n", mode=PRIVATE_FILE)
