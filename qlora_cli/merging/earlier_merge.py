"""Recognize an earlier merge in the output: the same adapters, base and settings, in files that are still its own."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from pydantic import TypeAdapter

from qlora_cli.errors import OutputDirectoryError
from qlora_cli.events import Noted, Reporter
from qlora_cli.files import size_of
from qlora_cli.merging.merge_result import AppliedAdapter, BaseChoice, MergeResult, Requantized, Verification
from qlora_cli.merging.output_directory import merged_directories, output_path, sizes_of_files
from qlora_cli.merging.output_formats import directories_of
from qlora_cli.merging.planning.inputs import find_sources
from qlora_cli.model_files.digest import adapter_digest, base_digest
from qlora_cli.model_files.merge_record import MergeRecord, read_merge_record
from qlora_cli.model_files.source import ModelSource
from qlora_cli.settings.models import MergeCommandSettings

SETTINGS = ("base", "dtype", "formats", "gguf_type")  # of a merge, that change what is written


def requested(request: MergeCommandSettings) -> Mapping[str, object]:
    """Return the settings that change what a merge writes, for its record."""
    return request.merge.model_dump(mode="json", include=set(SETTINGS))


def earlier_result(request: MergeCommandSettings, reporter: Reporter) -> MergeResult | None:
    """Return the result of an earlier merge that is the requested one; None if the output is free or overwritten.

    Raises:
        OutputDirectoryError: the output holds another merge.
        ModelError: an adapter or its base can't be read.
    """
    output = output_path(request)
    places = merged_directories(output)
    if request.merge.overwrite or not places:
        return None
    sources = find_sources(request, reporter)
    records = {place: record for place in places if (record := read_merge_record(place)) is not None}
    difference = next(_differences(request, sources, records), None)
    if difference is not None:
        raise OutputDirectoryError(
            f"{output} already holds another merge: {difference}",
            hint="Replace it with --overwrite, or choose another directory with --output.",
            setting="merge.output",
        )
    result = _result(request, sources, records)
    reporter.report(Noted(message=f"{output} already holds this merge, written {result.already_merged_at}"))
    return result


def _differences(
    request: MergeCommandSettings, sources: Sequence[ModelSource], records: Mapping[Path, MergeRecord]
) -> Iterator[str]:
    """Yield in words how the merge that the output holds differs from the requested one."""
    first = next(iter(records.values()))
    if first.request is None:
        yield "its record, of an earlier version, does not say how it was requested"
        return
    wanted = requested(request)
    for name in SETTINGS:
        if first.request.get(name) != wanted[name]:
            yield f"it was made with {_shown(name, first.request.get(name))}, not {_shown(name, wanted[name])}"
    yield from _other_inputs(request, sources, first)
    yield from _unverified(request, first)
    for place, record in records.items():
        if sizes_of_files(place) != record.files:
            yield f"the files in {place} are not those that it wrote"


def _shown(name: str, value: object) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return f"merge.{name} {text}"


def _other_inputs(request: MergeCommandSettings, sources: Sequence[ModelSource], record: MergeRecord) -> Iterator[str]:
    digests = [adapter_digest(source.adapter) for source in sources if source.adapter is not None]
    if digests != [one.sha256 for one in record.adapters]:
        yield f"it was merged from other weights than {' and '.join(request.merge.adapters)} has now"
    if list(request.merge.weights) != [one.weight for one in record.adapters]:
        yield "its adapters have other weights in the sum"
    base = sources[0]
    is_same = base.commit == record.commit if base.commit else base_digest(base.path) == record.base_model_digest
    if not is_same:
        yield f"it was merged into another base than {base.base_name}"


def _unverified(request: MergeCommandSettings, record: MergeRecord) -> Iterator[str]:
    """Yield what was not verified of it that is to be."""
    verification = _verification(record)
    if verification is None:
        if request.merge.verify:
            yield "it was not verified (--no-verify)"
    elif not verification.passed:
        yield "it did not pass verification"
    elif (most := request.merge.max_divergence) is not None and verification.divergence.mean_kl > most:
        yield f"its KL divergence, {verification.divergence.mean_kl:.2g} nats a token, is over {most:g}"


def _verification(record: MergeRecord) -> Verification | None:
    return TypeAdapter(Verification | None).validate_python(record.verification)


def _result(
    request: MergeCommandSettings, sources: Sequence[ModelSource], records: Mapping[Path, MergeRecord]
) -> MergeResult:
    """Return the result of the earlier merge, from its record."""
    output, record = output_path(request), next(iter(records.values()))
    requantized = {one.format: one.requantized for one in records.values() if one.requantized is not None}
    return MergeResult(
        output=output,
        outputs={name.value: path for name, path in directories_of(request.merge.formats, output).items()},
        base_model=sources[0].base_name,
        commit=sources[0].commit,
        adapters=tuple(_applied(request, sources, record)),
        base=str(record.base),
        base_choice=TypeAdapter(BaseChoice).validate_python(record.base_choice),
        dtype=str(record.dtype),
        num_tensors=record.num_tensors or 0,
        num_merged_tensors=record.num_merged_tensors or 0,
        bytes_written=size_of(output),
        merge_seconds=record.merge_seconds or 0.0,
        total_seconds=0.0,
        peak_host_bytes=record.peak_host_bytes or 0,
        verification=_verification(record),
        requantized=TypeAdapter(dict[str, Requantized]).validate_python(requantized),
        pushed_to=None,
        notes=(),
        already_merged_at=record.written,
    )


def _applied(
    request: MergeCommandSettings, sources: Sequence[ModelSource], record: MergeRecord
) -> Iterator[AppliedAdapter]:
    for name, source, one in zip(request.merge.adapters, sources, record.adapters, strict=True):
        assert source.adapter is not None, "a merge is of adapters"
        yield AppliedAdapter(
            name=name,
            path=source.adapter,
            weight=one.weight or 0.0,
            kind=one.kind or "",
            step=one.step,
            run_is_done=one.run_is_done,
        )
