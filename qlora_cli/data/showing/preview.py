"""Preview rows token by token, from the same batches that training feeds."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase

from qlora_cli.data.feeding.collate import make_collator, sequences_of
from qlora_cli.data.feeding.prepare import PreparedData
from qlora_cli.data.rows.examples import IGNORE_INDEX
from qlora_cli.data.rows.pair_reader import SIDES
from qlora_cli.tokenizing.tokenizer_errors import explain_tokenizer_errors

TRAINED_BEGIN, TRAINED_END = "«", "»"


@dataclass(frozen=True, kw_only=True)
class TokenPiece:
    """A token as text, or several tokens that form a character only together.

    `is_special`: a control token such as the end of a turn. `is_padding`: neither attended to nor in the loss.
    """

    ids: tuple[int, ...]
    text: str
    is_trained: bool
    is_special: bool
    is_padding: bool


@dataclass(frozen=True, kw_only=True)
class RowPreview:
    """One row as it is fed; `where` names its file and number."""

    where: str
    num_tokens: int
    num_supervised: int
    pieces: tuple[TokenPiece, ...]

    def one_line(self, max_characters: int) -> str:
        """Return the row in one line of about `max_characters` characters, trained text within « and »."""
        parts, trained = [], False
        for piece in self.pieces:
            if piece.is_padding:
                continue
            if piece.is_trained != trained:
                parts.append(TRAINED_BEGIN if piece.is_trained else TRAINED_END)
                trained = piece.is_trained
            parts.append(piece.text)
        line = "".join(parts).replace("\r", "\\r").replace("\n", "\\n") + (TRAINED_END if trained else "")
        return (
            line if len(line) <= max_characters else f"{line[: max_characters // 2]} … {line[-max_characters // 2 :]}"
        )


def preview_rows(data: PreparedData, tokenizer: PreTrainedTokenizerBase, num_rows: int) -> tuple[RowPreview, ...]:
    """Return the first rows that are fed, as they are in a batch of the collator; of a pair, both sequences."""
    indices = data.selected[:num_rows]
    if len(indices) == 0:
        return ()
    named = [(index, side) for index in indices for side in _names_of(data, int(index))]
    sequences = [one for index in indices for one in sequences_of(data.table.dataset[int(index)])]
    batch = make_collator(tokenizer.pad_token_id, packing=False)(sequences)
    return tuple(
        RowPreview(
            where=f"{data.table.where(int(index))}{side and f', {side}'}",
            num_tokens=int(mask.sum()),
            num_supervised=int((labels != IGNORE_INDEX).sum()),
            pieces=tuple(_pieces(ids.tolist(), labels.tolist(), mask.tolist(), tokenizer)),
        )
        for (index, side), ids, labels, mask in zip(
            named, batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True
        )
    )


def _names_of(data: PreparedData, index: int) -> tuple[str, ...]:
    """Return the names of the sequences of a row: the sides of a pair, or what the label of an answer says of it."""
    if data.table.has_labels:
        return ("wanted" if data.table.desirable[index] else "unwanted",)
    return SIDES if data.table.has_pairs else ("",)


class _TokenDecoder:
    """Decodes tokens one by one; a step returns None while they are only part of a character."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=False)

    def step(self, token: int, pending: Sequence[int]) -> str | None:
        """Return the text of `pending`, the last of which is `token`."""
        try:
            text: str | None = self._stream.step(self._tokenizer.backend_tokenizer, token)
        except Exception:  # noqa: BLE001 - tokenizers raises a bare one for bytes of a truncated character
            self._stream = DecodeStream(skip_special_tokens=False)
            return str(self._tokenizer.decode(list(pending)))
        return text


def _pieces(
    ids: Sequence[int], labels: Sequence[int], mask: Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> list[TokenPiece]:
    with explain_tokenizer_errors(tokenizer.name_or_path):
        return list(_decoded(ids, labels, mask, tokenizer))


def _decoded(
    ids: Sequence[int], labels: Sequence[int], mask: Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> Iterator[TokenPiece]:
    decoder = _TokenDecoder(tokenizer)
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    pending: list[int] = []
    for index, token in enumerate(ids):
        pending.append(token)
        text = decoder.step(token, pending)
        is_last = index + 1 == len(ids)
        is_boundary = not is_last and (labels[index] == IGNORE_INDEX) != (labels[index + 1] == IGNORE_INDEX)
        if text is None and not is_last and not is_boundary:
            continue  # part of a character
        yield TokenPiece(
            ids=tuple(pending),
            text=str(tokenizer.decode(pending)) if text is None else text,
            is_trained=labels[index] != IGNORE_INDEX,
            is_special=token in special,
            is_padding=mask[index] == 0,
        )
        pending = []
