"""`qlora generate MODEL`: answers to prompts, from the base, with the adapter, and from the merged model."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import typer

from qlora_cli.cli import options
from qlora_cli.cli.json_output import print_json
from qlora_cli.cli.volume import print_next, volume_of
from qlora_cli.cli.without_compiler import leave_out_compiler
from qlora_cli.errors import UsageError
from qlora_cli.settings.models import AnswerSettings, ChatSettings, GenerateSettings
from qlora_cli.settings.setting_metadata import Command

if TYPE_CHECKING:
    from qlora_cli.answering.open_model import OpenModel
    from qlora_cli.settings.resolve import Resolved

FROM_STDIN = "-"
PROMPTS = "generate.prompts"


@options.takes(Command.GENERATE)
def generate(context: typer.Context, json: options.Json = False) -> None:
    """Answer prompts, greedily by default, with the model's chat template and end tokens.

    MODEL is a model, an adapter or a run directory. The answer alone is on stdout.
    """
    volume = volume_of(context)
    resolved = options.resolve_settings(context, GenerateSettings)
    request = resolved.settings.generate
    prompts = _read_prompts(request.prompts)
    check_request(resolved)

    from qlora_cli.cli.progress.reporters import importing, reporting  # rich: only once the input is right
    from qlora_cli.cli.rendering.answer_text import render_answers, to_terminal
    from qlora_cli.cli.rendering.next_steps import after_answers

    streams = to_terminal() and not (json or request.compare)
    leave_out_compiler(resolved.settings.model.attention)
    with reporting(volume) as reporter:
        with importing(reporter):
            from qlora_cli.answering import answer_prompts as answering
            from qlora_cli.answering.open_model import open_model

        if streams:
            opened = open_model(resolved, request, reporter, prompts=prompts)
        else:
            report = answering.generate(resolved, request, prompts, reporter)
    if not streams:
        print_json(report) if json else render_answers(report)
    else:
        _stream(opened, request, prompts)
    print_next(after_answers(resolved.settings.model.name), volume, as_json=json)


def _stream(opened: "OpenModel", request: AnswerSettings, prompts: Sequence[str]) -> None:
    """Print each answer as it comes."""
    from qlora_cli.answering.answer_prompts import answer_prompt
    from qlora_cli.answering.answers import prompt_name
    from qlora_cli.cli.rendering.answer_text import AnswerPrinter, print_prompt

    for number, text in enumerate(prompts, start=1):
        if len(prompts) > 1:
            print_prompt(text)
        name = prompt_name(number, len(prompts))
        printer = AnswerPrinter(is_headed=False, max_new_tokens=request.max_new_tokens, prompt=name)
        answer_prompt(opened, request, text, printer)


def check_request(resolved: "Resolved[ChatSettings] | Resolved[GenerateSettings]") -> None:
    """Check the paths of the models, without torch.

    Raises:
        QloraError: there is no such model, or no merged model at its path.
        SettingsError: both.
    """
    from qlora_cli.answering.answer_checks import check_merged  # read files: not for the help
    from qlora_cli.model_files.given_model import check_model_name
    from qlora_cli.settings.error_collector import ErrorCollector

    settings, errors = resolved.settings, ErrorCollector(resolved.where_of)
    if problem := check_model_name(settings.model):
        errors.add("model.name", problem.for_setting("model.name"))
    if settings.generate.merged is not None and (problem := check_merged(settings.generate.merged)):
        errors.add("generate.merged", problem.for_setting("generate.merged"))
    errors.raise_collected()


def _read_prompts(prompts: Sequence[str]) -> list[str]:
    """Return the prompts, one of which may be on stdin."""
    if prompts.count(FROM_STDIN) > 1:
        raise UsageError("- is given twice, and stdin can be read once", hint="Give it once.", setting=PROMPTS)
    return [_read_stdin() if text == FROM_STDIN else text for text in prompts]


def _read_stdin() -> str:
    """Return the prompt on stdin.

    Raises:
        UsageError: there is none.
    """
    if sys.stdin is None:
        raise UsageError("- reads stdin, which is closed", hint="Give the text: --prompt TEXT", setting=PROMPTS)
    try:
        text = sys.stdin.read().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"the prompt on stdin is not {error.encoding}: {error.reason}", hint="Save it as UTF-8."
        ) from error
    if not text.strip():
        raise UsageError("the prompt on stdin is empty", hint="Give some text.")
    return text
