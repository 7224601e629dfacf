"""Find the run to resume, its checkpoint, and the settings that changed since. Imports no torch.

A run may resume only if the result is the one that its record describes. So settings that shape the adapter must be
unchanged; others may change, and are listed. The marks of a setting (`OnResume`) say which. The data may have
another name as long as the rows are the same, by their digest, and the dtype as long as it resolves to the same.
"""

import random
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_cli.errors import ModelError, OutputDirectoryError, Problem, QloraError, SettingsError
from qlora_cli.files import as_json, check_output_directory, path_problem
from qlora_cli.runs.checkpoints import TRAINER_STATE, damage_of, is_checkpoint_name, list_checkpoints, step_of
from qlora_cli.runs.directory import ADAPTER, STEP_PREFIX, RunDirectory, RunLock, has_only_startup_files
from qlora_cli.runs.record import RunRecord, load_record, read_record
from qlora_cli.runs.run_result import TrainResult
from qlora_cli.runs.run_weights import is_complete
from qlora_cli.settings.choices import Schedule
from qlora_cli.settings.models import SECTIONS, OutputSettings, TrainSettings, metadata_of
from qlora_cli.settings.resolve import Resolved
from qlora_cli.settings.setting_metadata import OnResume
from qlora_cli.units import counted

AUTO, NEVER = "auto", "never"
BUSY_ATTEMPTS, BUSY_PAUSE = 6, 0.1  # seconds, rising
RESUME = "output.resume"
NAMES_OF_BASE = ("model.name", "model.revision")

CONSTANT = {Schedule.CONSTANT, Schedule.CONSTANT_WITH_WARMUP}


@dataclass(frozen=True, kw_only=True)
class Resume:
    """An earlier run that is resumed.

    Attributes:
        run: The directory of the run.
        record: The record of the run.
        checkpoint: The last good checkpoint; None if there is none yet, so that training restarts.
        damaged: Newer checkpoints that can't be used, each with the reason.
    """

    run: RunDirectory
    record: RunRecord
    checkpoint: Path | None
    damaged: tuple[str, ...]

    @property
    def step(self) -> int:
        """The step after which training resumes."""
        return 0 if self.checkpoint is None else step_of(self.checkpoint)

    @property
    def is_done(self) -> bool:
        """Whether the earlier run was trained to its end."""
        return self.record.is_done

    @property
    def is_complete(self) -> bool:
        """Whether it was, and its final adapter exists."""
        return is_complete(self.run, self.record)


def output_problem(output: OutputSettings) -> QloraError | None:
    """Return why a run can't be written to its directory, or can't be resumed."""
    if (problem := path_problem(output.directory)) is not None:
        return problem
    directory = RunDirectory(output.directory)
    if (unwritable := directory.unwritable) is not None:
        return OutputDirectoryError(
            f"{unwritable[0]} {unwritable[1]}: a run can't write into it",
            hint="Replace it by a copy of its target, or choose another --output.",
        )
    try:
        record = _record_in(directory)
    except OutputDirectoryError as error:
        return error
    if output.resume == NEVER and record is not None:
        return OutputDirectoryError(
            f"{directory.path} already holds a run, which is not to be resumed",
            hint="Leave --resume never out to resume it, choose another --output, or delete the run.",
        )
    asked = _path_of(output)
    if asked is not None and not _was_resumed_from(record, asked) and (wrong := _path_problem(asked, directory)):
        return wrong
    if record is not None:
        return _is_busy(directory)
    if directory.path.is_dir() and has_only_startup_files(directory.path, is_copying=asked is not None):
        return None
    return check_output_directory(directory.path)


def _path_of(output: OutputSettings) -> Path | None:
    return None if output.resume in {AUTO, NEVER} else Path(output.resume)


def _record_in(directory: RunDirectory) -> RunRecord | None:
    """Return the record of the run in a directory; None if there is no run.

    Raises:
        OutputDirectoryError: it can't be read.
    """
    if not directory.run_file.exists():
        return None
    try:
        return load_record(directory.path)
    except ModelError as error:
        raise OutputDirectoryError(str(error), hint=f"{error.hint}, or choose another --output.") from error


