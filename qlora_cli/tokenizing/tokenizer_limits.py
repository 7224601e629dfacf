"""Limits on what the files of a tokenizer may demand, checked before the library builds it.

A file of a few lines can make a text grow a billion times, name an id so large that counting up to it takes forever,
or process each text a million times. Real tokenizers are far below all of these limits.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qlora_cli.errors import ModelError
from qlora_cli.model_files.checkpoint import check_small_files, how_to_restore, read_json

MOST_IDS = 2**24  # vocabularies have up to some 300,000
MOST_PARTS = 100  # normalizers, splits, decoders and the like; about ten are common
MOST_LISTED = 10_000  # in a list within one of them
LONGEST_TEXT = 10_000  # of a pattern or a replacement; the longest patterns in use have 1,000 characters
MOST_GROWTH = 64  # of a text by replacements; <newline> for \n is 9
STEPS = ("normalizer", "pre_tokenizer", "post_processor", "decoder", "padding")
TABLE = "precompiled_charsmap"  # the only long string there


def check_tokenizer_files(directory: Path) -> None:
    """Check what the files of a tokenizer in `directory` demand.

    Raises:
        ModelError: one can't be read, or demands more than any tokenizer needs.
    """
    check_small_files(directory)
    for name in ("tokenizer.json", "vocab.json"):
        path = directory / name
        if path.is_file():
            content = read_json(path)
            problem = next(_problems(content) if name == "tokenizer.json" else _problems_of_ids(content), None)
            if problem is not None:
                raise ModelError(f"{path} is not a usable tokenizer: {problem}", hint=how_to_restore(directory, name))


def _problems(content: Mapping[str, Any]) -> Iterator[str]:
    model = content.get("model")
    if isinstance(model, Mapping) and isinstance(model.get("vocab"), Mapping):
        yield from _problems_of_ids(model["vocab"])
    added = content.get("added_tokens")
    for token in added if isinstance(added, list) else ():
        if isinstance(token, Mapping):
            yield from _problems_of_ids({str(token.get("content")): token.get("id")})
    for step in STEPS:
        yield from _problems_of_step(step, content.get(step))
    growth = _growth(content.get("normalizer")) * _growth(content.get("pre_tokenizer"))
    if max(growth, _growth(content.get("decoder"))) > MOST_GROWTH:
        yield f"a character of a text may become more than {MOST_GROWTH} by what it is replaced with"
    if (times := _times_repeated(content.get("post_processor"))) > MOST_GROWTH:
        yield f"post_processor repeats a text {times:,} times, more than {MOST_GROWTH}"


def _problems_of_ids(vocabulary: Mapping[str, Any]) -> Iterator[str]:
    for token, number in vocabulary.items():
        if isinstance(number, int) and not 0 <= number < MOST_IDS:
            yield f"the id of {token[:40]!r} is {number}; ids go from 0 to {MOST_IDS - 1:,}"


def _problems_of_step(step: str, content: object) -> Iterator[str]:
    num_parts = 0
    for key, value in _values_in(content):
        if isinstance(value, Mapping):
            num_parts += "type" in value
        elif isinstance(value, list) and len(value) > MOST_LISTED:
            yield f"{step} lists {len(value):,} values under {key}, more than {MOST_LISTED:,}"
        elif isinstance(value, str) and key != TABLE and len(value) > LONGEST_TEXT:
            yield f"{step} has a {key} of {len(value):,} characters, more than {LONGEST_TEXT:,}"
        elif isinstance(value, int) and not -MOST_IDS < value < MOST_IDS:
            yield f"{step} has a {key} of {value}, more than {MOST_IDS:,}"
    if num_parts > MOST_PARTS:
        yield f"{step} has {num_parts:,} parts, more than {MOST_PARTS}"


def _values_in(content: object) -> Iterator[tuple[str, object]]:
    """Yield every value within a step, with its own key or the key of the list that it is in."""
    left = [("type", content)]
    while left:
        key, value = left.pop()
        yield key, value
        if isinstance(value, Mapping):
            left += value.items()
        elif isinstance(value, list):
            left += [(key, part) for part in value]


def _parts_in_order(content: object) -> Iterator[Mapping[str, Any]]:
    """Yield the parts of a step in the order in which they are applied."""
    left = [content]
    while left:
        value = left.pop()
        if isinstance(value, Mapping):
            yield value
            left += [part for part in reversed(list(value.values())) if isinstance(part, list | Mapping)]
        elif isinstance(value, list):
            left += reversed(value)


def _growth(content: object) -> int:
    """Return the largest number of characters that a step may turn one character into.

    From the last part to the first: `lengths` (by character) and `rest` (of all others) count the characters that
    one becomes from there on.
    """
    lengths: dict[str, int] = {}
    rest = 1
    for part in reversed(list(_parts_in_order(content))):
        if part.get("type") == "ByteLevel":  # two characters for each non-ASCII one
            lengths, rest = {key: 2 * length for key, length in lengths.items()}, 2 * rest
        if part.get("type") != "Replace" or not isinstance(part.get("content"), str):
            continue
        pattern, length = part.get("pattern"), sum(lengths.get(each, rest) for each in part["content"])
        replaced = pattern.get("String") if isinstance(pattern, Mapping) else None
        if isinstance(replaced, str) and len(replaced) == 1:
            lengths[replaced] = length
        else:  # the pattern may match any character
            lengths, rest = {key: max(before, length) for key, before in lengths.items()}, max(rest, length)
    return max(rest, *lengths.values()) if lengths else rest


def _times_repeated(content: object) -> int:
    """Return how many times the templates of a step repeat a text."""
    times = 1
    for part in _parts_in_order(content):
        if part.get("type") == "TemplateProcessing":
            template = [part.get("single"), part.get("pair")]
            times *= max(1, sum("Sequence" in each for each in _parts_in_order(template)))
    return times
