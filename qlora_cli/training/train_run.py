"""Train an adapter, from resolved settings to a run directory."""

import gc
import os
import socket
from contextlib import ExitStack, suppress
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from typing import Any

import torch

from qlora_cli.errors import OutOfMemoryError, OutputDirectoryError, TrainingError
from qlora_cli.events import Noted, Reporter, Reporters
from qlora_cli.hardware.cudnn import without_cudnn_attention
from qlora_cli.hardware.environment import describe_hardware, package_versions
from qlora_cli.hub.push import push_adapter
from qlora_cli.loading.loader import LoadedModel
from qlora_cli.model_files.digest import base_digest
from qlora_cli.ranks.group import ALONE, PeerError, ProcessGroup
from qlora_cli.ranks.place import without_launcher
from qlora_cli.runs.checkpoints import (
    CheckpointStore,
    checkpoint_of,
    damage_of,
    list_checkpoints,
    read_checksums,
    step_of,
)
from qlora_cli.runs.directory import RunDirectory, RunLock, clear_startup_files
from qlora_cli.runs.metrics import MetricsWriter
from qlora_cli.runs.record import (
    RunRecord,
    load_record,
    new_record,
    read_record,
    recorded_path,
    resumption,
    resumptions_in,
    write_record,
)
from qlora_cli.runs.report.run_page import write_report
from qlora_cli.runs.run_result import TrainPlan, TrainResult
from qlora_cli.settings.models import TrainSettings
from qlora_cli.settings.resolve import Resolved
from qlora_cli.training.callbacks.reporting import ReportWriter, draw_report
from qlora_cli.training.callbacks.stop import StopSignal
from qlora_cli.training.callbacks.trackers import tracking
from qlora_cli.training.determinism import determinism
from qlora_cli.training.out_of_resources import explained, smaller_micro_batch
from qlora_cli.training.rehearsal import RehearsalError
from qlora_cli.training.resuming.loop_state import LoopState
from qlora_cli.training.resuming.resume import given_settings, result_of_done
from qlora_cli.training.run_notes import note_previews, note_stream
from qlora_cli.training.run_plan import (
    PreparedRun,
    SettledRun,
    load_run,
    settle_run,
    with_leaner_plan,
    with_memory_of,
    with_micro_batch,
)
from qlora_cli.training.session import Session
from qlora_cli.training.settling.calibrated_base import with_calibrated_base
from qlora_cli.training.settling.settle_strategy import settle_by_strategy
from qlora_cli.training.sharding.refusals import check_dry_run, check_processes
from qlora_cli.units import counted
from qlora_cli.writing import PRIVATE_FILE, copy_folder, write_directory, write_file

ADAPTER_SECTIONS = ("lora", "model")  # sections that define an adapter


def plan(resolved: Resolved[TrainSettings], reporter: Reporter, *, force: bool = False) -> TrainPlan:
    """Prepare a run up to its first step and return its plan, without writing anything.

    `force` continues although it is predicted not to fit on the GPU.

    Raises:
        QloraError: of the type of the problem.
    """
    check_dry_run(resolved.settings.training)
    with without_launcher(), determinism(resolved.settings.training):
        settled = settle_run(resolved, reporter, force=force)
        note_previews(settled.rows, settled.load_plan.tokenizer.tokenizer, reporter)
        return load_run(settled, reporter, calibrates=False).plan


@without_cudnn_attention()
def train(
    resolved: Resolved[TrainSettings], reporter: Reporter, *, force: bool = False, group: ProcessGroup = ALONE
) -> TrainResult:
    """Train an adapter and return the result; resume the run in the output directory, if there is one.

    Ctrl-C, SIGTERM and SIGHUP end the run after the step in progress, with a checkpoint and the adapter as it is
    then; the result says so. Before the first step they end the process. `force` continues although the run is
    predicted not to fit on the GPU. All processes of `group` call this; the first one writes and reports.

    Raises:
        QloraError: of the type of the problem. Before the first step, nothing is left on the disk.
    """
    assert group.size == resolved.settings.training.num_gpus, "as many processes as share a step"
    check_processes(resolved.settings)
    result = result_of_done(resolved) if group.is_first else None
    if (done := group.exchange(result)[0]) is not None:
        return _already_done(resolved.settings, done, reporter, group)
    with without_launcher(), determinism(resolved.settings.training):
        kept = None
        if resolved.settings.training.calibrate:
            resolved, kept = with_calibrated_base(resolved, reporter, force=force)
        settled = _settle_together(resolved, reporter, force=force, group=group)
        return _train_settled(replace(settled, kept=kept or settled.kept), reporter, group)


