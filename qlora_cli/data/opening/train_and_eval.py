"""Which data sets are trained and which held out, and what is said of that choice before a row is read."""

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from qlora_cli.data.finding.directories import Directory, of_files
from qlora_cli.data.finding.file_types import printable, suffixes_of
from qlora_cli.data.finding.sources import DatasetSource, find_dataset, find_split
from qlora_cli.data.finding.split_names import TEST, shard_of, splits_told
from qlora_cli.data.limits import listed
from qlora_cli.data.reading.separators import said_separator
from qlora_cli.settings.models import DataSettings
from qlora_cli.settings.values import held_out_share

EVAL_SPLIT, TABLES = TEST, (".csv", ".tsv")


def trained_sources(settings: DataSettings) -> list[DatasetSource]:
    """Return the data sets to train on.

    Raises:
        DatasetNotFoundError: one is not there.
        DataError: one can't be read, or does not have the split.
    """
    return [find_dataset(name, settings.split) for name in settings.dataset]


def held_out_sources(settings: DataSettings) -> list[DatasetSource]:
    """Return the data sets to evaluate on, or another split of those that are trained; none for a share of them.

    Raises:
        DatasetNotFoundError: one is not there.
        DataError: one can't be read, or does not have the split.
    """
    if settings.eval_dataset is not None:
        return [find_dataset(name, eval_split(settings)) for name in settings.eval_dataset]
    if settings.eval_split is None or held_out_share(settings.eval_split) is not None:
        return []
    return [find_split(name, settings.eval_split) for name in settings.dataset]


def eval_split(settings: DataSettings) -> str:
    """Return the split of held-out data sets that is read, where they have any."""
    is_named = settings.eval_split is not None and held_out_share(settings.eval_split) is None
    return str(settings.eval_split) if is_named else EVAL_SPLIT


def trained_and_held_out(
    trained: Sequence[DatasetSource], held_out: Sequence[DatasetSource], settings: DataSettings
) -> DatasetSource | None:
    """Return the first data set of which all would be held out, as what is evaluated is the same; None without one."""
    whole = [source for source in held_out if source.num_rows is None]
    files = {path.resolve() for source in whole for path in source.files}
    of_hub = {_on_hub(source, eval_split(settings)) for source in whole if not source.is_local}
    for source in trained:
        if source.is_local and all(path.resolve() in files for path in source.files):
            return source
        if not source.is_local and _on_hub(source, settings.split) in of_hub:
            return source
    return None


def _on_hub(source: DatasetSource, split: str) -> tuple[str | None, ...]:
    return source.repository, source.revision, source.config, source.split or split


def notes_on(trained: Sequence[DatasetSource], held_out: Sequence[DatasetSource]) -> tuple[str, ...]:
    """Return what to know of data sets by their names: what of them is left aside, or mixed."""
    both = [*trained, *held_out]
    read = {path for source in both for path in source.files}
    directories = dict.fromkeys(source.directory for source in both if source.directory is not None)
    by_name = [path for source in trained if source.directory is None for path in source.files]
    # Absolute as they are written: a link to a file is called as its user called it.
    top = Path(os.path.commonpath([path.absolute().parent for path in by_name] or [Path()]))
    mixed = [(source.directory.path, source.files) for source in trained if source.directory is not None]
    notes = [
        *(_of_directory(directory, read) for directory in directories),
        *(_of_several_splits(top, files) for top, files in [(top, by_name), *mixed]),
    ]
    return (*(note for note in notes if note), *_missing_shards(read), *_separators(read))


def _of_directory(directory: Directory, read: set[Path]) -> str | None:
    """Say which splits of a directory are read, and which and what else are not."""
    chosen = [split for split in directory.splits if read.intersection(split.files)]
    aside = [split.describe() for split in directory.splits if split.files and split not in chosen]
    for what, files in (("of unclear splits", directory.unclear), ("of no split or about others", directory.others)):
        aside += [f"{of_files(files)} ({what})"] if files else []
    aside += [f"config {name}" for name in directory.configs]
    if not aside:
        return None
    what = " and ".join(split.describe() for split in chosen) or of_files(directory.files)
    return f"{printable(directory.path)}: reading {what}; left aside: {listed(aside)}"


def _of_several_splits(top: Path, files: Sequence[Path]) -> str | None:
    """Say that files which were named, or found by a pattern, are called as of several splits."""
    splits: dict[str, list[Path]] = {}
    for path in files if len(files) > 1 else ():
        for split in splits_told(path.absolute().relative_to(top.absolute())):
            splits.setdefault(split, []).append(path)
    if len(splits) < 2:
        return None
    found = ", ".join(f"{split} ({of_files(paths)})" for split, paths in sorted(splits.items()))
    return f"files that are called as of several splits are all trained: {found}"


def _missing_shards(files: Iterable[Path]) -> Iterator[str]:
    """Say of which data sets in several files some are not on this disk."""
    shards = {(path.parent, shard.prefix, shard.number) for path in files if (shard := shard_of(path.name))}
    for folder, prefix, number in sorted(shards):
        beside = [shard for path in folder.iterdir() if (shard := shard_of(path.name))]
        here = {shard.place for shard in beside if (shard.prefix, shard.number) == (prefix, number)}
        if missing := sorted(set(range(number)) - here):
            name = f"{prefix}-{missing[0]:05d}-of-{number:05d}"
            yield f"{printable(folder)}: {len(missing):,} of {number:,} files are missing, {name} for one"


def _separators(files: Iterable[Path]) -> Iterator[str]:
    """Say which tables have another separator than their suffix says."""
    found: dict[str, list[Path]] = {}
    for path in sorted(files):
        if (suffixes_of(path) or ("",))[0] in TABLES and (said := said_separator(path)):
            found.setdefault(said, []).append(path)
    for said, paths in found.items():
        others = f" and {len(paths) - 1:,} others" if len(paths) > 1 else ""
        yield f"{printable(paths[0])}{others}: fields are{said}"
