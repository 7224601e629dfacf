"""Explain errors of exhausted memory or disk in training: what happened, what is saved, and what to do next."""

import errno
import shutil
from pathlib import Path

import torch

from qlora_cli.errors import OutOfMemoryError, OutputDirectoryError, QloraError, TrainingError
from qlora_cli.hardware.counters import is_out_of_memory, peak_device_allocated_bytes, peak_device_reserved_bytes
from qlora_cli.ranks.group import PeerError, PeerLostError
from qlora_cli.runs.run_result import PeakMemory, TrainPlan
from qlora_cli.settings.choices import Checkpointing
from qlora_cli.training.rehearsal import RehearsalError
from qlora_cli.training.resuming.saved_state import file_that_failed_a_step, invalid_file_error
from qlora_cli.training.run_plan import PreparedRun
from qlora_cli.units import format_bytes

ALMOST_NOTHING_BYTES = 64 * 1024
NUM_CONSUMERS = 3


def explained(error: Exception, prepared: PreparedRun, phase: str, saved: str, *, step: int) -> Exception:
    """Return `error` as one with a hint, if its cause is known; `saved` says what training is saved.

    `phase` names the part of a step that failed, `step` is the last complete one.
    """
    if isinstance(error, RehearsalError):
        return _out_of_memory(error.__cause__ or error, prepared, f"{phase}, tried before the first step", saved)
    if is_out_of_memory(error) and not isinstance(error, QloraError):
        return _out_of_memory(error, prepared, phase, saved)
    if isinstance(error, OutputDirectoryError):  # about the checkpoint to resume from, before a step
        return error
    if isinstance(error, PeerError | PeerLostError):
        leaner = _leaner_resume(prepared, saved) if isinstance(error, PeerError) and error.ran_out_of_memory else None
        error.hint = f"{leaner or error.hint or ''} {saved}".strip()
        return error
    if isinstance(error, QloraError):
        return _with_saved(error, saved)
    resume = prepared.resume
    checkpoint = resume.checkpoint if resume is not None and step == resume.step else None
    if checkpoint is not None and (file := file_that_failed_a_step(error)):
        return invalid_file_error(checkpoint / file, str(error).split("\n", maxsplit=1)[0])
    if "does not have a deterministic implementation" in str(error):
        return TrainingError(
            str(error).split(". ", maxsplit=1)[0], hint=f"Leave training.full_determinism out. {saved}".strip()
        )
    if is_disk_full(error, prepared.plan.output):
        return TrainingError(
            f"the disk of {prepared.plan.output} is full: {error}",
            hint=f"Free disk space and give the same command again: the run resumes. {saved}".strip(),
        )
    return error


def _with_saved(error: QloraError, saved: str) -> QloraError:
    """Return one of our errors as an error of a run that had started."""
    hint = f"{error.hint or ''} {saved}".strip()
    return TrainingError(str(error), hint=hint or None)


def is_disk_full(error: Exception, directory: Path) -> bool:
    """Return whether an error is caused by a full disk."""
    if isinstance(error, OSError):
        return error.errno in {errno.ENOSPC, errno.EDQUOT}
    # safetensors and torch.save report a full disk by their own errors, without an errno.
    return "No space left" in str(error) or shutil.disk_usage(directory).free < ALMOST_NOTHING_BYTES


def _out_of_memory(error: BaseException, prepared: PreparedRun, phase: str, saved: str) -> OutOfMemoryError:
    plan = prepared.plan
    device = prepared.loaded.device
    lines = [f"{plan.device} ran out of memory in {phase}: {str(error).splitlines()[0]}"]
    if plan.predicted_memory is not None:
        predicted = plan.predicted_memory
        largest = list(predicted.consumers.items())[:NUM_CONSUMERS]
        lines += [
            f"predicted {format_bytes(predicted.allocated_bytes)} allocated, "
            f"{format_bytes(predicted.reserved_bytes)} reserved",
            f"largest: {', '.join(f'{name} {format_bytes(size)}' for name, size in largest)}",
        ]
    if measured := _measured(device):
        lines.append(measured)
    # A run that was predicted to fit has no suggestions.
    suggestions = prepared.outlook.suggestions() if prepared.outlook is not None else ""
    hint = f"It would fit with {suggestions}." if suggestions else f"Try {_smaller_settings(prepared)}."
    leaner = _leaner_resume(prepared, saved)
    if leaner is not None:
        hint = leaner
    elif saved:
        saved = f"{saved} A resumed run may change the micro-batch, with the same batch, and checkpointing."
    return OutOfMemoryError("; ".join(lines), hint=f"{hint} {saved}".strip())


def _leaner_resume(prepared: PreparedRun, saved: str) -> str | None:
    """Return a sentence on how a resume takes less memory; None if nothing is saved, or its plan is the leanest."""
    leaner = prepared.outlook.leaner() if prepared.outlook is not None else None
    if not saved or leaner is None:
        return None
    return f"Give the same command again: it goes on with gradient checkpointing {leaner.checkpointing}."


def _measured(device: torch.device) -> str | None:
    peak = PeakMemory(
        host_bytes=0,
        device_allocated_bytes=peak_device_allocated_bytes(device),
        device_reserved_bytes=peak_device_reserved_bytes(device),
    )
    if peak.device_allocated_bytes is None or peak.device_reserved_bytes is None:
        return None
    return (
        f"measured {format_bytes(peak.device_allocated_bytes)} allocated, "
        f"{format_bytes(peak.device_reserved_bytes)} reserved"
    )


def _smaller_settings(prepared: PreparedRun) -> str:
    """Return flags that need less memory, for a run without a prediction."""
    plan, settings = prepared.plan, prepared.settings
    flags = []
    if plan.micro_batch_tokens is not None:
        if plan.micro_batch_tokens > plan.longest_row_tokens:
            flags.append(smaller_micro_batch(plan, max(8, plan.longest_row_tokens)))
    elif plan.micro_batch_size > 1:
        flags.append(smaller_micro_batch(plan, 1))
    if plan.gradient_checkpointing in (Checkpointing.OFF, Checkpointing.SELECTIVE):
        flags.append("--gradient-checkpointing on")
    if plan.optimizer == "adamw_torch":
        flags.append("--optimizer adamw_8bit")
    of_row = plan.longest_row_tokens // settings.training.objective.num_sequences
    longest = settings.data.max_length if settings.data.packing else of_row
    flags.append(f"--max-length {max(8, longest // 2)}")
    return " or ".join(flags)


def smaller_micro_batch(plan: TrainPlan, size: int) -> str:
    """Return the flags for a smaller micro-batch, of `size` tokens or rows, and the same batch."""
    if plan.micro_batch_tokens is not None:
        return f"--micro-batch-tokens {size}"
    rows = plan.gradient_accumulation_steps * plan.micro_batch_size
    return f"--micro-batch-size {size} --gradient-accumulation-steps {rows // size}"