def _settle_together(
    resolved: Resolved[TrainSettings], reporter: Reporter, *, force: bool, group: ProcessGroup
) -> SettledRun:
    """Settle a run: in the first process, which decides, then in the first of other machines, then in all others.

    So models are downloaded and data prepared once on a machine. What is planned for the first one's GPU holds for
    all, which divide the rows of a step alike.
    """
    settled = settle_by_strategy(resolved, reporter, force=force) if group.is_first else None
    (resolved, *_) = group.exchange(resolved if settled is None else settled.resolved)
    if settled is None and group.is_first_on_host:
        settled = settle_run(resolved, reporter, force=force)
    group.exchange(None)
    settled = settled or settle_run(resolved, reporter, force=force)
    group.exchange(None)
    return replace(settled, resolved=resolved)


def _train_settled(settled: SettledRun, reporter: Reporter, group: ProcessGroup) -> TrainResult:
    if settled.is_done and settled.resume is not None:
        result = TrainResult.of_run(settled.resume.run, settled.resume.record)
        assert result is not None, "checked when the run was settled"
        return _already_done(settled.resolved.settings, result, reporter, group)
    prepared = load_run(settled, reporter, group)
    (resolved, *_) = group.exchange(prepared.resolved)  # the model may have changed what was planned
    if not group.is_first:
        prepared = with_memory_of(resolved, prepared)
    return run(prepared, reporter, group)


def _already_done(
    settings: TrainSettings, result: TrainResult, reporter: Reporter, group: ProcessGroup
) -> TrainResult:
    if not group.is_first:
        return result
    directory = RunDirectory(settings.output.directory)
    reporter.report(Noted(message=f"{directory.path} holds this run, and it is done: nothing is left to train"))
    with suppress(OutputDirectoryError), RunLock(directory):  # a disk that can't be written to has none to clear
        directory.clear_leftovers()
    if not _has_current_report(directory):  # the process was killed after the record was written
        draw_report(directory.path, reporter)
    return _pushed(settings, directory, load_record(directory.path), result, reporter)


def _has_current_report(directory: RunDirectory) -> bool:
    report, record = directory.report_file, directory.run_file
    return report.exists() and report.stat().st_mtime_ns >= record.stat().st_mtime_ns


def run(prepared: PreparedRun, reporter: Reporter, group: ProcessGroup = ALONE) -> TrainResult:
    """Train a prepared run; see `train`."""
    directory = RunDirectory(prepared.plan.output)
    group.exchange(None)  # all have read what the first one is about to change
    if not group.is_first:
        group.exchange(None)
        return _train(prepared, directory, reporter, "", group)[1]
    made = [path for path in (directory.path, *directory.path.absolute().parents) if not path.exists()]
    held = {path.name for path in directory.path.iterdir()} if directory.path.is_dir() else set()
    with RunLock(directory):
        try:
            return _run_locked(prepared, directory, reporter, group)
        except BaseException:
            if not directory.is_run:
                clear_startup_files(directory.path, held, made)
            raise


def _run_locked(
    prepared: PreparedRun, directory: RunDirectory, reporter: Reporter, group: ProcessGroup
) -> TrainResult:
    _check_unchanged(prepared, directory)
    directory.clear_leftovers()
    _prepare_resume(prepared, directory, reporter)
    group.exchange(None)  # the others may read the checkpoint
    writer = MetricsWriter(directory)
    writer.end_partial_line()
    reporter = Reporters([writer, ReportWriter(directory.path, reporter), reporter])
    started = datetime.now(UTC).isoformat(timespec="seconds")
    try:
        prepared, result = _train(prepared, directory, reporter, started, group)
    except BaseException as error:
        with suppress(OSError):  # the disk may be full, which is what `error` says
            _record_failure(directory, error)
        raise
    note_stream(prepared.train_data, reporter)
    status = "interrupted" if result.interrupted_by else "done"
    written = read_record(directory.path).adapter_files
    ended = {"status": status, "result": result.recorded(), "adapter_files": written}
    record = _opening_record(prepared, directory, started).updated(**ended)
    write_record(directory, record)
    draw_report(directory.path, reporter)
    return result if result.interrupted_by else _pushed(prepared.settings, directory, record, result, reporter)


