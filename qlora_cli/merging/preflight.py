"""What can be known to be wrong with a merge before torch is imported: names, numbers, places, what has no effect."""

import math
from collections.abc import Iterator

from qlora_cli.errors import Problem, QloraError, SettingsError
from qlora_cli.hub.push import push_problem
from qlora_cli.merging.exports.converter import find_converter
from qlora_cli.merging.request import MergeRequest, output_of, pushed_to
from qlora_cli.model_files.source import check_model_name
from qlora_cli.runs.directory import check_free_directory
from qlora_cli.settings.choices import ExportFormat, GgufType
from qlora_cli.settings.models import ModelSettings
from qlora_cli.units import counted

PUSH = "--push-to-hub"


def check_merge(request: MergeRequest) -> None:
    """Check what was asked for, all at once.

    Raises:
        SettingsError: with every problem found.
        MissingDependencyError: what converts to a format is not here.
    """
    if problems := list(_problems(request)):
        raise SettingsError(problems)
    if ExportFormat.GGUF in request.formats:
        find_converter(request.llama_cpp)


def refused_push(wrong: QloraError) -> SettingsError:
    """Return the error for a result that may not be pushed to where it was asked to go."""
    return SettingsError([_problem(PUSH, wrong)])


def _problem(where: str, error: QloraError) -> Problem:
    return Problem(where=where, message=error.message, hint=error.hint)


def _problems(request: MergeRequest) -> Iterator[Problem]:
    unusable = [wrong for name in request.adapters if (wrong := _check_name(name, request))]
    for wrong in unusable:
        yield _problem("RUN_OR_ADAPTER", wrong)
    yield from _about_numbers(request)
    yield from _about_what_has_no_effect(request)
    if request.output is None and len(request.adapters) > 1:
        yield Problem(
            where="--output",
            message="is missing: what several adapters come to has no place of its own",
            hint="Name a directory with --output.",
        )
    elif request.output is not None or not unusable:
        yield from _about_places(request)


def _check_name(name: str, request: MergeRequest) -> QloraError | None:
    return check_model_name(ModelSettings(name=name, allow_pickle=request.allow_pickle))


def _about_places(request: MergeRequest) -> Iterator[Problem]:
    if wrong := check_free_directory(output_of(request)):
        yield _problem("--output", wrong)
    if request.push_to_hub == "":
        yield Problem(where=PUSH, message="names no repository", hint="Give OWNER/NAME.")
    elif wrong := push_problem(pushed_to(request), output_of(request)):
        yield _problem(PUSH, wrong)


def _about_numbers(request: MergeRequest) -> Iterator[Problem]:
    given, needed = len(request.weights), len(request.adapters)
    if given != needed:
        yield Problem(
            where="--weight",
            message=f"is given {counted(given, 'time')} for {counted(needed, 'adapter')}",
            hint="Give one for each, in their order, or none.",
        )
    for weight in request.weights:
        if not math.isfinite(weight) or weight == 0:
            yield Problem(
                where="--weight", message=f"must be a number other than 0, got {weight:g}", hint="Such as 0.5."
            )
    most = request.max_divergence
    if most is not None and (not math.isfinite(most) or most < 0):
        yield Problem(
            where="--max-divergence",
            message=f"must be a number of nats from 0 on, got {most:g}",
            hint="Such as 0.001.",
        )


def _about_what_has_no_effect(request: MergeRequest) -> Iterator[Problem]:
    if ExportFormat.GGUF not in request.formats:
        for flag, is_given in (
            ("--llama-cpp", request.llama_cpp is not None),
            ("--gguf-type", request.gguf_type != GgufType.AUTO),
        ):
            if is_given:
                yield Problem(
                    where=flag,
                    message="has no effect without --format gguf",
                    hint="Leave it out, or give --format gguf.",
                )
    if not request.verify and request.max_divergence is not None:
        yield Problem(
            where="--max-divergence", message="has no effect with --no-verify", hint="Leave one of them out."
        )
