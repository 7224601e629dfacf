"""From text to tokens and labels, many rows at a time: the one path of training, evaluation and preview.

A row's whole text is tokenized once; which tokens are trained follows from where they stand in the text. Where a
token would lie across the beginning of an answer, the text is cut there first: a server sends what stands before the
answer by itself, so no such token is ever seen when the model is used.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase

from qlora_cli.data.render import Renderer, Span
from qlora_cli.data.rows import IGNORED, Completion, Conversation, Example, Ids, RowError, Tokenized
from qlora_cli.settings.models import LossOn


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """One row: `input_ids` and `labels`, both int32 `(seq,)`; a label is the token, or -100 where it is not trained.

    The first token of a row is never predicted, so its label is always -100.
    """

    input_ids: Ids
    labels: Ids

    @property
    def num_supervised(self) -> int:
        """Tokens that are trained."""
        return int(np.count_nonzero(self.labels != IGNORED))

    def cut(self, max_length: int) -> "Tokens":
        """Return the first `max_length` tokens."""
        return Tokens(input_ids=self.input_ids[:max_length], labels=self.labels[:max_length])


@dataclass(frozen=True, kw_only=True)
class Text:
    """Text to tokenize. `is_plain`: the tokenizer, not a template, writes BOS and EOS."""

    text: str
    spans: tuple[Span, ...]
    is_plain: bool


@dataclass(frozen=True, kw_only=True)
class Rendering:
    """Examples on their way to tokens."""

    items: tuple[Text | Tokens | RowError, ...]


class Tokenizer:
    """Turns examples into tokens by a tokenizer and its chat template. `end_ids` are those that end a text or turn."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, loss_on: LossOn, end_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self._renderer = Renderer(tokenizer)
        self._trains_all = loss_on == LossOn.ALL
        self._end_ids = end_ids
        self._num_tokens = len(tokenizer)
        self.odd_ends: set[int] = set()

    def render(self, examples: Sequence[Example]) -> Rendering:
        """Return each example as text, or as tokens if it is some, or what is wrong with it, in order."""
        return Rendering(items=tuple(self._prepare(example) for example in examples))

    def encode(self, rendering: Rendering) -> list[Encoding]:
        """Return the encodings of the texts, in order. Works on all cores, and lets other threads go on meanwhile."""
        texts = [item for item in rendering.items if isinstance(item, Text)]
        found: dict[int, Encoding] = {}
        for is_plain in (True, False):
            places = [place for place, item in enumerate(texts) if item.is_plain == is_plain]
            encodings = self._backend.encode_batch(
                [texts[place].text for place in places], add_special_tokens=is_plain
            )
            found.update(zip(places, encodings, strict=True))
        return [found[place] for place in range(len(texts))]

    def label(self, rendering: Rendering, encodings: Sequence[Encoding]) -> list[Tokens | RowError]:
        """Return the tokens of each example with their labels, or what is wrong with it, in order."""
        encoded = iter(encodings)
        return [self._label(item, next(encoded)) if isinstance(item, Text) else item for item in rendering.items]

    def tokenize(self, examples: Sequence[Example]) -> list[Tokens | RowError]:
        """Return the tokens of each example, or what is wrong with it, in order."""
        rendering = self.render(examples)
        return self.label(rendering, self.encode(rendering))

    def _prepare(self, example: Example) -> Tokens | RowError | Text:
        try:
            if isinstance(example, Tokenized):
                return self._as_given(example)
            return self._rendered(example) if isinstance(example, Conversation) else self._plain(example)
        except RowError as error:
            return error

    def _as_given(self, example: Tokenized) -> Tokens:
        ids = example.input_ids
        if ids.max() >= self._num_tokens:
            raise RowError(f"token {ids.max()} is beyond the {self._num_tokens} of the tokenizer")
        return _row(ids, (ids if self._trains_all else example.labels).copy())

    def _rendered(self, example: Conversation) -> Text:
        if self._tokenizer.chat_template is None:
            raise RowError(
                "it is a conversation, but the tokenizer has no chat template",
                hint="Give one with --chat-template (a .jinja file, or chatml), take the instruct version of the "
                "model, or write rows as prompt and completion.",
            )
        rendered = self._renderer.render(example)
        spans = ((0, len(rendered.text)),) if self._trains_all else rendered.spans
        return Text(text=rendered.text, spans=spans, is_plain=False)

    def _plain(self, example: Completion) -> Text:
        text = example.prompt + example.completion
        start = 0 if self._trains_all else len(example.prompt)
        return Text(text=text, spans=((start, len(text)),), is_plain=True)

    def _label(self, item: Text, encoding: Encoding) -> Tokens | RowError:
        ids, edges = encoding.ids, [_tokens_of(encoding, span, len(item.text)) for span in item.spans]
        begins = zip(item.spans, edges, strict=True)
        if any(_lies_across(encoding, first, start) for (start, _), (first, _) in begins):
            ids, edges = self._cut_before_answers(item, encoding, edges)
        labels = np.full(len(ids), IGNORED, dtype=np.int32)
        row = np.asarray(ids, dtype=np.int32)
        for first, last in edges:
            labels[first:last] = row[first:last]
        if item.is_plain:
            return self._ended(row, labels)
        return self._checked(row, labels, edges)

    def _cut_before_answers(
        self, item: Text, encoding: Encoding, edges: list[tuple[int, int]]
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Tokenize with a cut before each answer, unless the tokenizer adds something there, as SentencePiece may."""
        cuts = [start for start, _ in item.spans]
        pieces = [item.text[a:b] for a, b in zip([0, *cuts], [*cuts, len(item.text)], strict=True)]
        encodings = [
            self._backend.encode(piece, add_special_tokens=item.is_plain and place == 0)
            for place, piece in enumerate(pieces)
        ]
        ids = [token for encoded in encodings for token in encoded.ids]
        if self._decode(ids) != self._decode(encoding.ids):
            return encoding.ids, edges
        found: list[tuple[int, int]] = []
        offset = len(encodings[0].ids)
        for (start, end), encoded in zip(item.spans, encodings[1:], strict=True):
            text = pieces[len(found) + 1]
            found.append((offset, offset + _tokens_of(encoded, (0, end - start), len(text))[1]))
            offset += len(encoded.ids)
        return ids, found

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._backend.decode(list(ids), skip_special_tokens=False))

    def _ended(self, row: Ids, labels: Ids) -> Tokens:
        """Return a plain text with one BOS at most, where it was written out too, and with a trained end."""
        bos, eos = self._tokenizer.bos_token_id, self._tokenizer.eos_token_id
        assert eos is not None, "checked on loading"
        if bos is not None and bos != eos:
            while len(row) > 1 and row[0] == row[1] == bos:
                row, labels = row[1:], labels[1:]
        while len(row) > 1 and row[-1] == row[-2] == eos:
            row, labels = row[:-1], labels[:-1]
        if len(row) and row[-1] == eos:  # written out, or added by the tokenizer
            labels = np.append(labels[:-1], eos)
        else:
            row, labels = np.append(row, eos), np.append(labels, eos)
        return _row(row.astype(np.int32), labels.astype(np.int32))

    def _checked(self, row: Ids, labels: Ids, edges: Sequence[tuple[int, int]]) -> Tokens | RowError:
        """Check a rendered row: one BOS at most, and a token that ends each trained turn."""
        bos = self._tokenizer.bos_token_id
        if bos is not None and len(row) > 1 and row[0] == row[1] == bos:
            return RowError(
                f"it begins with {self._tokenizer.bos_token} twice: the template writes it, and so does the row",
                hint="Take it out of the text.",
            )
        if not self._trains_all:
            self.odd_ends.update(
                int(row[last - 1]) for _, last in edges if last and row[last - 1] not in self._end_ids
            )
        return _row(row, labels)


def _row(input_ids: Ids, labels: Ids) -> Tokens:
    labels[:1] = IGNORED  # nothing predicts the first token
    return Tokens(input_ids=input_ids, labels=labels)


def _tokens_of(encoding: Encoding, span: Span, length: int) -> tuple[int, int]:
    """Return the first token that overlaps a span, and the one behind the last; the text has `length` characters."""
    first, last = (_token_at(encoding, position, length) for position in span)
    place = encoding.token_to_chars(last) if last < len(encoding.ids) else None
    # A token that begins within the span and ends behind it belongs to it.
    return first, last + 1 if place is not None and place[0] < span[1] else last


def _token_at(encoding: Encoding, position: int, length: int) -> int:
    """Return the token that stands for a character, or for the next one that has one; past the end if none does."""
    while position < length:
        token = encoding.char_to_token(position)
        if token is not None:
            return int(token)
        position += 1  # a character that no token stands for, such as a space that the tokenizer drops
    return len(encoding.ids)


def _lies_across(encoding: Encoding, token: int, position: int) -> bool:
    place = encoding.token_to_chars(token) if token < len(encoding.ids) else None
    return place is not None and place[0] < position