def _record_beginning(prepared: PreparedRun, directory: RunDirectory, started: str, reporter: Reporter) -> None:
    """Record that the run starts or resumes, and prepare its directory for writing."""
    write_record(directory, _opening_record(prepared, directory, started))
    if prepared.resume is not None and prepared.resume.checkpoint is not None:  # which has the same weights
        moved = directory.remove_adapter(
            [prepared.resume.record.adapter_files, read_checksums(prepared.resume.checkpoint)]
        )
        if moved is not None:
            reporter.report(
                Noted(level="warning", message=f"{directory.adapter} was not as the run wrote it: see {moved}")
            )
    directory.create()
    evaluated = prepared.eval_data.skipped if prepared.eval_data else ()
    directory.write_skipped_rows(dict.fromkeys([*prepared.train_data.skipped, *evaluated]))
    if prepared.train_data.stream is not None:
        prepared.train_data.stream.skipped_file = directory.skipped_rows_of_stream


def _record_failure(directory: RunDirectory, error: BaseException) -> None:
    """Record how the run ended, if this process started it; otherwise leave its record unchanged."""
    record = read_record(directory.path)
    if record.status == "running" and record.pid == os.getpid():
        status = "failed" if isinstance(error, Exception) else "interrupted"
        # By which a resume knows to plan for less memory, whichever process ran out of it.
        kind = OutOfMemoryError if isinstance(error, PeerError) and error.ran_out_of_memory else type(error)
        write_record(directory, record.updated(status=status, error=f"{kind.__name__}: {error}"))
        write_report(directory.path)


def _pushed(
    settings: TrainSettings,
    directory: RunDirectory,
    record: RunRecord,
    result: TrainResult,
    reporter: Reporter,
) -> TrainResult:
    """Push the adapter of a finished run, if requested and not yet done; return the updated result.

    Raises:
        PushError: it can't be pushed. The run stays as it is.
    """
    if settings.output.push_to_hub is None or result.pushed_to is not None:
        return result
    result = replace(result, pushed_to=push_adapter(settings.output, directory.adapter, reporter))
    write_record(directory, record.updated(result=result.recorded()))
    return result


def _train(
    prepared: PreparedRun, directory: RunDirectory, reporter: Reporter, started: str, group: ProcessGroup
) -> tuple[PreparedRun, TrainResult]:
    """Train, with smaller micro-batches if allowed and needed; return the run as it was trained, and its result."""
    if prepared.loaded.device.type == "cuda" and torch.cuda.device_count() > 1:
        visible = torch.cuda.device_count()
        message = f"{visible} GPUs are visible; this run uses {prepared.loaded.device} (--num-gpus {visible} uses all)"
        reporter.report(Noted(message=message))
    with ExitStack() as stack:
        output = prepared.settings.output
        trackers = stack.enter_context(tracking(output, directory.path, reporter)) if group.is_first else ()
        stop = stack.enter_context(StopSignal(reporter, group))
        while True:
            _check_alike(prepared, group)
            session = Session(prepared, directory, reporter, stop, trackers, group)
            if group.is_first:
                _record_beginning(prepared, directory, started, reporter)  # only now, since TRL may refuse the run
            try:
                return prepared, session.train()
            except RehearsalError as error:
                session.trainer.abandon()
                lowered = _lowered_together(prepared, group)
                if lowered is None:
                    raise _explained(error, prepared, session) from error
            except Exception as error:  # noqa: BLE001 - whatever it is, the last step is saved first
                _save_last_step(session, error)
                explanation = _explained(error, prepared, session)
                raise explanation from (None if explanation is error else error)
            # The tensors of the failed pass are freed together with its traceback.
            del session
            gc.collect()
            torch.cuda.empty_cache()
            prepared, what = lowered
            reporter.report(Noted(level="warning", message=what))