def _is_accessible(path: Path) -> bool:
    """Return whether a path can be checked for existence: it is not too long, or a link to itself."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return True
    except (OSError, ValueError):
        return False
    return True


def _was_resumed_from(record: RunRecord | None, asked: Path) -> bool:
    """Return whether a run was resumed from `asked`, a checkpoint or its run, so that its own checkpoints apply."""
    if record is None or not _is_accessible(asked):
        return False
    named = (place for entry in record.resumed for place in record.checkpoint_candidates(entry))
    places = {place.resolve() for place in named if _is_accessible(place)}
    return asked.resolve() in places | {place.parent.parent for place in places}


def _is_busy(directory: RunDirectory) -> QloraError | None:
    """Return the error that another process trains into the directory; those of one run look here at the same time."""
    busy: QloraError | None = None
    for attempt in range(BUSY_ATTEMPTS):
        try:
            with RunLock(directory):
                return None
        except OutputDirectoryError as error:
            busy = error
        time.sleep((attempt + 1) * BUSY_PAUSE * random.random())  # noqa: S311 - only spreads them
    return busy


def _path_problem(path: Path, output: RunDirectory) -> QloraError | None:
    hint = f"Name a folder {STEP_PREFIX}N in the checkpoints of a run, or a run directory."
    run = _run_of(path) if _is_accessible(path) else None
    if run is None or _record_in(run) is None:
        return OutputDirectoryError(f"there is no checkpoint of a run in {path}", hint=hint, setting=RESUME)
    is_same = run.path.resolve() == output.path.resolve()
    if output.run_file.exists() and not is_same:
        return OutputDirectoryError(
            f"{output.path} already holds a run, other than the one that --resume {path} names",
            hint="Choose a new --output, or that of the run to resume.",
        )
    newest = list_checkpoints(run.checkpoints)[-1:]
    if is_same and _is_checkpoint(path) and [path.resolve()] != [checkpoint.resolve() for checkpoint in newest]:
        return OutputDirectoryError(
            f"{output.path} has checkpoints after {path.name}, which the run would overwrite",
            hint="Resume from there in a new --output.",
        )
    return None


def _run_of(path: Path) -> RunDirectory | None:
    """Return the run that `path` is, or that it is a checkpoint of."""
    if _is_checkpoint(path):
        return RunDirectory(path.absolute().parent.parent)
    return RunDirectory(path) if RunDirectory(path).is_run else None


def _is_checkpoint(path: Path) -> bool:
    return is_checkpoint_name(path) and (path / TRAINER_STATE).is_file()


def find_resume(output: OutputSettings) -> Resume | None:
    """Return the run to resume; None for a new one. Every file of the checkpoint is read and checked.

    Raises:
        OutputDirectoryError: all checkpoints are damaged; or there is none, and the run is in another directory, or
            a restart would delete the adapter; or a finished run has lost its weights.
    """
    asked, own = _path_of(output), RunDirectory(output.directory)
    if asked is not None and _was_resumed_from(_record_in(own), asked):
        asked = None
    run = own if asked is None else _run_of(asked)
    record = None if run is None else _record_in(run)
    if run is None or record is None:
        return None
    is_one = asked is not None and _is_checkpoint(asked)
    candidates = [asked] if asked is not None and is_one else list_checkpoints(run.checkpoints)
    damaged: list[str] = []
    for checkpoint in reversed(candidates):
        reason = damage_of(checkpoint)
        if reason is None:
            return Resume(run=run, record=record, checkpoint=checkpoint, damaged=tuple(damaged))
        damaged.append(f"{checkpoint}: {reason}")
    is_own = run.path.resolve() == own.path.resolve()
    if damaged and not (is_own and is_complete(run, record)):
        raise OutputDirectoryError(
            f"all checkpoints of {run.path} are damaged: {'; '.join(damaged)}",
            hint="Restart with another --output.",
        )
    if not is_own:
        raise OutputDirectoryError(
            f"the run of {asked} has no checkpoint to resume from",
            hint="Leave --resume out to restart, or train its adapter further with --model.",
            setting=RESUME,
        )
    if record.is_done and not is_complete(run, record):
        raise OutputDirectoryError(
            f"the run in {run.path} is done, and neither its adapter nor a checkpoint exists any more",
            hint="Restore one of them, or restart with another --output.",
        )
    resume = Resume(run=run, record=record, checkpoint=None, damaged=tuple(damaged))
    if not record.is_done:
        check_adapter_is_safe(resume, output)
    return resume


def check_adapter_is_safe(resume: Resume, output: OutputSettings) -> None:
    """Check that training in `output` does not delete the only weights of the run.

    Raises:
        OutputDirectoryError: the run has an adapter, and no checkpoint to resume from.
    """
    run = resume.run
    is_own = run.path.resolve() == output.directory.resolve()
    if resume.checkpoint is None and is_own and run.holds_adapter_weights:
        raise OutputDirectoryError(
            f"{run.path} has no checkpoint to resume from, and its {ADAPTER}/ would be lost",
            hint=f"Train it further with --model {run.adapter} in a new --output, or delete it.",
        )


def changed_settings(resume: Resume, settings: TrainSettings) -> dict[str, tuple[Any, Any]]:
    """Return the settings that differ, by `section.key`: their values in the earlier run and now."""
    changed = {}
    for section, values in as_json(settings.model_dump(mode="json")).items():
        known = resume.record.settings.get(section, {})
        for key, value in values.items():
            # In a run of an older version, a missing setting had the effect of today's default.
            default = as_json(SECTIONS[section].model_fields[key].get_default(call_default_factory=True))
            if (before := known.get(key, default)) != value:
                changed[f"{section}.{key}"] = (before, value)
    return changed


def given_settings(asked: Resolved[TrainSettings]) -> dict[str, dict[str, Any]]:
    """Return the settings that were given, in the form of a record."""
    return {section: as_json(asked.given(section)) for section in type(asked.settings).model_fields}


def result_of_done(asked: Resolved[TrainSettings]) -> TrainResult | None:
    """Return the result of the run in the output directory, if it is done and has these settings."""
    settings = asked.settings
    run = RunDirectory(settings.output.directory)
    record = read_record(run.path)
    if not is_complete(run, record) or settings.output.resume == NEVER:
        return None
    resume = Resume(run=run, record=record, checkpoint=None, damaged=())
    is_same_command = bool(record.asked) and all(
        values == record.asked.get(section, {})
        for section, values in given_settings(asked).items()
        if section != "output"
    )
    if not is_same_command and any(not path.startswith("output.") for path in changed_settings(resume, settings)):
        return None
    return TrainResult.of_run(run, record)


def check_changes(
    resume: Resume, settings: TrainSettings, *, trains_given_adapter: bool, digest: str | None = None
) -> list[str]:
    """Return descriptions of the changed settings; with `trains_given_adapter` the LoRA settings are the adapter's.

    The base may have another name if the `digest` of its weights is the same.

    Raises:
        SettingsError: with every change that would contradict the record.
    """
    changed = changed_settings(resume, settings)
    if resume.checkpoint is None and not resume.is_done:  # it restarts
        return []
    problems = [
        Problem(
            where=path,
            message=f"is {_shown(now)}, and was {_shown(before)} until step {resume.step:,}",
            hint=f"Leave it as it was, or restart with another --output{_or_train_on(resume)}.",
        )
        for path, (before, now) in changed.items()
        if metadata_of(path).on_resume is OnResume.SAME
        and not (trains_given_adapter and path.startswith("lora."))
        and not (path in NAMES_OF_BASE and not trains_given_adapter and _is_trained_on(resume, digest))
    ]
    problems += _batch_problems(resume, changed, settings)
    if problems:
        raise SettingsError(problems)
    return [f"{path}: {_shown(before)} before, {_shown(now)} now" for path, (before, now) in changed.items()]


def _is_trained_on(resume: Resume, digest: str | None) -> bool:
    """Return whether the run trained a new adapter on the base with this digest."""
    loaded = resume.record.base_model
    began_with_new_adapter = loaded is not None and loaded.adapter is None
    return began_with_new_adapter and digest is not None and digest == resume.record.base_model_digest


def _or_train_on(resume: Resume) -> str:
    return "" if resume.checkpoint is None else f"; or train its adapter further with --model {resume.checkpoint}"


def _batch_problems(
    resume: Resume, changed: Mapping[str, tuple[Any, Any]], settings: TrainSettings
) -> Iterator[Problem]:
    if not any(metadata_of(path).on_resume is OnResume.BATCH for path in changed):
        return
    training = settings.training
    rows, rows_before = training.micro_batch_size * training.gradient_accumulation_steps, 1
    for key in ("micro_batch_size", "gradient_accumulation_steps"):
        before = resume.record.setting(f"training.{key}")
        rows_before *= before if isinstance(before, int) else 1
    if rows != rows_before:
        yield Problem(
            where="training.micro_batch_size x training.gradient_accumulation_steps",
            message=f"is {counted(rows, 'row')} a step, and was {rows_before}",
            hint=f"Choose them so that their product is {rows_before}, or restart with another --output.",
        )


def check_length(resume: Resume, settings: TrainSettings, num_steps: int) -> None:
    """Check that a run whose length changes keeps the learning rates of its past steps.

    Raises:
        SettingsError: it does not.
        ModelError: its planned length can't be read.
    """
    if any(problem.startswith("plan.num_steps:") for problem in resume.record.problems):
        raise resume.record.missing_error("how many steps there were to be", "plan.num_steps")
    before = resume.record.plan.num_steps or num_steps
    if num_steps == before or (resume.checkpoint is None and not resume.is_done):
        return
    training = settings.training
    is_same_warmup = training.schedule == Schedule.CONSTANT or (
        round(training.warmup_ratio * num_steps) == round(training.warmup_ratio * before)
    )
    if training.schedule in CONSTANT and is_same_warmup and num_steps >= resume.step:
        return
    raise SettingsError(
        [
            Problem(
                where="training.max_steps, training.epochs",
                message=f"make {counted(num_steps, 'step')}, and made {before:,}; the learning rates until step "
                f"{resume.step:,} were those of {counted(before, 'step')}",
                hint=f"Leave them as they were, or restart with another --output{_or_train_on(resume)}.",
            )
        ]
    )


def check_rows(resume: Resume, fingerprints: Mapping[str, str | None]) -> None:
    """Check that the rows, by the digests of the `train` and `eval` data, are unchanged.

    Raises:
        SettingsError: they are not.
    """
    if resume.checkpoint is None and not resume.is_done:
        return
    rows = {"train": resume.record.data.train, "eval": resume.record.data.eval}
    before = {name: None if (known := rows[name]) is None else known.fingerprint for name in fingerprints}
    problems = [
        Problem(
            where=f"data ({'training' if name == 'train' else 'held out'})",
            message=f"the rows are not those that were trained until step {resume.step:,}",
            hint=f"Restore them, or restart with another --output{_or_train_on(resume)}.",
        )
        for name, fingerprint in fingerprints.items()
        if fingerprint != before[name]
    ]
    if problems:
        raise SettingsError(problems)


def check_base(resume: Resume, digest: str, compute_dtype: str) -> None:
    """Check that the base is the one of the run, in the same compute dtype.

    Raises:
        ModelError: it is not.
    """
    if resume.checkpoint is None:
        return
    known = resume.record.base_model_digest or digest
    hint = f"Restart with another --output{_or_train_on(resume)}."
    if known != digest:
        raise ModelError(
            f"the weights of the base are not those that were trained on until step {resume.step:,}",
            hint=f"Restore them, or name their --revision. {hint}",
        )
    before = resume.record.plan.compute_dtype or compute_dtype
    if before != compute_dtype:
        raise ModelError(
            f"model.dtype resolves to {compute_dtype} here, and was {before} until step {resume.step:,}",
            hint=f"Resume with --dtype {before}, if this machine has it. {hint}",
        )


def changed_versions(resume: Resume, versions: Mapping[str, str]) -> list[str]:
    """Return descriptions of libraries whose versions changed."""
    before = resume.record.versions
    return [
        f"{name}: {before[name]} before, {version} now"
        for name, version in versions.items()
        if name in before and before[name] != version
    ]


def _shown(value: Any) -> str:
    if isinstance(value, bool):  # as in a settings file
        return "true" if value else "false"
    return "not set" if value is None else str(value)
