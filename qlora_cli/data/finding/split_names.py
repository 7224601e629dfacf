"""Identify the split of a file by its name and the names of the folders above it.

The keywords are those of `datasets`, and must stand alone in a name, between separators.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import NamedTuple

TRAIN, VALIDATION, TEST = "train", "validation", "test"
SPLIT_WORDS: Mapping[str, Sequence[str]] = {
    TRAIN: ("train", "training"),
    VALIDATION: ("validation", "valid", "dev", "val"),
    TEST: ("test", "testing", "eval", "evaluation"),
}
SEPARATORS = "-._ 0-9"
SPLIT_OF_WORD: Mapping[str, str] = {word: split for split, words in SPLIT_WORDS.items() for word in words}
# Suffixes of a keyword within a word, as in `trainset`; `test_data` is two words.
SUFFIXES = ("set", "sets", "data", "dataset", "split", "file", "files", "rows", "examples", "samples", "corpus")
_KEYWORDS = f"(?:{'|'.join(SPLIT_OF_WORD)})"
_CAPITALIZED = f"(?:{'|'.join(word.capitalize() for word in SPLIT_OF_WORD)})"
WORD = re.compile(
    rf"(?<![^{SEPARATORS}])(?i:({_KEYWORDS})(?:{'|'.join(SUFFIXES)})?)(?![^{SEPARATORS}])"
    rf"|(?<![^{SEPARATORS}])({_KEYWORDS})(?=[A-Z])|(?<=[a-z0-9])({_CAPITALIZED})(?![a-z])"  # trainRows, squadDev
)
# One file of several: train-00000-of-00012.parquet, train-00000-of-00012-a1b2c3.parquet.
SHARD = re.compile(r"(?s)(?P<prefix>.+?)-(?P<index>[0-9]{5})-of-(?P<num_shards>[0-9]{5})(?P<suffix>[-.].*)")
# A split name, as `datasets` defines it.
SPLIT = re.compile(r"\w+(\.\w+)*")


class Shard(NamedTuple):
    """The parts of a shard's file name: `PREFIX-INDEX-of-NUM_SHARDSSUFFIX`; the index counts from 0."""

    prefix: str
    shard_index: int
    num_shards: int
    suffix: str


def shard_of(name: str) -> Shard | None:
    """Return the parts of a shard's name; None if `name` is not that of a shard."""
    match = SHARD.fullmatch(name)
    return Shard(match["prefix"], int(match["index"]), int(match["num_shards"]), match["suffix"]) if match else None


def splits_in_name(name: str) -> frozenset[str]:
    """Return the splits whose keywords `name` contains: train, validation or test."""
    return frozenset(SPLIT_OF_WORD[str(match[match.lastindex or 0]).lower()] for match in WORD.finditer(name))


def splits_in_path(path: PurePath) -> frozenset[str]:
    """Return the splits that the folders of a relative path are named after, or else those in the file's name."""
    folders = frozenset(split for folder in path.parts[:-1] for split in splits_in_name(folder))
    if folders:
        return folders
    shard = shard_of(path.name)
    splits = splits_in_name(shard.prefix if shard else path.name)
    return frozenset((shard.prefix,)) if shard and len(splits) == 1 and SPLIT.fullmatch(shard.prefix) else splits


def split_of_shard(path: PurePath) -> str | None:
    """Return the split that a shard is named after without a keyword: `unsupervised-00000-of-00001.parquet`."""
    shard = shard_of(path.name)
    return shard.prefix if shard and SPLIT.fullmatch(shard.prefix) else None


def matching_splits(splits: Iterable[str], requested: str) -> list[str]:
    """Return the `splits` that match `requested`: that name itself, or else those of the same keyword, such as dev."""
    if requested in (names := list(splits)):
        return [requested]
    kind = SPLIT_OF_WORD.get(requested)
    return [split for split in names if kind is not None and splits_in_name(split) == {kind}]
