"""`qlora merge`: plan, validate, apply, verify; the output is written as a whole or not at all."""

import errno
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, count
from pathlib import Path

from qlora_cli.errors import MergeError, OutOfMemoryError, QloraError
from qlora_cli.events import Event, Noted, PhaseStarted, Reporter
from qlora_cli.files import check_disk_space, size_of
from qlora_cli.hardware.counters import peak_host_bytes
from qlora_cli.hub.push import check_push, push_folder
from qlora_cli.merging.companion_files import check_tokenizer, write_companion_files
from qlora_cli.merging.earlier_merge import earlier_result
from qlora_cli.merging.exports.hf import HfFormat
from qlora_cli.merging.merge_checks import check_merge
from qlora_cli.merging.merge_result import BaseChoice, MergeReport, MergeResult, Requantized, Verification
from qlora_cli.merging.merger import Merger
from qlora_cli.merging.model_card import write_record
from qlora_cli.merging.output_directory import free_output_problem, names_to_replace, output_path, result_name
from qlora_cli.merging.output_formats import RequestedFormats
from qlora_cli.merging.planning.base_weights import Base
from qlora_cli.merging.planning.inputs import Inputs, read_inputs
from qlora_cli.merging.planning.merge_plan import MergePlan, plan_merge
from qlora_cli.merging.planning.plan_report import applied_adapters, report_of
from qlora_cli.merging.verifying.choose_base import base_choice_without_measuring, choose_base
from qlora_cli.merging.verifying.comparison import ModelComparer
from qlora_cli.merging.verifying.verify import failure, verify
from qlora_cli.merging.write import write_weights
from qlora_cli.settings.choices import BaseWeights
from qlora_cli.settings.models import MergeCommandSettings
from qlora_cli.writing import fill_directory

OTHER_FILES_BYTES = 64 * 1024**2  # tokenizer, configs, index, headers


def plan(request: MergeCommandSettings, reporter: Reporter) -> MergeReport:
    """Return the plan of a merge; nothing is written.

    Raises:
        QloraError: as `merge` does before it writes.
    """
    check_merge(request)
    earlier_result(request, reporter)
    settled = _settle(request, reporter)
    return report_of(settled.inputs, settled.plans[0], output_path(request), settled.disk_bytes, settled.base)


def merge(request: MergeCommandSettings, reporter: Reporter) -> MergeResult:
    """Merge adapters into their base and write the requested formats.

    Raises:
        QloraError: the merge failed; nothing is left on the disk.
        MergeError: the result does not pass verification; it is moved to a name that says so.
    """
    start = time.monotonic()
    check_merge(request)
    notes = _Notes(reporter)
    check_push(request.merge, "merge.push_to_hub", notes)
    result = earlier_result(request, notes) or _merge_anew(request, notes)
    if request.merge.push_to_hub is not None:
        folder, patterns = RequestedFormats.of(request).pushed(result.output)
        address = push_folder(request.merge, folder, patterns, f"{folder} is done, but it", notes)
        result = replace(result, pushed_to=address)
    return replace(result, total_seconds=time.monotonic() - start, notes=tuple(notes.messages))


def _merge_anew(request: MergeCommandSettings, notes: Reporter) -> MergeResult:
    settled = _settle(request, notes)
    comparer = (
        ModelComparer(settled.inputs, notes) if request.merge.verify or settled.base == BaseWeights.AUTO else None
    )
    choice = settled.choice or choose_base(_required(comparer), settled.plans, notes)
    chosen = next(one for one in settled.plans if one.base == choice.base)
    job = _Job(settled=settled, plan=chosen, choice=choice, comparer=comparer, reporter=notes)
    _fill(output_path(request), job, names_to_replace(request))
    return job.done()


def _fill(output: Path, job: "_Job", replaced: frozenset[str]) -> None:
    try:
        fill_directory(output, job.fill, replaced)
    except Exception as error:
        if isinstance(error, QloraError) or not _is_disk_full(error):
            raise
        raise MergeError(
            f"the disk of {output} is full: {error}",
            hint="Nothing was left there. Free disk space, or choose another directory with --output.",
        ) from error


