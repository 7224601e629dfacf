"""From text to tokens and labels, many rows at a time: the one path of training, evaluation and preview.

A row's text is cut where an answer begins, and its pieces are tokenized by themselves: a server sends what stands
before the answer alone, so its tokens are the same, and no token lies across. Tokenizers that write something before
every text they are given, as SentencePiece does, would write it at each cut; for them the text stays whole.
"""

import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import Encoding, processors
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerBase

from qlora_cli.data.rendering.renderer import FittedTemplate, Renderer
from qlora_cli.data.rendering.template import Span
from qlora_cli.data.rows.examples import IGNORED, Conversation, Example, Ids, PromptCompletion, RowError, Tokenized
from qlora_cli.events import Reporter
from qlora_cli.settings.choices import LossOn
from qlora_cli.tokenizing.tokenizer_errors import tokenizer_explained

SLICE = 500_000  # characters of a text that are tokenized at once; longer ones are cut, so that memory stays bounded


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
    """Text to tokenize, and what of it is trained. `is_plain`: the tokenizer, not a template, writes BOS and EOS."""

    text: str
    spans: tuple[Span, ...]
    is_plain: bool


Rendering = tuple[Text | Tokens | RowError, ...]
Piece = tuple[int, int, str]  # the place of the text, where the piece begins in it, the piece


class Encoded:
    """The tokens of a text, as far as its pieces were added, and which of them each span comes to."""

    def __init__(self, spans: Sequence[Span]) -> None:
        self._spans = spans
        self.ids: list[int] = []
        self._starts: list[int] = []
        self.ends: list[int] = []

    def add(self, begin: int, length: int, encoding: Encoding, added: frozenset[int]) -> None:
        """Add the piece of `length` characters from `begin`; `added` are tokens that swallow the spaces around."""
        offset, ids = len(self.ids), encoding.ids
        for start, _ in self._spans[len(self._starts) :]:
            if start >= begin + length:
                break
            self._starts.append(
                offset + (_first_token(encoding, start - begin, length, added) if start > begin else 0)
            )
        for _, end in self._spans[len(self.ends) : len(self._starts)]:
            if end > begin + length:
                break
            is_whole = end == begin + length
            self.ends.append(offset + (len(ids) if is_whole else _token_behind(encoding, end - begin, length)))
        self.ids += ids

    def trained(self) -> Iterator[tuple[int, int]]:
        """Yield the ranges of tokens that are trained."""
        return zip(self._starts, self.ends, strict=True)


def _rows(encoded: Sequence[Encoded]) -> Iterator[tuple[Ids, Ids]]:
    """Yield the tokens of each text, and their labels: parts of two arrays, for all of them at once."""
    offsets = [0, *itertools.accumulate(len(each.ids) for each in encoded)]
    ids = np.fromiter(itertools.chain.from_iterable(each.ids for each in encoded), np.int32, offsets[-1])
    labels = np.full(len(ids), IGNORED, dtype=np.int32)
    for each, offset, end in zip(encoded, offsets, offsets[1:], strict=False):
        for first, last in each.trained():
            labels[offset + first : offset + last] = ids[offset + first : offset + last]
        yield ids[offset:end], labels[offset:end]


