"""Check a merge before torch is imported: names, numbers, directories, flags without effect."""

import math
from collections.abc import Callable, Iterator

from qlora_cli.errors import Problem, QloraError, SettingsError
from qlora_cli.hub.push import push_problem
from qlora_cli.merging.exports.llama_cpp.converter import find_converter
from qlora_cli.merging.exports.llama_cpp.quantizer import find_quantizer
from qlora_cli.merging.output_directory import output_path, output_problem
from qlora_cli.model_files.given_model import check_model_name
from qlora_cli.settings.choices import ExportFormat
from qlora_cli.settings.display import flag_of
from qlora_cli.settings.error_collector import ErrorCollector
from qlora_cli.settings.models import MergeCommandSettings, ModelSettings
from qlora_cli.units import counted

Where = Callable[[str], str]


def check_merge(request: MergeCommandSettings, where: Where = flag_of) -> None:
    """Check the request, all settings at once; `where` returns where a setting was given.

    Raises:
        SettingsError: with every problem.
        MissingDependencyError: the converter of a format is missing, and nothing else is collector.
    """
    collector = ErrorCollector(where)
    if problems := list(_problems(request, where)):
        collector.add("merge.adapters", SettingsError(problems))
    if {ExportFormat.GGUF, ExportFormat.GGUF_LORA} & set(request.merge.formats):
        with collector.collecting("merge.formats"):
            find_converter(request.merge.llama_cpp)
    if ExportFormat.GGUF in request.merge.formats:
        with collector.collecting("merge.gguf_type"):
            find_quantizer(request.merge.llama_cpp, request.merge.gguf_type)
    collector.raise_collected()


def _problem(where: str, error: QloraError) -> Problem:
    return Problem(where=where, message=error.message, hint=error.hint)


def _problems(request: MergeCommandSettings, where: Where) -> Iterator[Problem]:
    unusable = [wrong for name in request.merge.adapters if (wrong := _check_name(name, request))]
    for wrong in unusable:
        yield _problem(where("merge.adapters"), wrong)
    given, needed = len(request.merge.weights), len(request.merge.adapters)
    if given != needed:
        yield Problem(
            where=where("merge.weights"),
            message=f"is given {counted(given, 'time')} for {counted(needed, 'adapter')}",
            hint="Give one for each, in their order, or none.",
        )
    for weight in request.merge.weights:
        if not math.isfinite(weight) or weight == 0:
            message = f"must be a number other than 0, got {weight:g}"
            yield Problem(where=where("merge.weights"), message=message, hint="Such as 0.5.")
    yield from _ineffective_settings(request, where)
    if request.merge.output is None and len(request.merge.adapters) > 1:
        yield Problem(
            where=where("merge.output"),
            message="is missing: a merge of several adapters has no directory of its own",
            hint="Name a directory with --output.",
        )
    elif request.merge.output is not None or not unusable:
        yield from _output_problems(request, where)


def _check_name(name: str, request: MergeCommandSettings) -> QloraError | None:
    return check_model_name(ModelSettings(name=name, allow_pickle=request.model.allow_pickle))


def _output_problems(request: MergeCommandSettings, where: Where) -> Iterator[Problem]:
    if wrong := output_problem(request):
        yield _problem(where("merge.output"), wrong)
    if wrong := push_problem(request.merge, output_path(request)):
        yield _problem(where("merge.push_to_hub"), wrong)


def _ineffective_settings(request: MergeCommandSettings, where: Where) -> Iterator[Problem]:
    if not request.merge.verify and request.merge.max_divergence is not None:
        message = "has no effect with --no-verify"
        yield Problem(where=where("merge.max_divergence"), message=message, hint="Leave one of them out.")
