"""Limits on the size of a model's small files and on the number of their values, by kind of file.

A value of three characters, `{},`, becomes an object of 72 bytes, and transformers copies some files several times.
So both limits are checked on the bytes, before they are parsed. Published files stay below a tenth of these limits;
those of tokenizers with tens of thousands of added tokens stay below half.
"""

from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

from qlora_cli.files import TEXT_SEPARATORS, FileLimit
from qlora_cli.units import MIB

# Of safetensors, whose own limit the bytes are.
HEADER = FileLimit(max_bytes=100_000_000, max_values=2_000_000)
_OTHER_JSON = FileLimit(max_bytes=4 * MIB, max_values=200_000)
_VOCABULARY = FileLimit(max_bytes=64 * MIB, max_values=6_000_000)
_TOKENS = FileLimit(max_bytes=32 * MIB, max_values=1_000_000)  # six values for each added token
_LINES = FileLimit(max_bytes=32 * MIB, max_values=4_000_000, separators=TEXT_SEPARATORS)
# By the first pattern that a name matches.
_LIMITS = {
    "tokenizer_config.json": _TOKENS,
    "special_tokens_map.json": _TOKENS,
    "added_tokens.json": _TOKENS,
    "tokenizer*.json": _VOCABULARY,
    "vocab.json": _VOCABULARY,
    "tekken.json": _VOCABULARY,
    "*.index.json": FileLimit(max_bytes=64 * MIB, max_values=2_000_000),
    "*.json": _OTHER_JSON,
    "merges.txt": _LINES,
    "vocab.txt": _LINES,
    "*.model": FileLimit(max_bytes=64 * MIB, max_values=64 * MIB),  # of sentencepiece, whose values no byte separates
}
# Further files that transformers and PEFT read.
_READ_BY_OTHERS = ("config*.json", "*_config.json", "chat_template.json", "model.*.json", "pytorch_model.*.json")


def read_limited(path: Path) -> bytes:
    """Return the content of a small file of a model, which must be within the limits of its kind.

    Raises:
        OSError: it can't be read.
        ValueError: it is larger, or holds more values; says the limit.
    """
    limit = limit_of(path.name)
    if limit is None:
        return path.read_bytes()
    limit.check_size(path.stat().st_size)
    content = path.read_bytes()
    limit.check(content)
    return content


def limit_of(name: str) -> FileLimit | None:
    """Return the limit of a file by its name; None if its kind has none."""
    return next((limit for pattern, limit in _LIMITS.items() if fnmatch(name, pattern)), None)


def limited_files(directory: Path) -> Iterator[str]:
    """Yield the names of the files in `directory` that transformers or PEFT may read and that have a limit."""
    patterns = [pattern for pattern in _LIMITS if pattern != "*.json"] + list(_READ_BY_OTHERS)
    for path in sorted(directory.iterdir()):
        if any(fnmatch(path.name, pattern) for pattern in patterns) and path.is_file():
            yield path.name
