"""`qlora generate MODEL`: answers to prompts, from the base, with the adapter, and from the merged model."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from qlora_cli.answering.request import AnswerRequest, Sampling, check_merged, request_problems
from qlora_cli.cli import options
from qlora_cli.cli.output import print_json
from qlora_cli.errors import SettingsError, UsageError
from qlora_cli.model_files.source import check_model_name
from qlora_cli.settings.marks import Command
from qlora_cli.settings.models import LoadSettings

MAX_NEW_TOKENS = 256
FROM_STDIN = "-"

Prompt = Annotated[
    list[str],
    typer.Option(
        "--prompt", metavar="TEXT", help="What to answer; may be given several times. - reads it from stdin."
    ),
]
System = Annotated[
    str | None, typer.Option("--system", metavar="TEXT", help="System prompt, if the chat template writes one.")
]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", metavar="INTEGER", help="Longest answer, in tokens.")]
Temperature = Annotated[
    float,
    typer.Option("--temperature", metavar="NUMBER", help="0: always the likeliest token; above: drawn at random."),
]
TopP = Annotated[
    float | None,
    typer.Option("--top-p", metavar="NUMBER", help="Draw from the likeliest tokens of this probability together."),
]
TopK = Annotated[
    int | None, typer.Option("--top-k", metavar="INTEGER", help="Draw from this many of the likeliest tokens.")
]
Seed = Annotated[
    int | None,
    typer.Option("--seed", metavar="INTEGER", help="Seed of what is drawn; 0 if not given.", show_default=False),
]


@options.takes(Command.GENERATE, LoadSettings, positional="model.name")
def generate(
    context: typer.Context,
    prompt: Prompt,
    system: System = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Answer as base, with the adapter, and as merged model if there is one.")
    ] = False,
    merged: Annotated[
        Path | None,
        typer.Option("--merged", metavar="DIRECTORY", help="Merged model for --compare; of a run its own, if any."),
    ] = None,
    max_new_tokens: MaxNewTokens = MAX_NEW_TOKENS,
    temperature: Temperature = 0.0,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = None,
    json: options.Json = False,
) -> None:
    """Answer prompts, greedily unless told otherwise, with the model's chat template and end tokens.

    MODEL is a model, an adapter or a run directory. The answer alone is on stdout.
    """
    settings = options.resolve_settings(context, LoadSettings).settings
    sampling = sampling_of(temperature, top_p, top_k, seed)
    request = AnswerRequest(
        system=system, compare=compare, merged=merged, max_new_tokens=max_new_tokens, sampling=sampling
    )
    prompts = _read_prompts(prompt)
    check_request(settings, request, prompts)

    from qlora_cli.cli.progress import reporting  # rich, and below torch: only once the input is right
    from qlora_cli.cli.render_answers import Teller, print_prompt, render_answers, to_terminal

    streams = to_terminal() and not (json or compare)
    with reporting() as reporter:
        from qlora_cli.answering import generate as answering
        from qlora_cli.answering.opened import open_model

        if streams:
            opened = open_model(settings, request, reporter, prompts=prompts)
        else:
            report = answering.generate(settings, request, prompts, reporter)
    if not streams:
        print_json(report) if json else render_answers(report)
        return
    for text in prompts:
        if len(prompts) > 1:
            print_prompt(text)
        answering.answer_prompt(opened, request, text, Teller(is_headed=False, max_new_tokens=max_new_tokens))


def sampling_of(temperature: float, top_p: float | None, top_k: int | None, seed: int | None) -> Sampling:
    """Return how tokens are chosen by these flags; what is drawn at random is drawn by a seed."""
    drawn_seed = 0 if temperature > 0 and seed is None else seed
    return Sampling(temperature=temperature, top_p=top_p, top_k=top_k, seed=drawn_seed)


def check_request(settings: LoadSettings, request: AnswerRequest, prompts: Sequence[str] = ()) -> None:
    """Check what can be known to be wrong without torch.

    Raises:
        SettingsError: flags, with every problem found.
        QloraError: there is no such model, or the merged model is none.
    """
    if problems := request_problems(request, prompts):
        raise SettingsError(problems)
    wrong = check_model_name(settings.model)
    if wrong is None and request.merged is not None:
        wrong = check_merged(request.merged)
    if wrong is not None:
        raise wrong


def _read_prompts(given: Sequence[str]) -> list[str]:
    """Return the prompts, one of which may be on stdin."""
    if given.count(FROM_STDIN) > 1:
        raise UsageError("--prompt - is given twice, and stdin can be read once", hint="Give it once.")
    return [_read_stdin() if text == FROM_STDIN else text for text in given]


def _read_stdin() -> str:
    if sys.stdin is None:
        raise UsageError("--prompt - reads stdin, which is closed", hint="Give the text: --prompt TEXT")
    try:
        return sys.stdin.read().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"the prompt on stdin is not {error.encoding}: {error.reason}", hint="Save it as UTF-8."
        ) from error