def _check_alike(prepared: PreparedRun, group: ProcessGroup) -> None:
    """Check that all processes train the same run, and divide the rows of a step alike.

    Raises:
        TrainingError: one does not, such as on a machine with other files.
    """
    training, evaluation, resume = prepared.settings.training, prepared.eval_data, prepared.resume
    own = {
        "base": base_digest(prepared.loaded.source.path) if group.size > 1 else None,
        "rows": prepared.train_data.report.fingerprint,
        "held-out rows": evaluation.report.fingerprint if evaluation is not None else None,
        "number of steps": prepared.plan.num_steps,
        "step to resume at": resume.step if resume is not None else 0,
        "micro-batches": (
            training.micro_batch_size,
            training.gradient_accumulation_steps,
            training.micro_batch_tokens,
        ),
    }
    for rank, other in enumerate(group.exchange(own)):
        if differing := [name for name in own if other[name] != own[name]]:
            raise TrainingError(
                f"process {rank} and process {group.rank} differ in their {', '.join(differing)}",
                hint="All machines need the same files, the same output directory and the same versions of qlora.",
            )


def _lowered_together(prepared: PreparedRun, group: ProcessGroup) -> tuple[PreparedRun, str] | None:
    """Return what `_lowered` does in the first process."""
    lowered = _lowered(prepared) if group.is_first else None
    (decision, *_) = group.exchange(None if lowered is None else (lowered[0].resolved, lowered[1]))
    if lowered is None and decision is not None:
        return with_memory_of(decision[0], prepared), decision[1]
    return lowered


def _lowered(prepared: PreparedRun) -> tuple[PreparedRun, str] | None:
    """Return a run that takes less memory, and what is changed in words; None if nothing may or can be lowered.

    What was planned is changed first, since the result stays the same.
    """
    plan = prepared.plan
    rows = (
        f"{counted(plan.micro_batch_size, 'row')} at once"
        if plan.micro_batch_tokens is None
        else f"micro-batches of up to {counted(plan.micro_batch_tokens, 'token')}"
    )
    leaner = with_leaner_plan(prepared)
    if leaner is not None and prepared.outlook is not None and leaner.outlook is not None:
        before, now = prepared.outlook.checkpointing, leaner.outlook.plan_name
        return leaner, f"{rows} with gradient checkpointing {before} do not fit in memory: now {now}"
    smaller = _smaller_micro_batch(prepared)
    if smaller is None:
        return None
    flags = smaller_micro_batch(plan, smaller)
    return with_micro_batch(prepared, smaller), f"{rows} do not fit in memory: lowered to {flags}"


