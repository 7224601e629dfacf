"""Search for the learning rate of a run: settle it as `qlora train` does, run trials, write what was found."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from qlora_cli.errors import ModelError
from qlora_cli.events import Noted, PhaseStarted, Reporter
from qlora_cli.hardware.cudnn import without_cudnn_attention
from qlora_cli.model_files.digest import base_digest
from qlora_cli.ranks.place import without_launcher
from qlora_cli.runs.directory import RunDirectory, RunLock, clear_startup_files
from qlora_cli.settings.models import TrainSettings
from qlora_cli.settings.resolve import Resolved
from qlora_cli.training.checks.predicted_time import predict_time
from qlora_cli.training.determinism import determinism
from qlora_cli.training.run_plan import SettledRun, settle_run
from qlora_cli.tuning.halving import RateTrial, halve
from qlora_cli.tuning.trial_bench import TrialBench, measured_rows
from qlora_cli.tuning.trial_steps import TrialGrid, TuneRequest, grid_of
from qlora_cli.tuning.tuned_files import write_tuned_files
from qlora_cli.tuning.tuning_checks import run_of_trials
from qlora_cli.tuning.tuning_cost import plan_of
from qlora_cli.tuning.tuning_record import (
    RECORD_FILE,
    TrialBasis,
    TuneRecord,
    read_tune_record,
    settings_of_trials,
    write_tune_record,
)
from qlora_cli.tuning.tuning_result import TunePlan, TuneResult
from qlora_cli.tuning.tuning_summary import result_of
from qlora_cli.units import counted
from qlora_cli.writing import clear_leftovers, clear_unfinished_files, delete


@dataclass(frozen=True)
class _Search:
    """A settled search, in its directory."""

    asked: Resolved[TrainSettings]
    settled: SettledRun
    grid: TrialGrid
    plan: TunePlan
    directory: Path


def plan(asked: Resolved[TrainSettings], request: TuneRequest, reporter: Reporter, *, force: bool = False) -> TunePlan:
    """Return what a search would cost, without loading a weight or writing anything.

    Raises:
        QloraError: of the type of the problem.
    """
    with without_launcher(), determinism(asked.settings.training):
        return _settle(asked, request, reporter, force=force).plan


@without_cudnn_attention()
def tune(
    asked: Resolved[TrainSettings], request: TuneRequest, reporter: Reporter, *, force: bool = False
) -> TuneResult:
    """Search for the learning rate of a run, and write the settings with it into the output directory.

    Each trial is kept there when it is done; the same call goes on after the last one. `force` continues although
    the run is predicted not to fit on the GPU.

    Raises:
        TrainingError: every rate diverged.
        QloraError: of the type of the problem. Before the first trial is done, nothing is left on the disk.
    """
    with without_launcher(), determinism(asked.settings.training):
        search = _settle(asked, request, reporter, force=force)
        reporter.report(Noted(message=search.plan.sentence))
        with _locked(search.directory):
            return _search(search, reporter)


def _settle(asked: Resolved[TrainSettings], request: TuneRequest, reporter: Reporter, *, force: bool) -> _Search:
    directory = asked.settings.output.directory
    settled = settle_run(run_of_trials(asked, reporter), reporter, force=force)
    training = settled.resolved.settings.training
    grid = grid_of(request, learning_rate=training.learning_rate, run_steps=settled.num_steps)
    forecast = predict_time(
        settled.resolved.settings, settled.load_plan, settled.rows, settled.outlook, num_steps=grid.rounds[-1]
    )
    rows = measured_rows(settled)
    planned = plan_of(settled, grid, rows, directory, forecast.predicted if forecast is not None else None)
    return _Search(asked, settled, grid, planned, directory)


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Keep other processes out of the directory, and leave nothing in it if no trial is done."""
    made = [path for path in (directory, *directory.absolute().parents) if not path.exists()]
    held = {path.name for path in directory.iterdir()} if directory.is_dir() else set()
    with RunLock(RunDirectory(directory)):
        try:
            yield
        except BaseException:
            record = read_tune_record(directory)
            if record is None or not record.trials:
                delete(directory / RECORD_FILE)
                clear_startup_files(directory, held, made)
            raise


