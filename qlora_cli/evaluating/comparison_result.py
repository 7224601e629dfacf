"""The result of a comparison of runs, in plain numbers. Imports no torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qlora_cli.runs.forgetting import Forgetting

# Beyond so many standard errors a difference is not called chance.
NUM_STDERRS = 2
Verdict = Literal["reference", "worse", "not_worse", "unclear"]
LossOf = Literal["tokens", "dpo", "orpo", "kto", "chosen"]


@dataclass(frozen=True, kw_only=True)
class ComparedRun:
    """A run on the rows that all runs held out. Sizes in bytes, times in seconds; None stands for an unknown value.

    Attributes:
        path: The run's directory.
        state, step: How it ended, and the step of its weights.
        loss: Mean loss, see `RunComparison.loss_of`; None if it is not finite.
        loss_stderr: Standard error of the loss, over rows; None for a single row.
        difference: The loss minus that of the reference; None for the reference itself.
        difference_stderr: Standard error of the difference, paired by row.
        accuracy, accuracy_stderr: Share of pairs, or of answers with labels, that are judged as the data does; None of
            other rows, or without a base to compare with.
        accuracy_difference, accuracy_difference_stderr: The accuracy minus that of the reference, paired by row.
        num_rows_lower, num_rows_higher: Rows with a lower and with a higher loss than by the reference.
        verdict: `worse` if the difference exceeds the margin by more than two of its standard errors, `not_worse` if
            it is below the margin by as much, otherwise `unclear`.
        was_measured: Whether the losses were measured now, and not read from the run.
        device, compute_dtype, quantization: How the losses were measured.
        tokens_per_second, duration_seconds: Speed and duration of training.
        peak_device_bytes: Peak of PyTorch's allocator in training; None without a GPU.
        peak_host_bytes: Largest resident set of the process.
        adapter_rank, effective_rank: The largest rank of the final adapter, and how much of it the updates use, as a
            mean over modules; None if the run did not measure it, or its weights are not the final ones.
        forgetting: The loss of the base and of the final adapter on general text; None if the run did not measure it.
        relative_update_norm: The norm of all updates as a share of that of the weights; None without either.
    """

    path: Path
    state: str
    step: int | None
    loss: float | None
    loss_stderr: float | None
    difference: float | None
    difference_stderr: float | None
    accuracy: float | None
    accuracy_stderr: float | None
    accuracy_difference: float | None
    accuracy_difference_stderr: float | None
    num_rows_lower: int
    num_rows_higher: int
    verdict: Verdict
    was_measured: bool
    device: str
    compute_dtype: str
    quantization: str
    tokens_per_second: float | None
    duration_seconds: float
    peak_device_bytes: int | None
    peak_host_bytes: int | None
    adapter_rank: int | None
    effective_rank: float | None
    relative_update_norm: float | None
    forgetting: Forgetting | None


@dataclass(frozen=True, kw_only=True)
class DifferingSetting:
    """A setting that is not the same in all runs, with its value in each, in their order."""

    setting: str
    values: tuple[object, ...]


@dataclass(frozen=True, kw_only=True)
class RunComparison:
    """The result of `qlora compare`.

    Attributes:
        reference: The run that the others are compared with, the first.
        dataset: The rows as they were named.
        num_rows, num_tokens: The rows, and the trained tokens in them; of pairs, or answers with labels, those of the
            chosen or wanted answers.
        loss_of: What losses are means over: `tokens`, in nats; rows by the objective that all runs have, `dpo`, `orpo`
            or `kto`, the first two in nats; or, where runs differ in it, the tokens of `chosen` or wanted answers.
        margin: What a loss may exceed that of the reference by.
        is_worse: Whether the verdict on any run is `worse`.
        runs: Each run, the reference first.
        differing_settings: The settings that are not the same in all runs.
        notes: Notes for reading the figures.
    """

    reference: Path
    dataset: str | None
    num_rows: int
    num_tokens: int
    loss_of: LossOf
    margin: float
    is_worse: bool
    runs: tuple[ComparedRun, ...]
    differing_settings: tuple[DifferingSetting, ...]
    notes: tuple[str, ...]