def _smaller_micro_batch(prepared: PreparedRun) -> int | None:
    """Return at most half the micro-batch; None if it may not or can't be lowered.

    In rows, it is a divisor of the batch. In tokens, it is at least the longest row, which no smaller one divides.
    """
    size, rows = prepared.plan.micro_batch_size, prepared.plan.examples_per_step
    if not prepared.settings.training.auto_micro_batch:
        return None
    if (tokens := prepared.plan.micro_batch_tokens) is not None:
        longest = prepared.longest_row_tokens
        return max(longest, min(tokens, rows * longest) // 2) if rows > 1 and tokens > longest else None
    if size == 1:
        return None
    return next(smaller for smaller in range(size // 2, 0, -1) if rows % smaller == 0)


def _save_last_step(session: Session, error: Exception) -> None:
    """Save the state after the last complete step, during a failed one."""
    try:
        session.trainer.save_last_step()
    except Exception as another:  # noqa: BLE001 - the first failure is reported
        error.add_note(f"the last step could not be saved either: {another}")


def _explained(error: Exception, prepared: PreparedRun, session: Session) -> Exception:
    return explained(error, prepared, session.trainer.phase, _saved_training(session), step=session.step)


def _saved_training(session: Session) -> str:
    """Return a sentence on where the last saved state is; empty if there is none, or another process tells."""
    newest = session.store.all()[-1:]
    if not newest or not session.group.is_first:
        return ""
    return f"The training until step {step_of(newest[0]):,} is saved in {newest[0]}."


def _check_unchanged(prepared: PreparedRun, directory: RunDirectory) -> None:
    """Check that no other process trained into the directory while this one was loading.

    Raises:
        OutputDirectoryError: one did.
    """
    resume = prepared.resume
    known = resume is not None and resume.run.path.resolve() == directory.path.resolve()
    newest = list_checkpoints(directory.checkpoints)[-1:]
    is_behind = resume is not None and known and newest and step_of(newest[0]) > resume.step and not resume.damaged
    if is_behind or (directory.run_file.exists() and not known):
        raise OutputDirectoryError(
            f"another process has written to {directory.path} meanwhile", hint="Give the same command again."
        )


def _prepare_resume(prepared: PreparedRun, directory: RunDirectory, reporter: Reporter) -> None:
    """Prepare the directory for a resume, before it is recorded.

    From a run in another directory, the checkpoint, the best one and the metrics are copied. Damaged checkpoints
    are renamed, so that they do not count as newer than those to come.
    """
    resume = prepared.resume
    if resume is None:
        return
    store = CheckpointStore(directory.checkpoints, num_kept=1, needed_bytes=0, journal=directory.metrics_file)
    if resume.run.path.resolve() == directory.path.resolve():
        for moved in store.move_damaged_aside(resume.step):
            reporter.report(Noted(level="warning", message=f"the damaged checkpoint is now {moved}"))
        return
    assert resume.checkpoint is not None, "refused by find_resume"
    directory.create()
    best_step = LoopState.read(resume.checkpoint).progress.best_step
    best = resume.checkpoint if best_step is None else checkpoint_of(resume.checkpoint.parent, best_step)
    for checkpoint in {resume.checkpoint, best}:
        if damage_of(checkpoint) is None:
            for path, reason in store.free_path(step_of(checkpoint)).items():
                reporter.report(Noted(level="warning", message=f"{path} is not deleted: {reason}"))
            write_directory(store.path_of(step_of(checkpoint)), partial(copy_folder, checkpoint))
    if resume.run.metrics_file.is_file():
        text = resume.run.metrics_file.read_text(encoding="utf-8", errors="replace")
        write_file(directory.metrics_file, text, mode=PRIVATE_FILE)


def _asked_of_adapter(loaded: LoadedModel) -> dict[str, dict[str, Any]]:
    """Return the settings that were given for an adapter that is trained further, by its run and those before."""
    record = loaded.source.record
    if record is None:
        return {}
    before, given = record.asked_of_adapter, record.asked
    return {section: {**before.get(section, {}), **given.get(section, {})} for section in ADAPTER_SECTIONS}


def _opening_record(prepared: PreparedRun, directory: RunDirectory, now: str) -> RunRecord:
    settings, loaded, resume = prepared.settings, prepared.loaded, prepared.resume
    evaluation = prepared.eval_data
    earlier = resume.record if resume is not None else RunRecord()
    resumed = [*resumptions_in(directory, earlier)]
    if resume is not None:
        resumed.append(resumption(directory, now, resume.step, resume.checkpoint))
    content = {
        "status": "running",
        "started": earlier.started or now,
        "resumed": [entry.content for entry in resumed],
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "settings": settings.model_dump(mode="json"),
        "asked": given_settings(prepared.asked),
        "asked_of_adapter": _asked_of_adapter(loaded),
        "origins": {path: origin.where for path, origin in prepared.resolved.origins.items()},
        "seed": settings.training.seed,
        "versions": package_versions(),
        "hardware": describe_hardware(loaded.device),
        "base_model": loaded.report(),
        "base_model_path": loaded.source.path.absolute(),
        "base_model_digest": base_digest(loaded.source.path),
        "data": {
            "train": prepared.train_data.report,
            "eval": evaluation.report if evaluation else None,
        },
        "plan": replace(prepared.plan, output=recorded_path(directory, prepared.plan.output)),
        "adapter_files": earlier.adapter_files,  # until it is dropped
    }
    return new_record(directory, content)
