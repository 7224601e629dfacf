"""What goes wrong inside a tokenizer, as an error that names it.

The library is written in Rust and ends in two ways that are like no other's: a panic, which is no `Exception`, and a
bare `Exception`. Both come of what a tokenizer.json says, together with a text.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from qlora_cli.errors import ModelError, is_panic


@contextmanager
def tokenizer_explained(name: str) -> Iterator[None]:
    """Explain what goes wrong while the tokenizer `name` is read or used.

    Raises:
        ModelError: it fails.
    """
    try:
        yield
    except BaseException as error:
        if not (is_panic(error) or type(error) is Exception):
            raise
        reason = str(error).partition("\n")[0]
        raise ModelError(
            f"the tokenizer of {name} fails: {reason}",
            hint="Its tokenizer.json is damaged, or does not know this text; get it anew from where it came from.",
        ) from error