class Tokenizer:
    """Turns examples into tokens by a tokenizer and its chat template. `end_ids` are those that end a text or turn."""

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
        with tokenizer_explained(tokenizer.name_or_path):
            self._backend, self._prefix, self._suffix = _bare(tokenizer)
            self._may_cut = all(_decoded(self._backend, "a", more) == "a" + more for more in ("b", " b"))
        added = tokenizer.added_tokens_decoder
        self._added = frozenset(added)
        # Control tokens that are found whatever stands around them, and take nothing of it.
        self._ends_alone = tuple(
            str(token)
            for token in added.values()
            if token.special and not (token.rstrip or token.single_word or token.normalized)
        )
        self.renderer = Renderer(tokenizer, loss_on, end_ids, accepts_lost=accepts_lost, reporter=reporter)
        self._trains_all = loss_on == LossOn.ALL
        self._end_ids = end_ids
        self._num_tokens = len(tokenizer)
        self._ends = tuple(str(token) for number, token in added.items() if number in end_ids)
        special = [str(token) for token in added.values() if token.special]
        self._control = re.compile("|".join(map(re.escape, special)) or "(?!)")
        self.odd_ends: Counter[int] = Counter()
        self.num_turns = 0
        self.num_with_control_tokens = 0
        self.control_tokens: Counter[str] = Counter()
        self.num_ended_twice = 0

    def render(self, examples: Sequence[Example]) -> Rendering:
        """Return each example as text, or as tokens if it is some, or what is wrong with it, in order."""
        fitted = [self._fitted(example) for example in examples]
        plain = [each for each in fitted if isinstance(each, FittedTemplate) and each.original.is_plain]
        texts = self.renderer.texts(plain) if plain else None
        found = dict(zip(map(id, plain), texts or (), strict=False))
        return tuple(self._prepare(example, found.get(id(example))) for example in fitted)

    def encode(self, rendering: Rendering) -> list[Encoded]:
        """Return the texts as tokens, in order. Works on all cores, and lets other threads go on meanwhile."""
        texts = [item for item in rendering if isinstance(item, Text)]
        found = [Encoded(item.spans) for item in texts]
        cuts = [self._cuts(item) for item in texts]
        # Where each answer is a piece of its own, nobody asks where its tokens stand, and not to tell saves much work.
        whole = {place for place, item in enumerate(texts) if _are_pieces(item, cuts[place])}
        pieces = [(place, *piece) for place, item in enumerate(texts) for piece in _pieces(item.text, cuts[place])]
        for batch in _batches(pieces):
            self._encode([piece for piece in batch if piece[0] in whole], self._backend.encode_batch_fast, found)
            self._encode([piece for piece in batch if piece[0] not in whole], self._backend.encode_batch, found)
        return found

    def _encode(
        self, pieces: Sequence[Piece], encode_batch: Callable[..., list[Encoding]], found: Sequence[Encoded]
    ) -> None:
        with tokenizer_explained(self._tokenizer.name_or_path):
            encodings = encode_batch([text for _, _, text in pieces], add_special_tokens=False)
        for (place, begin, text), encoding in zip(pieces, encodings, strict=True):
            found[place].add(begin, len(text), encoding, self._added)

    def label(self, rendering: Rendering, encoded: Sequence[Encoded]) -> list[Tokens | RowError]:
        """Return the tokens of each example with their labels, or what is wrong with it, in order."""
        rows = zip(encoded, _rows(encoded), strict=True)
        return [self._label(item, *next(rows)) if isinstance(item, Text) else item for item in rendering]

    def tokenize(self, examples: Sequence[Example]) -> list[Tokens | RowError]:
        """Return the tokens of each example, or what is wrong with it, in order."""
        rendering = self.render(examples)
        return self.label(rendering, self.encode(rendering))

    def _fitted(self, example: Example) -> FittedTemplate | PromptCompletion | Tokenized | RowError:
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

    def _prepare(
        self, example: FittedTemplate | PromptCompletion | Tokenized | RowError, text: str | None
    ) -> Tokens | RowError | Text:
        try:
            if isinstance(example, RowError):
                return example
            if isinstance(example, Tokenized):
                return self._as_given(example)
            return self._rendered(example, text) if isinstance(example, FittedTemplate) else self._plain(example)
        except RowError as error:
            return error

    def _as_given(self, example: Tokenized) -> Tokens:
        ids = example.input_ids
        if ids.max() >= self._num_tokens:
            raise RowError(f"token {ids.max()} is beyond the {self._num_tokens} of the tokenizer")
        return _row(ids, (ids if self._trains_all else example.labels).copy())

    def _note_control_tokens(self, texts: Iterable[str], taken: str | None = None) -> None:
        """Count a row whose own text has control tokens, which tokenize as such; `taken` is not doubled at its end."""
        has = [(text, found) for text in texts if (found := self._control.findall(text))]
        if has:
            self.num_with_control_tokens += 1
            self.control_tokens.update(token for _, found in has for token in found)
            ended = (text for text, _ in has if text.rstrip().endswith(self._ends))
            self.num_ended_twice += any(taken is None or not text.endswith(taken) for text in ended)

    def _rendered(self, row: FittedTemplate, text: str | None) -> Text:
        self._note_control_tokens(message["content"] for message in row.original.messages)
        rendered = self.renderer.render(row, self.renderer.text(row) if text is None else text)
        return Text(text=rendered.text, spans=rendered.spans, is_plain=False)

    def _plain(self, example: PromptCompletion) -> Text:
        text = example.prompt + example.completion
        self._note_control_tokens([text], taken=self._tokenizer.eos_token)
        start = 0 if self._trains_all else len(example.prompt)
        return Text(text=text, spans=((start, len(text)),), is_plain=True)

    def _cuts(self, item: Text) -> list[int]:
        """Return where a text is cut: where answers begin, and behind control tokens that end them, as always."""
        if not self._may_cut:
            return [0]
        ends = (end for _, end in item.spans if item.text.endswith(self._ends_alone, 0, end))
        return sorted({0, *(start for start, _ in item.spans), *ends} - {len(item.text)} | {0})

    def _label(self, item: Text, encoded: Encoded, row: tuple[Ids, Ids]) -> Tokens | RowError:
        return self._ended(*row) if item.is_plain else self._checked(*row, encoded)

    def _ended(self, row: Ids, labels: Ids) -> Tokens:
        """Return a plain text as the tokenizer begins and ends it: one BOS at most, and a trained end."""
        bos, eos = self._tokenizer.bos_token_id, self._tokenizer.eos_token_id
        assert eos is not None, "checked on loading"
        while bos in self._prefix and len(row) and row[0] == bos:
            row, labels = row[1:], labels[1:]  # the text brings it along
        while len(row) and row[-1] == eos:
            row, labels = row[:-1], labels[:-1]
        suffix = [token for token in self._suffix if token != eos]
        unseen = [IGNORED] * len(self._prefix)
        return _row(
            np.concatenate([self._prefix, row, [*suffix, eos]]).astype(np.int32),
            np.concatenate([unseen, labels, [*suffix, eos]]).astype(np.int32),
        )

    def _checked(self, row: Ids, labels: Ids, encoded: Encoded) -> Tokens | RowError:
        """Check a rendered row: it has tokens, one BOS at most at its beginning, and known ends of turns."""
        bos = self._tokenizer.bos_token_id
        if len(row) == 0:
            return RowError("the chat template renders nothing of it")
        if bos is not None and encoded.ids[:2] == [bos, bos]:
            return RowError(
                f"it begins with {self._tokenizer.bos_token} twice: the template writes it, and so does the row",
                hint="Take it out of the text.",
            )
        if not self._trains_all:
            ends = [encoded.ids[last - 1] for last in encoded.ends]
            self.num_turns += len(ends)
            self.odd_ends.update(token for token in ends if token not in self._end_ids)
        return _row(row, labels)


