"""What a user should know of the rows of a data set that were tokenized."""

from collections.abc import Iterable

from transformers import PreTrainedTokenizerBase

from qlora_cli.data.limits import listed
from qlora_cli.data.rendering.renderer import Renderer
from qlora_cli.data.rendering.value_marks import What
from qlora_cli.data.rows.row_reader import RowReader
from qlora_cli.data.tokenizing.tokens import Tokenizer
from qlora_cli.units import counted


def on_ends(tokenizer: Tokenizer, decoder: PreTrainedTokenizerBase, end_ids: Iterable[int]) -> list[str]:
    """Return a note on turns that end with a token at which generation does not stop."""
    odd_ends, num_turns = tokenizer.odd_ends, tokenizer.num_turns
    if not odd_ends:
        return []
    named = ", ".join(sorted(repr(decoder.decode([token])) for token in odd_ends))
    which = (
        "trained turns" if odd_ends.total() == num_turns else f"{odd_ends.total():,} of {num_turns:,} trained turns"
    )
    ends = ", ".join(sorted(repr(decoder.decode([token])) for token in end_ids))
    return [
        f"the chat template ends {which} with {named}, and generation stops at {ends}: the model learns its end, but "
        "what serves it must be told to stop there (eos_token_id in generation_config.json)"
    ]


def on_bos(tokenizer: PreTrainedTokenizerBase, *, starts_with_bos: bool) -> list[str]:
    """Return a note on rows that begin without the token with which the tokenizer begins texts."""
    adds = tokenizer.bos_token_id is not None and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
    if starts_with_bos or not adds:
        return []
    return [
        f"the tokenizer begins texts with {tokenizer.bos_token}, the chat template does not: rows have none, as they "
        "are served"
    ]


def on_control_tokens(tokenizer: Tokenizer) -> list[str]:
    """Return notes on rows that bring control tokens along."""
    if not tokenizer.num_with_control_tokens:
        return []
    common = ", ".join(token for token, _ in tokenizer.control_tokens.most_common(3))
    notes = [
        f"{counted(tokenizer.num_with_control_tokens, 'row')} with control tokens in the text itself ({common}): the "
        "model will take them for what they stand for"
    ]
    if tokenizer.num_ended_twice:
        twice = f"{counted(tokenizer.num_ended_twice, 'row')} with two ends: the text brings one along, and another"
        notes.append(f"{twice} is written behind it; take the one in the text off")
    return notes


def on_unknown_keys(reader: RowReader, renderer: Renderer) -> list[str]:
    """Return a note on keys of messages that no format knows, and that the chat template does not write either."""
    unread = {
        key: number
        for key, number in reader.unknown_keys.most_common()
        if not renderer.writes_key(key, reader.rows_with_key.get(key, ()))
    }
    if not unread:
        return []
    named = listed([f"{key} ({counted(number, 'row')})" for key, number in unread.items()])
    return [f"keys of messages that are not used, as the chat template does not write them: {named}"]


def on_unread_variables(reader: RowReader, renderer: Renderer) -> list[str]:
    """Return a note on variables that rows set for the chat template, and that it does not read."""
    unread = [
        f"{name} ({counted(number, 'row')})"
        for name, number in reader.template_variables.most_common()
        if not renderer.reads_variable(name)
    ]
    return [f"set for the chat template, which does not read them: {listed(unread)}"] if unread else []


def on_groups(column: str | None, num_without: int) -> list[str]:
    """Return a note on rows without a value of the column that keeps rows together."""
    if column is None or not num_without:
        return []
    return [f"{counted(num_without, 'row')} without a value of {column!r}, held out or trained each by itself"]


def on_what_is_left_out(renderer: Renderer) -> list[str]:
    """Return notes on what the chat template leaves out of rows that are used."""
    told = renderer.told
    return [
        f"the chat template leaves out {what.value} of {counted(told[what], 'row')}" for what in What if told[what]
    ]
