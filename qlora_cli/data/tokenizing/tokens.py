"""Turn text into tokens and labels, many rows at a time, for training, evaluation and preview alike.

A row's text is split where an answer begins, and its pieces are tokenized separately: a server sends only the text
before the answer, so the tokens are the same, and none crosses the boundary. Tokenizers that add something before
every text, as SentencePiece does, would add it at each split; for them the text stays whole.
"""

import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from tokenizers import Encoding, processors
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerBase

from qlora_cli.data.rendering.renderer import FittedConversation, Rendered, Renderer
from qlora_cli.data.rendering.template import Span
from qlora_cli.data.rows.examples import (
    IGNORE_INDEX,
    Conversation,
    Example,
    Ids,
    PromptCompletion,
    RowError,
    Tokenized,
)
from qlora_cli.events import Reporter
from qlora_cli.settings.choices import LossOn
from qlora_cli.tokenizing.tokenizer_errors import explain_tokenizer_errors

MAX_PIECE_CHARACTERS = 500_000  # longer texts are split, so that memory stays bounded


class Tokens(NamedTuple):
    """One row: `input_ids` and `labels`, both int32 `(seq,)`; a label is the token, or -100 if it is not trained.

    The first token of a sequence is never predicted, so its label is always -100. A pair is two sequences, the chosen
    one first, of `first` tokens; of a single sequence that is 0. An answer with a label is one sequence, which is
    wanted or not.
    """

    input_ids: Ids
    labels: Ids
    first: int = 0
    is_desirable: bool | None = None

    @classmethod
    def pair_of(cls, chosen: "Tokens", rejected: "Tokens") -> "Tokens":
        """Return a pair."""
        return cls(
            input_ids=np.concatenate([chosen.input_ids, rejected.input_ids]),
            labels=np.concatenate([chosen.labels, rejected.labels]),
            first=len(chosen.input_ids),
        )

    @property
    def sequences(self) -> tuple["Tokens", ...]:
        """The sequences of the row: one, or the two of a pair."""
        if self.first == 0:
            return (self,)
        ids, labels = self.input_ids, self.labels
        return Tokens(ids[: self.first], labels[: self.first]), Tokens(ids[self.first :], labels[self.first :])

    @property
    def longest(self) -> int:
        """The number of tokens of the longest sequence."""
        return max(self.first, len(self.input_ids) - self.first)

    @property
    def num_trained(self) -> int:
        """The number of trained tokens; 0 of a pair of equal sequences, or without an answer to compare with."""
        sequences = self.sequences
        numbers = [int(np.count_nonzero(one.labels != IGNORE_INDEX)) for one in sequences]
        is_equal = len(sequences) > 1 and np.array_equal(sequences[0].input_ids, sequences[1].input_ids)
        return 0 if is_equal or not min(numbers) else sum(numbers)

    def truncate(self, max_length: int) -> "Tokens":
        """Return the first `max_length` tokens of each sequence."""
        if self.first:
            chosen, rejected = (one.truncate(max_length) for one in self.sequences)
            return Tokens.pair_of(chosen, rejected)
        return self._replace(input_ids=self.input_ids[:max_length], labels=self.labels[:max_length])


class RenderedText(NamedTuple):
    """Text to tokenize, and its spans to train. `is_plain`: the tokenizer, not a template, writes BOS and EOS."""

    text: str
    spans: tuple[Span, ...]
    is_plain: bool


Rendering = tuple[RenderedText | Tokens | RowError, ...]
Piece = tuple[int, int, str]  # the index of the text, the offset of the piece in it, the piece


class EncodedText:
    """The tokens of a text, collected piece by piece, and the token range of each span."""

    def __init__(self, spans: Sequence[Span]) -> None:
        self._spans = spans
        self.ids: list[int] = []
        self._starts: list[int] = []
        self.ends: list[int] = []

    def add(self, offset: int, length: int, encoding: Encoding, added: frozenset[int]) -> None:
        """Add the piece of `length` characters from `offset`; `added` are tokens that swallow the spaces around."""
        num_tokens, ids = len(self.ids), encoding.ids
        for start, _ in self._spans[len(self._starts) :]:
            if start >= offset + length:
                break
            self._starts.append(
                num_tokens + (_first_token(encoding, start - offset, length, added) if start > offset else 0)
            )
        for _, end in self._spans[len(self.ends) : len(self._starts)]:
            if end > offset + length:
                break
            is_whole = end == offset + length
            self.ends.append(num_tokens + (len(ids) if is_whole else _token_after(encoding, end - offset, length)))
        self.ids += ids

    def trained_ranges(self) -> Iterator[tuple[int, int]]:
        """Yield the ranges of tokens to train."""
        return zip(self._starts, self.ends, strict=True)