def _search(search: _Search, reporter: Reporter) -> TuneResult:
    clear_leftovers(search.directory)
    clear_unfinished_files(search.directory)
    trials = _RateTrials(search, reporter)
    try:
        halving = halve(search.grid, trials.find)
    except BaseException:
        trials.note_kept()
        raise
    result = result_of(halving, search.plan, trials.record)
    write_tuned_files(search.asked, search.settled, result)
    return result


class _RateTrials:
    """The trials of a search: those that are kept, and those that are run now."""

    def __init__(self, search: _Search, reporter: Reporter) -> None:
        self._directory = search.directory
        self._reporter = reporter
        self._bench = TrialBench(search.settled, search.directory, reporter)
        self._basis = _basis_of(search.settled, len(self._bench.rows.lengths))
        self._kept = read_tune_record(search.directory)
        if self._kept is not None:
            self._kept.check_basis(self._basis, search.directory / RECORD_FILE)
            if self._kept.trials:
                reporter.report(Noted(message=f"going on with {self._named(self._kept)}"))

    @property
    def record(self) -> TuneRecord:
        """The record; of a new search, the loss before training is measured first."""
        if self._kept is None:
            self._kept = self._new_record()
            write_tune_record(self._directory, self._kept)
        return self._kept

    def _new_record(self) -> TuneRecord:
        before = self._bench.measure("the model before training")
        if not math.isfinite(before.loss):
            raise ModelError(
                f"the loss of the held-out rows is {before.loss} before any training",
                hint="Compute in another dtype, such as --dtype bf16 or fp32 instead of fp16.",
            )
        tokens, losses = before.tokens.tolist(), before.nll.tolist()
        return TuneRecord(basis=self._basis, row_tokens=tuple(tokens), start_nll=tuple(losses))

    def find(self, learning_rate: float, num_steps: int) -> RateTrial:
        """Return a trial, which is run and kept if it is not yet."""
        record = self.record
        if (found := record.trial(learning_rate, num_steps)) is not None:
            return found
        self._reporter.report(PhaseStarted(title=f"Learning rate {learning_rate:g}, {counted(num_steps, 'step')}"))
        kept = self._bench.run(learning_rate, num_steps, record.start)
        self._kept = record.with_trial(kept)
        write_tune_record(self._directory, self._kept)
        found = self._kept.trial(learning_rate, num_steps)
        assert found is not None, "it was just kept"
        self._reporter.report(Noted(message=_outcome(found), level="warning" if found.diverged else "info"))
        return found

    def note_kept(self) -> None:
        """Report what a search that ends early has kept."""
        if self._kept is not None and self._kept.trials:
            message = f"{self._named(self._kept)} kept: the same command goes on after them"
            self._reporter.report(Noted(level="warning", message=message))

    def _named(self, record: TuneRecord) -> str:
        return f"{counted(len(record.trials), 'trial')} in {self._directory / RECORD_FILE}"


def _outcome(trial: RateTrial) -> str:
    name = f"learning rate {trial.learning_rate:g}, {counted(trial.num_steps, 'step')}"
    return f"{name}: dropped: {trial.diverged}" if trial.diverged else f"{name}: held-out loss {trial.loss:.4f}"


def _basis_of(settled: SettledRun, num_rows: int) -> TrialBasis:
    settings, rows, load_plan = settled.resolved.settings, settled.rows, settled.load_plan
    assert rows.evaluation is not None, "settled with held-out rows"
    return TrialBasis(
        settings=settings_of_trials(settings.model_dump(mode="json")),
        base=base_digest(load_plan.source.path),
        train_fingerprint=rows.train.report.fingerprint,
        eval_fingerprint=rows.evaluation.report.fingerprint,
        num_rows=num_rows,
        device=str(load_plan.device),
        compute_dtype=load_plan.dtype.name.value,
    )