def _are_pieces(item: Text, cuts: Sequence[int]) -> bool:
    """Whether each answer is a piece of the text, or several, by itself."""
    edges = {*cuts, len(item.text)}
    return all(start in edges and end in edges for start, end in item.spans)


def _pieces(text: str, cuts: Sequence[int]) -> Iterator[tuple[int, str]]:
    """Yield the pieces of a text and where each begins; a very long one is cut further."""
    for begin, end in zip(cuts, [*cuts[1:], len(text)], strict=True):
        while end - begin > SLICE:
            # Before a space, where tokenizers cut too.
            cut = text.rfind(" ", begin + SLICE // 2, begin + SLICE)
            cut = cut if cut > 0 else begin + SLICE
            yield begin, text[begin:cut]
            begin = cut
        yield begin, text[begin:end]


def _bare(tokenizer: PreTrainedTokenizerBase) -> tuple[Backend, list[int], list[int]]:
    """Return the tokenizer without what it adds before and behind a text, and the tokens that it adds there.

    What adds them may also take spaces out of the positions of tokens.
    """
    bare = Backend.from_str(tokenizer.backend_tokenizer.to_str())
    bare.no_truncation()
    bare.no_padding()
    bare.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B:1", special_tokens=[])
    whole, alone = list(tokenizer("a")["input_ids"]), _ids(bare, "a")
    for begin in range(len(whole) - len(alone) + 1):
        if whole[begin : begin + len(alone)] == alone:
            return bare, whole[:begin], whole[begin + len(alone) :]
    raise AssertionError(f"a text tokenizes to {whole}, and to {alone} without special tokens")


def _ids(backend: Backend, text: str) -> list[int]:
    return list(backend.encode(text, add_special_tokens=False).ids)


def _decoded(backend: Backend, *pieces: str) -> str:
    """Return what becomes of pieces of a text that are tokenized by themselves."""
    ids = [token for piece in pieces for token in _ids(backend, piece)]
    return str(backend.decode(ids, skip_special_tokens=False))


def _batches(pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
    """Yield pieces of a few million characters at a time: an encoding takes fifty times the room of its text."""
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece[2])
        if size >= 4 * SLICE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _row(input_ids: Ids, labels: Ids) -> Tokens:
    labels[:1] = IGNORED  # nothing predicts the first token
    return Tokens(input_ids=input_ids, labels=labels)


def _first_token(encoding: Encoding, position: int, length: int, added: frozenset[int]) -> int:
    """Return the token that an answer begins with; a control token that has swallowed a space is none of it."""
    first = _token_at(encoding, position, length)
    place = encoding.token_to_chars(first) if first < len(encoding.ids) else None
    return first + (place is not None and place[0] < position and encoding.ids[first] in added)


def _token_at(encoding: Encoding, position: int, length: int) -> int:
    """Return the token that stands for a character, or for the next one that has one; past the end if none does."""
    while position < length:
        token = encoding.char_to_token(position)
        if token is not None:
            return int(token)
        position += 1  # a character that no token stands for, such as a space that the tokenizer drops
    return len(encoding.ids)


def _token_behind(encoding: Encoding, position: int, length: int) -> int:
    """Return the token behind those that begin before a character position."""
    token = _token_at(encoding, position, length)
    place = encoding.token_to_chars(token) if token < len(encoding.ids) else None
    return token + 1 if place is not None and place[0] < position else token