def _rows(encoded: Sequence[EncodedText]) -> Iterator[tuple[Ids, Ids]]:
    """Yield the tokens and labels of each text, as slices of two arrays that hold those of all texts."""
    offsets = [0, *itertools.accumulate(len(each.ids) for each in encoded)]
    ids = np.fromiter(itertools.chain.from_iterable(each.ids for each in encoded), np.int32, offsets[-1])
    labels = np.full(len(ids), IGNORE_INDEX, dtype=np.int32)
    for each, offset, end in zip(encoded, offsets, offsets[1:], strict=False):
        for first, last in each.trained_ranges():
            labels[offset + first : offset + last] = ids[offset + first : offset + last]
        yield ids[offset:end], labels[offset:end]


class RowTokenizer:
    """Turns examples into tokens by a tokenizer and its template. `end_ids` are the tokens that end a text or turn."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        loss_on: LossOn,
        end_ids: frozenset[int],
        *,
        accepts_lost: bool = False,
        reporter: Reporter | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        with explain_tokenizer_errors(tokenizer.name_or_path):
            self._backend, self._prefix, self._suffix = _without_special_tokens(tokenizer)
            self._may_split = all(_decode_pieces(self._backend, "a", more) == "a" + more for more in ("b", " b"))
        added = tokenizer.added_tokens_decoder
        self._added = frozenset(added)
        # Control tokens that are recognised in any context, and do not include spaces around them.
        self._ends_alone = tuple(
            str(token)
            for token in added.values()
            if token.special and not (token.rstrip or token.single_word or token.normalized)
        )
        self.renderer = Renderer(tokenizer, loss_on, end_ids, accepts_lost=accepts_lost, reporter=reporter)
        self._trains_all = loss_on == LossOn.ALL
        self._end_ids = end_ids
        self._num_tokens = len(tokenizer)
        self._bos, self._eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        self._ends = tuple(str(token) for number, token in added.items() if number in end_ids)
        special = [str(token) for token in added.values() if token.special]
        self._control = re.compile("|".join(map(re.escape, special)) or "(?!)")
        self.unusual_ends: Counter[int] = Counter()
        self.num_turns = 0
        self.num_with_control_tokens = 0
        self.control_tokens: Counter[str] = Counter()
        self.num_doubled_ends = 0

    def render(self, examples: Sequence[Example]) -> Rendering:
        """Return each example as text, as tokens if it is pretokenized, or as an error, in order."""
        fitted = [self._fit(example) for example in examples]
        inserted = [self.renderer.insert(each) if isinstance(each, FittedConversation) else None for each in fitted]
        plain = [
            each
            for each, rendered in zip(fitted, inserted, strict=True)
            if rendered is None and isinstance(each, FittedConversation) and each.original.is_plain
        ]
        texts = self.renderer.texts(plain) if plain else None
        text_of = dict(zip(map(id, plain), texts or (), strict=False))
        return tuple(
            self._text_or_tokens(each, rendered, text_of.get(id(each)))
            for each, rendered in zip(fitted, inserted, strict=True)
        )

    def encode(self, rendering: Rendering) -> list[EncodedText]:
        """Return the texts as tokens, in order. Uses all cores, and releases the GIL."""
        texts = [item for item in rendering if isinstance(item, RenderedText)]
        encoded = [EncodedText(item.spans) for item in texts]
        split_points = [self._split_points(item) for item in texts]
        # If each answer is a separate piece, the offsets of its tokens are not needed, which saves much time.
        aligned = {index for index, item in enumerate(texts) if _are_pieces(item, split_points[index])}
        pieces = [
            (index, *piece) for index, item in enumerate(texts) for piece in _pieces(item.text, split_points[index])
        ]
        for batch in _batches(pieces):
            self._encode([piece for piece in batch if piece[0] in aligned], self._backend.encode_batch_fast, encoded)
            self._encode([piece for piece in batch if piece[0] not in aligned], self._backend.encode_batch, encoded)
        return encoded

    def _encode(
        self, pieces: Sequence[Piece], encode_batch: Callable[..., list[Encoding]], encoded: Sequence[EncodedText]
    ) -> None:
        # What many rows have in common is encoded once, such as a system prompt, or a line break after all turns.
        texts = list(dict.fromkeys(text for _, _, text in pieces))
        with explain_tokenizer_errors(self._tokenizer.name_or_path):
            encodings = dict(zip(texts, encode_batch(texts, add_special_tokens=False), strict=True))
        for index, offset, text in pieces:
            encoded[index].add(offset, len(text), encodings[text], self._added)

    def label(self, rendering: Rendering, encoded: Sequence[EncodedText]) -> list[Tokens | RowError]:
        """Return the tokens of each example with their labels, or its error, in order."""
        rows = zip(encoded, _rows(encoded), strict=True)
        return [self._label(item, *next(rows)) if isinstance(item, RenderedText) else item for item in rendering]

    def tokenize(self, examples: Sequence[Example]) -> list[Tokens | RowError]:
        """Return the tokens of each example, or its error, in order."""
        rendering = self.render(examples)
        return self.label(rendering, self.encode(rendering))

    def _fit(self, example: Example) -> FittedConversation | PromptCompletion | Tokenized | RowError:
        if not isinstance(example, Conversation):
            return example
        try:
            if self._tokenizer.chat_template is None:
                raise RowError(
                    "it is a conversation, but the tokenizer has no chat template",
                    hint="Give one with --chat-template (a .jinja file, or chatml), take the instruct version of the "
                    "model, or write rows as prompt and completion.",
                )
            return self.renderer.fit(example)
        except RowError as error:
            return error

    def _text_or_tokens(
        self,
        example: FittedConversation | PromptCompletion | Tokenized | RowError,
        rendered: Rendered | None,
        text: str | None,
    ) -> Tokens | RowError | RenderedText:
        try:
            if isinstance(example, RowError):
                return example
            if isinstance(example, Tokenized):
                return self._check_tokens(example)
            return (
                self._render_conversation(example, rendered, text)
                if isinstance(example, FittedConversation)
                else self._plain_text(example)
            )
        except RowError as error:
            return error

    def _check_tokens(self, example: Tokenized) -> Tokens:
        ids = example.input_ids
        if ids.max() >= self._num_tokens:
            raise RowError(f"token {ids.max()} is beyond the {self._num_tokens} tokens of the tokenizer")
        return _row(ids, (ids if self._trains_all else example.labels).copy())

    def _count_control_tokens(self, texts: Iterable[str], allowed_end: str | None = None) -> None:
        """Count a row whose own text has control tokens; an `allowed_end` is not doubled."""
        texts_with_tokens = [(text, tokens) for text in texts if (tokens := self._control.findall(text))]
        if texts_with_tokens:
            self.num_with_control_tokens += 1
            self.control_tokens.update(token for _, tokens in texts_with_tokens for token in tokens)
            ended = (text for text, _ in texts_with_tokens if text.rstrip().endswith(self._ends))
            self.num_doubled_ends += any(allowed_end is None or not text.endswith(allowed_end) for text in ended)

    def _render_conversation(
        self, row: FittedConversation, rendered: Rendered | None, text: str | None
    ) -> RenderedText:
        self._count_control_tokens(message["content"] for message in row.original.messages)
        if rendered is None:
            rendered = self.renderer.render(row, self.renderer.text(row) if text is None else text)
        return RenderedText(text=rendered.text, spans=rendered.spans, is_plain=False)

    def _plain_text(self, example: PromptCompletion) -> RenderedText:
        text = example.prompt + example.completion
        self._count_control_tokens([text], allowed_end=self._tokenizer.eos_token)
        start = 0 if self._trains_all else len(example.prompt)
        return RenderedText(text=text, spans=((start, len(text)),), is_plain=True)

    def _split_points(self, item: RenderedText) -> list[int]:
        """Return where to split a text: where answers begin, and after control tokens that end them."""
        if not self._may_split:
            return [0]
        ends = (end for _, end in item.spans if item.text.endswith(self._ends_alone, 0, end))
        return sorted({0, *(start for start, _ in item.spans), *ends} - {len(item.text)} | {0})

    def _label(self, item: RenderedText, encoded: EncodedText, row: tuple[Ids, Ids]) -> Tokens | RowError:
        return self._with_bos_and_eos(*row) if item.is_plain else self._check_rendered(*row, encoded)

    def _with_bos_and_eos(self, row: Ids, labels: Ids) -> Tokens:
        """Return a plain text with the tokens that the tokenizer adds: at most one BOS, and a trained EOS."""
        bos, eos = self._bos, self._eos
        assert eos is not None, "checked on loading"
        while bos in self._prefix and len(row) and row[0] == bos:
            row, labels = row[1:], labels[1:]  # the text contains it
        while len(row) and row[-1] == eos:
            row, labels = row[:-1], labels[:-1]
        suffix = [token for token in self._suffix if token != eos]
        unseen = [IGNORE_INDEX] * len(self._prefix)
        return _row(
            np.concatenate([self._prefix, row, [*suffix, eos]]).astype(np.int32),
            np.concatenate([unseen, labels, [*suffix, eos]]).astype(np.int32),
        )

    def _check_rendered(self, row: Ids, labels: Ids, encoded: EncodedText) -> Tokens | RowError:
        """Check a rendered row: it has tokens and at most one BOS; unusual ends of turns are counted."""
        if len(row) == 0:
            return RowError("the chat template renders it as an empty text")
        if self._bos is not None and encoded.ids[:2] == [self._bos, self._bos]:
            return RowError(
                f"it begins with {self._tokenizer.bos_token} twice: both the template and the row write it",
                hint="Remove it from the text.",
            )
        if not self._trains_all:
            ends = [encoded.ids[last - 1] for last in encoded.ends]
            self.num_turns += len(ends)
            if not self._end_ids.issuperset(ends):
                self.unusual_ends.update(token for token in ends if token not in self._end_ids)
        return _row(row, labels)


def _are_pieces(item: RenderedText, split_points: Sequence[int]) -> bool:
    """Return whether each answer is exactly one or several pieces of the text."""
    edges = {*split_points, len(item.text)}
    return all(start in edges and end in edges for start, end in item.spans)


def _pieces(text: str, split_points: Sequence[int]) -> Iterator[tuple[int, str]]:
    """Yield the pieces of a text with their offsets; a very long one is split further."""
    for start, end in zip(split_points, [*split_points[1:], len(text)], strict=True):
        while end - start > MAX_PIECE_CHARACTERS:
            # Before a space, where tokenizers split too.
            cut = text.rfind(" ", start + MAX_PIECE_CHARACTERS // 2, start + MAX_PIECE_CHARACTERS)
            cut = cut if cut > 0 else start + MAX_PIECE_CHARACTERS
            yield start, text[start:cut]
            start = cut
        yield start, text[start:end]


def _without_special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[Backend, list[int], list[int]]:
    """Return the tokenizer without the special tokens that it adds before and after a text, and these tokens.

    The post-processor that adds them may also exclude spaces from the offsets of tokens.
    """
    bare = Backend.from_str(tokenizer.backend_tokenizer.to_str())
    bare.no_truncation()
    bare.no_padding()
    bare.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B:1", special_tokens=[])
    ids, bare_ids = list(tokenizer("a")["input_ids"]), _ids(bare, "a")
    for start in range(len(ids) - len(bare_ids) + 1):
        if ids[start : start + len(bare_ids)] == bare_ids:
            return bare, ids[:start], ids[start + len(bare_ids) :]
    raise AssertionError(f"a text tokenizes to {ids}, and to {bare_ids} without special tokens")


def _ids(backend: Backend, text: str) -> list[int]:
    return list(backend.encode(text, add_special_tokens=False).ids)


def _decode_pieces(backend: Backend, *pieces: str) -> str:
    """Return the text that pieces decode to after they were tokenized separately."""
    ids = [token for piece in pieces for token in _ids(backend, piece)]
    return str(backend.decode(ids, skip_special_tokens=False))


def _batches(pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
    """Yield pieces of a few million characters at a time: an encoding takes fifty times the memory of its text."""
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece[2])
        if size >= 4 * MAX_PIECE_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _row(input_ids: Ids, labels: Ids) -> Tokens:
    labels[:1] = IGNORE_INDEX  # the first token is not predicted
    return Tokens(input_ids=input_ids, labels=labels)


def _first_token(encoding: Encoding, position: int, length: int, added: frozenset[int]) -> int:
    """Return the first token of an answer; a control token before it that includes its space does not count."""
    first = _token_at(encoding, position, length)
    characters = encoding.token_to_chars(first) if first < len(encoding.ids) else None
    return first + (characters is not None and characters[0] < position and encoding.ids[first] in added)


def _token_at(encoding: Encoding, position: int, length: int) -> int:
    """Return the token at a character, or at the next one that has a token; the number of tokens if none has."""
    while position < length:
        token = encoding.char_to_token(position)
        if token is not None:
            return int(token)
        position += 1  # a character without a token, such as a space that the tokenizer drops
    return len(encoding.ids)


def _token_after(encoding: Encoding, position: int, length: int) -> int:
    """Return the first token that begins at a character position or after it."""
    token = _token_at(encoding, position, length)
    characters = encoding.token_to_chars(token) if token < len(encoding.ids) else None
    return token + 1 if characters is not None and characters[0] < position else token
