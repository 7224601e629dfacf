"""Count the ids of a tokenizer from its files. Imports neither torch nor transformers."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from qlora_cli.model_files.checkpoint import read_json

FILES = ("tokenizer.json", "vocab.json", "added_tokens.json", "tokenizer_config.json")


def num_ids(directory: Path) -> int:
    """Return the number of ids of the tokenizer in `directory`, including gaps, as far as its JSON files say.

    Return 0 if they list none. A vocabulary in another format is not read: added tokens have the highest ids.

    Raises:
        ModelError: one of the files is not JSON.
    """
    ids = (number for name in FILES if (directory / name).is_file() for number in _ids(name, directory))
    return max(ids, default=-1) + 1


def _ids(name: str, directory: Path) -> Iterator[int]:
    content = read_json(directory / name)
    if name == "tokenizer_config.json":
        added = content.get("added_tokens_decoder")
        yield from (int(key) for key in added if key.isdecimal()) if isinstance(added, Mapping) else ()
    elif name == "tokenizer.json":
        yield from _of_library(content)
    else:
        yield from (number for number in content.values() if type(number) is int)


def _of_library(content: Mapping[str, object]) -> Iterator[int]:
    """Yield the ids in a tokenizer.json: of its vocabulary, a mapping or a list, and of its added tokens."""
    model, added = content.get("model"), content.get("added_tokens")
    vocabulary = model.get("vocab") if isinstance(model, Mapping) else None
    if isinstance(vocabulary, Mapping):
        yield from (number for number in vocabulary.values() if type(number) is int)
    elif isinstance(vocabulary, list):
        yield len(vocabulary) - 1
    for token in added if isinstance(added, list) else ():
        number = token.get("id") if isinstance(token, Mapping) else None
        if type(number) is int:
            yield number
