"""Find the data sets to train and to evaluate on, and note what of them is not read or mixed."""

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from qlora_cli.data.finding.directories import DataDirectory, describe_files, describe_folder
from qlora_cli.data.finding.file_types import printable, suffixes_of
from qlora_cli.data.finding.sources import DatasetSource, find_dataset, find_split
from qlora_cli.data.finding.split_names import TEST, shard_of, splits_in_path
from qlora_cli.data.limits import join_names
from qlora_cli.data.reading.separators import separator_note
from qlora_cli.settings.models import DataSettings
from qlora_cli.settings.values import held_out_share

EVAL_SPLIT, TABLES = TEST, (".csv", ".tsv")


def trained_sources(settings: DataSettings) -> list[DatasetSource]:
    """Return the data sets to train on.

    Raises:
        DatasetNotFoundError: one does not exist.
        DataError: one can't be read, or lacks the split.
    """
    return [find_dataset(name, settings.split) for name in settings.dataset]


def held_out_sources(settings: DataSettings) -> list[DatasetSource]:
    """Return the data sets to evaluate on, or the evaluation split of those to train on; none if a share is held out.

    Raises:
        DatasetNotFoundError: one does not exist.
        DataError: one can't be read, or lacks the split.
    """
    if settings.eval_dataset is not None:
        return [find_dataset(name, eval_split(settings)) for name in settings.eval_dataset]
    if settings.eval_split is None or held_out_share(settings.eval_split) is not None:
        return []
    return [find_split(name, settings.eval_split) for name in settings.dataset]


def eval_split(settings: DataSettings) -> str:
    """Return the split to read of held-out data sets that have splits."""
    is_named = settings.eval_split is not None and held_out_share(settings.eval_split) is None
    return str(settings.eval_split) if is_named else EVAL_SPLIT


def overlapping_source(
    trained: Sequence[DatasetSource], held_out: Sequence[DatasetSource], settings: DataSettings
) -> DatasetSource | None:
    """Return the first data set to train on whose rows are all held out too; None if there is none."""
    unsampled = [source for source in held_out if source.num_rows is None]
    files = {path.resolve() for source in unsampled for path in source.files}
    on_hub = {_on_hub(source, eval_split(settings)) for source in unsampled if not source.is_local}
    for source in trained:
        if source.is_local and all(path.resolve() in files for path in source.files):
            return source
        if not source.is_local and _on_hub(source, settings.split) in on_hub:
            return source
    return None


def _on_hub(source: DatasetSource, split: str) -> tuple[str | None, ...]:
    return source.repository, source.revision, source.config, source.split or split


def source_notes(trained: Sequence[DatasetSource], held_out: Sequence[DatasetSource]) -> tuple[str, ...]:
    """Return notes on the data sets: splits that are not read or are mixed, missing shards, unusual separators."""
    both = [*trained, *held_out]
    read = {path for source in both for path in source.files}
    directories = dict.fromkeys(source.directory for source in both if source.directory is not None)
    by_name = [path for source in trained if source.directory is None for path in source.files]
    # Not resolved: a link counts under the name that the user gave it.
    top = Path(os.path.commonpath([path.absolute().parent for path in by_name] or [Path()]))
    mixed = [(source.directory.path, source.files) for source in trained if source.directory is not None]
    notes = [
        *(_directory_note(directory, read) for directory in directories),
        *(_mixed_splits_note(top, files) for top, files in [(top, by_name), *mixed]),
    ]
    return (*(note for note in notes if note), *_missing_shard_notes(read), *_separator_notes(read))


def _directory_note(directory: DataDirectory, read: set[Path]) -> str | None:
    """Return a note on which splits of a directory are read, and which files are not; None if all are."""
    selected = [split for split in directory.splits if read.intersection(split.files)]
    skipped = [split.describe() for split in directory.splits if split.files and split not in selected]
    for description, files in (
        ("of ambiguous splits", directory.ambiguous),
        ("of no split, or metadata", directory.unassigned),
    ):
        skipped += [f"{describe_files(files)} ({description})"] if files else []
    skipped += map(describe_folder, directory.folders)
    skipped += [f"config {name}" for name in directory.other_configs]
    if not skipped:
        return None
    description = " and ".join(split.describe() for split in selected) or describe_files(directory.files)
    return f"{printable(directory.path)}: reading {description}; not read: {join_names(skipped)}"


def _mixed_splits_note(top: Path, files: Sequence[Path]) -> str | None:
    """Return a note if files that the user named are named after several splits."""
    splits: dict[str, list[Path]] = {}
    for path in files if len(files) > 1 else ():
        for split in splits_in_path(path.absolute().relative_to(top.absolute())):
            splits.setdefault(split, []).append(path)
    if len(splits) < 2:
        return None
    described = ", ".join(f"{split} ({describe_files(paths)})" for split, paths in sorted(splits.items()))
    return f"files named after several splits are all trained on: {described}"


def _missing_shard_notes(files: Iterable[Path]) -> Iterator[str]:
    """Yield a note for each sharded data set some of whose shards are missing."""
    shards = {(path.parent, shard.prefix, shard.num_shards) for path in files if (shard := shard_of(path.name))}
    for folder, prefix, num_shards in sorted(shards):
        present = [shard for path in folder.iterdir() if (shard := shard_of(path.name))]
        indices = {shard.shard_index for shard in present if (shard.prefix, shard.num_shards) == (prefix, num_shards)}
        if missing := sorted(set(range(num_shards)) - indices):
            name = f"{prefix}-{missing[0]:05d}-of-{num_shards:05d}"
            yield f"{printable(folder)}: {len(missing):,} of {num_shards:,} files are missing, {name} for one"


def _separator_notes(files: Iterable[Path]) -> Iterator[str]:
    """Yield a note for each separator that is not the one the files' suffix implies."""
    by_note: dict[str, list[Path]] = {}
    for path in sorted(files):
        if (suffixes_of(path) or ("",))[0] in TABLES and (note := separator_note(path)):
            by_note.setdefault(note, []).append(path)
    for note, paths in by_note.items():
        others = f" and {len(paths) - 1:,} others" if len(paths) > 1 else ""
        yield f"{printable(paths[0])}{others}: fields are{note}"
