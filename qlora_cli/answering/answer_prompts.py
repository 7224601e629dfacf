"""Answer prompts with one model, or with the base, the adapter and the merged model in turn."""

import gc
from collections.abc import Sequence

import torch

from qlora_cli.answering.answers import Answer, GenerationReport, Listener, collect, prompt_name, truncation_note
from qlora_cli.answering.open_model import OpenModel, open_model
from qlora_cli.answering.prompts import encode, messages_of
from qlora_cli.events import Noted, PhaseStarted, Reporter
from qlora_cli.hardware.cudnn import without_cudnn_attention
from qlora_cli.model_files.merged import merged_model_of, settings_of_merged, staleness_problem
from qlora_cli.settings.models import AnswerSettings, LoadSettings
from qlora_cli.settings.resolve import Resolved
from qlora_cli.settings.settle import resolved_in_code


@without_cudnn_attention()
def generate(
    asked: Resolved[LoadSettings], request: AnswerSettings, prompts: Sequence[str], reporter: Reporter
) -> GenerationReport:
    """Load the model and answer each prompt; for a comparison with base, adapter and merged model.

    The merged model is loaded after the first was freed, so that only one is in memory at a time.

    Raises:
        QloraError: what `open_model` raises.
    """
    opened = open_model(asked, request, reporter, prompts=prompts)
    source, notes = opened.loaded.source, opened.notes
    merged = (request.merged or merged_model_of(source)) if request.compare else None
    if merged is not None and (stale := staleness_problem(merged, source)):
        reporter.report(Noted(level="warning", message=stale))
        notes = (*notes, stale)
    answers = answer_all(opened, request, prompts, reporter)
    if merged is not None:
        of_merged = settings_of_merged(merged, opened.loaded.settings.model, opened.loaded.dtype)
        del opened
        _free_memory()
        opened = open_model(resolved_in_code(of_merged), request, reporter, prompts=prompts, is_merged=True)
        more = answer_all(opened, request, prompts, reporter)
        answers = [before + after for before, after in zip(answers, more, strict=True)]
        notes = tuple(dict.fromkeys((*notes, *opened.notes)))
    return GenerationReport(
        model=source.name,
        base_model=source.base_name,
        adapter=source.adapter,
        adapter_step=source.adapter_step,
        run_is_done=source.run_is_done,
        merged=merged,
        answers=tuple(collect(prompt, given) for prompt, given in zip(prompts, answers, strict=True)),
        notes=notes,
    )


def answer_all(
    opened: OpenModel, request: AnswerSettings, prompts: Sequence[str], reporter: Reporter
) -> list[list[Answer]]:
    """Return for each prompt the answers of all sources of `opened`."""
    answers = []
    for number, prompt in enumerate(prompts, start=1):
        name = prompt_name(number, len(prompts))
        reporter.report(PhaseStarted(title=f"{f'Answering {name}'.strip()} ({', '.join(opened.sources)})"))
        answers.append(answer_prompt(opened, request, prompt))
        for answer in answers[-1]:
            if note := truncation_note(answer, request.max_new_tokens, name):
                reporter.report(Noted(message=note))
    return answers


def answer_prompt(
    opened: OpenModel, request: AnswerSettings, prompt: str, listener: Listener | None = None
) -> list[Answer]:
    """Return the answers of all sources of `opened` to one prompt."""
    ids = encode(opened.loaded.tokenizer, messages_of(prompt, request.system))
    return [opened.answer(source, ids, listener) for source in opened.sources]


def _free_memory() -> None:
    """Free the memory of an unreferenced model, whose parts refer to each other."""
    gc.collect()
    torch.cuda.empty_cache()