def _is_disk_full(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno in {errno.ENOSPC, errno.EDQUOT}
    return "No space left" in str(error)  # of tokenizers and safetensors, without an errno


class _Notes:
    """A reporter that records notes."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self.messages: list[str] = []

    def report(self, event: Event) -> None:
        if isinstance(event, Noted):
            self.messages.append(event.message)
        self._reporter.report(event)


def _required(comparer: ModelComparer | None) -> ModelComparer:
    assert comparer is not None, "there is a comparer whenever something is measured"
    return comparer


@dataclass(frozen=True, kw_only=True)
class _Settled:
    """Everything that is known before a weight is read. `choice` is None if the base is still to be measured."""

    inputs: Inputs
    formats: RequestedFormats
    base: BaseWeights
    choice: BaseChoice | None
    plans: Sequence[MergePlan]
    disk_bytes: int


def _settle(request: MergeCommandSettings, reporter: Reporter) -> _Settled:
    formats = RequestedFormats.of(request)
    inputs = read_inputs(request, reporter)
    formats.check(inputs, reporter)
    choice = base_choice_without_measuring(inputs)
    kinds = (BaseWeights(choice.base),) if choice else (BaseWeights.DEQUANTIZED, BaseWeights.ORIGINAL)
    reporter.report(PhaseStarted(title="Planning the merge"))
    plans = [plan_merge(inputs.base, inputs.config, inputs.changes, kind, request.merge.dtype) for kind in kinds]
    disk_bytes = formats.disk_bytes(plans[0].num_bytes) + OTHER_FILES_BYTES
    check_disk_space(
        output_path(request), disk_bytes, hint="Free disk space, or choose another directory with --output."
    )
    if choice is not None:
        reporter.report(Noted(message=f"merging into the {choice.base} base: {choice.reason}"))
    base = BaseWeights(choice.base) if choice else BaseWeights.AUTO
    return _Settled(inputs=inputs, formats=formats, base=base, choice=choice, plans=plans, disk_bytes=disk_bytes)


class _Job:
    """Fills the directory that becomes the output, and holds the result."""

    def __init__(
        self,
        *,
        settled: _Settled,
        plan: MergePlan,
        choice: BaseChoice,
        comparer: ModelComparer | None,
        reporter: Reporter,
    ) -> None:
        self._settled, self._plan, self._choice = settled, plan, choice
        self._comparer, self._reporter = comparer, reporter
        self._result: MergeResult | None = None

    def fill(self, directory: Path) -> None:
        """Write everything into `directory`, and verify it.

        Raises:
            MergeError: it does not pass verification; it is moved aside.
            OutOfMemoryError: it could not be compared; it is moved aside, too.
            OutputDirectoryError: the output is no longer empty.
        """
        inputs, formats = self._settled.inputs, self._settled.formats
        request = inputs.request
        model = formats.model(directory)
        model.mkdir(exist_ok=True)
        started = time.monotonic()
        self._reporter.report(PhaseStarted(title=f"Merging into {output_path(request)}"))
        merger = Merger(inputs.base, Base(inputs.base, self._plan.base))
        write_weights(self._plan, inputs.source.path, model, merger.value, self._reporter)
        write_companion_files(inputs, self._plan, model)
        if request.merge.verify:
            check_tokenizer(inputs, model)
        seconds, peak_bytes = time.monotonic() - started, peak_host_bytes()
        try:
            verification = self._verified(model) if request.merge.verify else None
        except OutOfMemoryError as error:
            moved_to = _set_aside(directory, output_path(request), "failed-verification")
            raise OutOfMemoryError(
                error.message, hint=f"The merged model is in {moved_to}, and was not compared. {error.hint}"
            ) from error
        result = self._outcome(seconds, peak_bytes, verification)
        if verification is not None and not verification.passed:
            write_record(model, inputs, result, HfFormat(request))
            raise failure(verification, _set_aside(directory, output_path(request), "failed-verification"))
        result = replace(result, requantized=self._exported(directory))
        for name, path in formats.directories(directory).items():
            write_record(path, inputs, result, formats.by_name[name])
        self._result = replace(result, bytes_written=size_of(directory))
        if not request.merge.overwrite and (problem := free_output_problem(request)):
            raise problem  # something was written there meanwhile, such as another merge

    def _exported(self, directory: Path) -> Mapping[str, Requantized]:
        """Write the other formats; if one fails, the finished 16-bit model is moved aside."""
        formats, output = self._settled.formats, output_path(self._settled.inputs.request)
        try:
            return formats.write(directory, result_name(output), self._comparer, self._reporter)
        except QloraError as error:
            model = formats.model(_set_aside(directory, output, "failed-export"))
            error.hint = f"{error.hint or ''} The merged 16-bit model is done, and in {model}.".strip()
            raise

    def done(self) -> MergeResult:
        """Return the result."""
        assert self._result is not None, "it was filled"
        return self._result

    def _verified(self, model: Path) -> Verification:
        most = self._settled.inputs.request.merge.max_divergence
        return verify(_required(self._comparer), self._plan, self._choice, model, most, self._reporter)

    def _outcome(self, seconds: float, peak_bytes: int, verification: Verification | None) -> MergeResult:
        inputs, output = self._settled.inputs, output_path(self._settled.inputs.request)
        return MergeResult(
            output=output,
            outputs={name.value: path for name, path in self._settled.formats.directories(output).items()},
            base_model=inputs.source.base_name,
            commit=inputs.source.commit,
            adapters=applied_adapters(inputs),
            base=self._plan.base.value,
            base_choice=self._choice,
            dtype=self._plan.main_dtype,
            num_tensors=len(self._plan.tensors),
            num_merged_tensors=self._plan.num_merged,
            bytes_written=0,  # set once everything is written
            merge_seconds=seconds,
            total_seconds=0.0,
            peak_host_bytes=peak_bytes,
            verification=verification,
            requantized={},
            pushed_to=None,
            notes=(),
        )


def _set_aside(directory: Path, output: Path, why: str) -> Path:
    """Move a failed result to a name that says so: next to the output, or into it if it is a mount point."""
    first = output / why if output.is_mount() else output.absolute().with_name(f"{output.name}-{why}")
    numbered = (first.with_name(f"{first.name}-{number}") for number in count(2))
    path = next(path for path in chain([first], numbered) if not path.exists())
    directory.rename(path)
    return path
