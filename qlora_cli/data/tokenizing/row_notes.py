"""Notes for the user on the tokenized rows of a data set."""

from collections.abc import Iterable

from transformers import PreTrainedTokenizerBase

from qlora_cli.data.limits import join_names
from qlora_cli.data.rendering.renderer import Renderer
from qlora_cli.data.rendering.value_marks import ValueKind
from qlora_cli.data.rows.row_reader import RowReader
from qlora_cli.data.tokenizing.tokens import RowTokenizer
from qlora_cli.units import counted


def on_ends(tokenizer: RowTokenizer, decoder: PreTrainedTokenizerBase, end_ids: Iterable[int]) -> list[str]:
    """Return a note on turns that end with a token at which generation does not stop."""
    unusual_ends, num_turns = tokenizer.unusual_ends, tokenizer.num_turns
    if not unusual_ends:
        return []
    names = ", ".join(sorted(repr(decoder.decode([token])) for token in unusual_ends))
    turns = (
        "trained turns"
        if unusual_ends.total() == num_turns
        else f"{unusual_ends.total():,} of {num_turns:,} trained turns"
    )
    ends = ", ".join(sorted(repr(decoder.decode([token])) for token in end_ids))
    return [
        f"the chat template ends {turns} with {names}, but generation stops at {ends}: the model learns its end, but "
        "the server must be configured to stop there (eos_token_id in generation_config.json)"
    ]


def on_bos(tokenizer: PreTrainedTokenizerBase, *, starts_with_bos: bool) -> list[str]:
    """Return a note on rows that begin without the token with which the tokenizer begins texts."""
    adds = tokenizer.bos_token_id is not None and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
    if starts_with_bos or not adds:
        return []
    return [
        f"the tokenizer begins texts with {tokenizer.bos_token}, but the chat template does not: rows have "
        "none, as they are served"
    ]


def on_control_tokens(tokenizer: RowTokenizer) -> list[str]:
    """Return notes on rows whose own text contains control tokens."""
    if not tokenizer.num_with_control_tokens:
        return []
    common = ", ".join(token for token, _ in tokenizer.control_tokens.most_common(3))
    notes = [
        f"{counted(tokenizer.num_with_control_tokens, 'row')} with control tokens in the text itself ({common}): the "
        "model will take them for what they stand for"
    ]
    if tokenizer.num_doubled_ends:
        doubled = (
            f"{counted(tokenizer.num_doubled_ends, 'row')} with two end tokens: the text contains one, and another"
        )
        notes.append(f"{doubled} is written after it; remove the one in the text")
    return notes


def on_unknown_keys(reader: RowReader, renderer: Renderer) -> list[str]:
    """Return a note on keys of messages that no format knows, and that the chat template does not write either."""
    unused = {
        key: number
        for key, number in reader.unknown_keys.most_common()
        if not renderer.writes_key(key, reader.rows_with_key.get(key, ()))
    }
    if not unused:
        return []
    names = join_names([f"{key} ({counted(number, 'row')})" for key, number in unused.items()])
    return [f"keys of messages that are ignored, because the chat template does not write them: {names}"]


def on_unread_variables(reader: RowReader, renderer: Renderer) -> list[str]:
    """Return a note on variables that rows set for the chat template, and that it does not read."""
    unused = [
        f"{name} ({counted(number, 'row')})"
        for name, number in reader.template_variables.most_common()
        if not renderer.reads_variable(name)
    ]
    return [f"set for the chat template, which does not read them: {join_names(unused)}"] if unused else []


def on_groups(column: str | None, num_without: int) -> list[str]:
    """Return a note on rows without a value of the column that keeps rows together."""
    if column is None or not num_without:
        return []
    rows = counted(num_without, "row")
    return [f"{rows} without a value of {column!r}, each of which is held out or trained on separately"]


def on_dropped_values(renderer: Renderer) -> list[str]:
    """Return notes on values that the chat template leaves out of rows that are used."""
    num_dropped = renderer.num_dropped
    return [
        f"the chat template leaves out {kind.value} of {counted(num_dropped[kind], 'row')}"
        for kind in ValueKind
        if num_dropped[kind]
    ]
