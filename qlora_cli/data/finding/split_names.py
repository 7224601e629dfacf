"""Which split a file is of, by its name and those of the folders above it.

The words are those that `datasets` goes by, and stand alone in a name: between characters that belong to no word.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import NamedTuple

TRAIN, VALIDATION, TEST = "train", "validation", "test"
WORDS: Mapping[str, Sequence[str]] = {
    TRAIN: ("train", "training"),
    VALIDATION: ("validation", "valid", "dev", "val"),
    TEST: ("test", "testing", "eval", "evaluation"),
}
NO_WORD = "-._ 0-9"
SPLIT_OF_WORD: Mapping[str, str] = {word: split for split, words in WORDS.items() for word in words}
WORD = re.compile(rf"(?<![^{NO_WORD}])(?:{'|'.join(SPLIT_OF_WORD)})(?![^{NO_WORD}])", re.IGNORECASE)
# One file of several: train-00000-of-00012.parquet, train-00000-of-00012-a1b2c3.parquet.
SHARD = re.compile(r"(?s)(?P<prefix>.+?)-(?P<place>[0-9]{5})-of-(?P<number>[0-9]{5})(?P<rest>[-.].*)")
# What `datasets` takes for the name of a split.
SPLIT = re.compile(r"\w+(\.\w+)*")


class Shard(NamedTuple):
    """Which file of how many one is, from 0, and what they share: the name before the number, and behind it."""

    prefix: str
    place: int
    number: int
    rest: str


def shard_of(name: str) -> Shard | None:
    """Return which shard a file is by its name; None if it is none."""
    found = SHARD.fullmatch(name)
    return Shard(found["prefix"], int(found["place"]), int(found["number"]), found["rest"]) if found else None


def words_in(name: str) -> frozenset[str]:
    """Return the splits of which `name` has a word: train, validation or test."""
    return frozenset(SPLIT_OF_WORD[word.lower()] for word in WORD.findall(name))


def splits_told(path: PurePath) -> frozenset[str]:
    """Return the splits that the folders of a relative path tell of; if they tell of none, the name of the file."""
    folders = frozenset(split for folder in path.parts[:-1] for split in words_in(folder))
    if folders:
        return folders
    shard = shard_of(path.name)
    told = words_in(shard.prefix if shard else path.name)
    return frozenset((shard.prefix,)) if shard and len(told) == 1 and SPLIT.fullmatch(shard.prefix) else told


def split_of_prefix(path: PurePath) -> str | None:
    """Return the name of the split that a shard has in the place of a word: `unsupervised-00000-of-00001.parquet`."""
    shard = shard_of(path.name)
    return shard.prefix if shard and SPLIT.fullmatch(shard.prefix) else None


def named(splits: Iterable[str], asked: str) -> list[str]:
    """Return which of `splits` are meant by `asked`: that one, or those of its kind if it is a word such as dev."""
    if asked in (found := list(splits)):
        return [asked]
    kind = SPLIT_OF_WORD.get(asked)
    return [split for split in found if kind is not None and words_in(split) == {kind}]
