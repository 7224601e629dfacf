"""How large the small files of a model may be, by what they are, and how many values they may hold.

A value of three characters, `{},`, is an object of 72 bytes, and transformers copies some files several times. So
both are looked at in the bytes, before anything is made of them. Published files are below a tenth of these limits,
apart from those of tokenizers with tens of thousands of added tokens, which are below a half.
"""

from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

from qlora_cli.files import TEXT_SEPARATORS, FileLimit
from qlora_cli.units import MIB

# Of safetensors, whose own bound the bytes are.
HEADER = FileLimit(most_bytes=100_000_000, most_values=2_000_000)
_OTHER_JSON = FileLimit(most_bytes=4 * MIB, most_values=200_000)
_VOCABULARY = FileLimit(most_bytes=64 * MIB, most_values=6_000_000)
_TOKENS = FileLimit(most_bytes=32 * MIB, most_values=1_000_000)  # six values for each that was added
_LINES = FileLimit(most_bytes=32 * MIB, most_values=4_000_000, separators=TEXT_SEPARATORS)
# By the first pattern that a name matches.
_LIMITS = {
    "tokenizer_config.json": _TOKENS,
    "special_tokens_map.json": _TOKENS,
    "added_tokens.json": _TOKENS,
    "tokenizer*.json": _VOCABULARY,
    "vocab.json": _VOCABULARY,
    "tekken.json": _VOCABULARY,
    "*.index.json": FileLimit(most_bytes=64 * MIB, most_values=2_000_000),
    "*.json": _OTHER_JSON,
    "merges.txt": _LINES,
    "vocab.txt": _LINES,
    "*.model": FileLimit(
        most_bytes=64 * MIB, most_values=64 * MIB
    ),  # of sentencepiece, whose values no byte separates
}
# What transformers and PEFT read besides those named above.
_READ_BY_OTHERS = ("config*.json", "*_config.json", "chat_template.json", "model.*.json", "pytorch_model.*.json")


def read_limited(path: Path) -> bytes:
    """Return the content of a small file of a model, if it is within the limits of its kind.

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
    """Return the limit of a file by its name; None if it is of no kind that has one."""
    return next((limit for pattern, limit in _LIMITS.items() if fnmatch(name, pattern)), None)


def limited_files(directory: Path) -> Iterator[str]:
    """Yield the names of the files in `directory` that transformers or PEFT may read and that have a limit."""
    patterns = [pattern for pattern in _LIMITS if pattern != "*.json"] + list(_READ_BY_OTHERS)
    for path in sorted(directory.iterdir()):
        if any(fnmatch(path.name, pattern) for pattern in patterns) and path.is_file():
            yield path.name
