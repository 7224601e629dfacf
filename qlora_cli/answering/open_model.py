"""A model that is loaded for answering: by itself, or as base and adapter."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel

from qlora_cli.adapters.initialization import base_change
from qlora_cli.answering.answerer import Answerer, Completion, Model, Watch
from qlora_cli.answering.answers import Answer, Listener, Source
from qlora_cli.answering.prompts import check_system, encode, messages_of
from qlora_cli.errors import ModelError, OutOfMemoryError
from qlora_cli.events import Noted, Reporter
from qlora_cli.loading.load_plan import LoadPlan, plan_load
from qlora_cli.loading.loader import LoadedModel, load_planned
from qlora_cli.model_files.merged import requantization_note
from qlora_cli.settings.models import AnswerSettings, LoadSettings
from qlora_cli.settings.resolve import Resolved
from qlora_cli.settings.value_sources import GIVEN
from qlora_cli.tokenizing.positions import num_positions

NO_TEMPLATE = "the tokenizer has no chat template: a prompt is continued as plain text"


@dataclass(frozen=True, kw_only=True)
class OpenModel:
    """A loaded model with its answerer. `num_positions` is None if it has no limit."""

    loaded: LoadedModel
    answerer: Answerer
    num_positions: int | None
    sources: tuple[Source, ...]
    notes: tuple[str, ...]

    def answer(
        self,
        source: Source,
        ids: Sequence[int],
        listener: Listener | None = None,
        answerer: Answerer | None = None,
    ) -> Answer:
        """Return the answer of `source` to a prompt of `ids`, by another `answerer` if given.

        Raises:
            OutOfMemoryError: the GPU has too little memory for it.
        """
        watch = None if listener is None else Watch(listener.text, listener.stops)
        if listener is not None:
            listener.begin(source)
        try:
            with self._as(source) as model:
                done = (answerer or self.answerer).complete(model, ids, watch)
        except torch.OutOfMemoryError as error:
            raise OutOfMemoryError(
                f"{self.loaded.device} ran out of memory answering {len(ids):,} tokens: {str(error).splitlines()[0]}",
                hint="Use a shorter prompt, or a smaller --max-new-tokens.",
            ) from error
        answer = _answer(source, len(ids), done)
        if listener is not None:
            listener.end(answer)
        return answer

    @contextmanager
    def _as(self, source: Source) -> Iterator[Model]:
        model = self.loaded.model
        if source == "base" and isinstance(model, PeftModel):
            with model.disable_adapter():
                yield model
        else:
            yield model


def open_model(
    asked: Resolved[LoadSettings],
    request: AnswerSettings,
    reporter: Reporter,
    *,
    prompts: Sequence[str] = (),
    is_chat: bool = False,
    is_merged: bool = False,
) -> OpenModel:
    """Load a model for `prompts`, or for a chat, which needs a chat template; checks come before loading.

    `is_merged` says that it is the merged model of a comparison.

    Raises:
        QloraError: what loading raises.
        ModelError: a prompt is too long, the template omits the system prompt, or there is nothing to compare.
    """
    load_plan = plan_load(asked, reporter)
    tokenizer = load_plan.tokenizer.tokenizer
    positions = num_positions(load_plan.base.config)
    compares = request.compare and not is_merged
    if compares:
        _check_comparable(load_plan, None if is_chat else request.merged)
        _check_base(load_plan)
    if is_chat and tokenizer.chat_template is None:
        raise ModelError(
            f"the tokenizer of {asked.settings.model.name} has no chat template, which a chat needs",
            hint="Give one: --chat-template chatml, or a file. qlora generate goes without.",
        )
    if request.system is not None:
        check_system(tokenizer, request.system)
    for prompt in prompts:
        num_tokens = len(encode(tokenizer, messages_of(prompt, request.system)))
        _check_positions(prompt, num_tokens, request.max_new_tokens, positions)
    notes = () if tokenizer.chat_template is not None else (NO_TEMPLATE,)
    for note in notes:
        reporter.report(Noted(message=note))
    is_chosen = asked.origin_of("quantization.method").kind in GIVEN
    if load_plan.layout.is_quantized and not is_chosen and (again := requantization_note(load_plan.source.path)):
        reporter.report(Noted(level="warning", message=again))
        notes = (*notes, again)
    loaded = load_planned(load_plan, reporter)
    answerer = Answerer(
        tokenizer=loaded.tokenizer,
        end_ids=load_plan.tokenizer.end_ids,
        dtype=loaded.dtype.torch_dtype,
        max_tokens=request.max_new_tokens,
        sampling=request,
    )
    return OpenModel(
        loaded=loaded,
        answerer=answerer,
        num_positions=positions,
        sources=_sources(loaded, request, is_merged=is_merged),
        notes=(*loaded.notes, *notes),
    )


def _sources(loaded: LoadedModel, request: AnswerSettings, *, is_merged: bool) -> tuple[Source, ...]:
    if is_merged:
        return ("merged",)
    if not isinstance(loaded.model, PeftModel):
        return ("base",)
    return ("base", "adapter") if request.compare else ("adapter",)


def _check_comparable(load_plan: LoadPlan, merged: Path | None) -> None:
    """Check that there is something to compare the base with: its adapter, or a merged model."""
    source = load_plan.source
    if source.adapter is None and merged is None:
        raise ModelError(
            f"there is nothing to compare: {source.name} has no adapter",
            hint="Name a run or an adapter; qlora generate compares a model with a merged one too, by --merged DIR.",
            setting="generate.compare",
        )


def _check_base(load_plan: LoadPlan) -> None:
    """Check that the model with its adapter disabled is its base."""
    reason = base_change(load_plan.adapter.lora) if load_plan.adapter is not None else None
    if reason is not None:
        raise ModelError(
            f"the base of {load_plan.source.name} can't be shown: {reason}",
            hint="Leave --compare out; of a run with PiSSA, name the run once it has ended.",
            setting="generate.compare",
        )


def _check_positions(prompt: str, num_tokens: int, max_new_tokens: int, positions: int | None) -> None:
    if positions is None or num_tokens + max_new_tokens <= positions:
        return
    num_left = positions - num_tokens
    shorter = f"Use --max-new-tokens {num_left}, or a shorter prompt." if num_left > 0 else "Use a shorter prompt."
    raise ModelError(
        f"the prompt {prompt[:30]!r} has {num_tokens:,} tokens, and --max-new-tokens allows {max_new_tokens:,} more: "
        f"together more than the {positions:,} positions of the model",
        hint=shorter,
    )


def _answer(source: Source, num_prompt_tokens: int, done: Completion) -> Answer:
    return Answer(
        source=source,
        text=done.text,
        num_prompt_tokens=num_prompt_tokens,
        num_new_tokens=done.num_new_tokens,
        finish_reason=done.finish_reason,
        seconds=done.seconds,
        tokens_per_second=done.num_new_tokens / done.seconds if done.seconds else 0.0,
    )
