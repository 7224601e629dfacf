"""Convert failures inside a tokenizer into an error that names it.

The tokenizers library is written in Rust and fails in two unusual ways: by a panic, which is not an `Exception`, and
by a bare `Exception`. Both are caused by the content of a tokenizer.json, sometimes only on certain texts.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from qlora_cli.errors import ModelError, is_panic


@contextmanager
def explain_tokenizer_errors(name: str) -> Iterator[None]:
    """Explain failures while the tokenizer `name` is read or used.

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
            hint="Its tokenizer.json is damaged, or can't encode this text; download it again from its source.",
        ) from error
