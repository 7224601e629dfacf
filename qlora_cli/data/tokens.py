"""From an example to tokens and labels: the one path that training and evaluation share.

The whole row is rendered to text once and tokenized once; which tokens are trained follows from their
character offsets. So the tokens are those of the row as a server would render it, and the end of every
trained answer is trained.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from qlora_cli.data.formats import Completion, Conversation, Example, RowError

IGNORED = -100  # the label that the loss skips

Span = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """One row: `input_ids` and `labels`, each `(seq,)`; labels are the ids, or -100 where not trained."""

    input_ids: list[int]
    labels: list[int]

    @property
    def num_supervised(self) -> int:
        """Tokens that are trained. The first token of a row is never predicted."""
        return sum(label != IGNORED for label in self.labels[1:])


def encode(example: Example, tokenizer: PreTrainedTokenizerBase, *, all_tokens: bool) -> Tokens:
    """Return the tokens of `example`; `all_tokens` trains prompts too.

    Raises:
        RowError: the chat template refuses the row, or renders a turn differently once another follows.
    """
    if isinstance(example, Conversation):
        return _encode_conversation(example, tokenizer, all_tokens=all_tokens)
    return _encode_completion(example, tokenizer, all_tokens=all_tokens)


def truncate(tokens: Tokens, max_length: int) -> Tokens:
    """Return the first `max_length` tokens of a row."""
    return Tokens(input_ids=tokens.input_ids[:max_length], labels=tokens.labels[:max_length])


def _encode_completion(example: Completion, tokenizer: PreTrainedTokenizerBase, *, all_tokens: bool) -> Tokens:
    text = example.prompt + example.completion
    encoded = tokenizer(text, return_offsets_mapping=True)
    start = 0 if all_tokens else len(example.prompt)
    tokens = _label(encoded["input_ids"], encoded["offset_mapping"], [(start, len(text))])
    if tokens.input_ids[-1] == tokenizer.eos_token_id:  # some tokenizers add it; then it is trained
        return Tokens(input_ids=tokens.input_ids, labels=[*tokens.labels[:-1], tokenizer.eos_token_id])
    return Tokens(
        input_ids=[*tokens.input_ids, tokenizer.eos_token_id], labels=[*tokens.labels, tokenizer.eos_token_id]
    )


def _encode_conversation(example: Conversation, tokenizer: PreTrainedTokenizerBase, *, all_tokens: bool) -> Tokens:
    text = _render(example, tokenizer, len(example.messages))
    spans = [(0, len(text))] if all_tokens else _assistant_spans(example, tokenizer, text)
    # A template writes BOS itself; the tokenizer must not add a second one.
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return _label(encoded["input_ids"], encoded["offset_mapping"], spans)


def _assistant_spans(example: Conversation, tokenizer: PreTrainedTokenizerBase, text: str) -> list[Span]:
    """Return where the trained assistant turns stand in `text`, from after the generation prompt to their end."""
    spans = []
    for index, message in enumerate(example.messages):
        if message["role"] != "assistant" or index < example.first_trained:
            continue
        if index == 0:
            raise RowError("the first message is the assistant's: there is nothing to answer")
        before = _render(example, tokenizer, index, add_generation_prompt=True)
        through = _render(example, tokenizer, index + 1)
        if not text.startswith(before) or not text.startswith(through):
            raise RowError(
                f"the chat template renders message {index} differently when others follow it, "
                "so what is served would not be what is trained; split the row so that it ends there"
            )
        # The line break that many templates put behind the end of a turn is never generated.
        spans.append((len(before), len(through.rstrip())))
    return spans


def _render(
    example: Conversation,
    tokenizer: PreTrainedTokenizerBase,
    num_messages: int,
    *,
    add_generation_prompt: bool = False,
) -> str:
    try:
        return str(
            tokenizer.apply_chat_template(
                example.messages[:num_messages],
                tools=example.tools,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        )
    except (TemplateError, TypeError) as error:
        raise RowError(f"the chat template refuses it: {error}") from error


def _label(input_ids: Sequence[int], offsets: Sequence[Span], spans: Sequence[Span]) -> Tokens:
    """Label the tokens that overlap a span; one that straddles its start counts, so no answer is cut."""
    labels = [
        token if any(start < span_end and end > span_start for span_start, span_end in spans) else IGNORED
        for token, (start, end) in zip(input_ids, offsets, strict=True)
    ]
    return Tokens(input_ids=list(input_ids), labels=labels)
