"""Which rows are evaluated: those that were named, or those that a run held out, read by the code that trained it."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import JsonValue, ValidationError

from qlora_cli.data.encode import TextTokenizer
from qlora_cli.data.prepare import EVAL_SPLIT, PreparedData, prepare_data
from qlora_cli.data.sources import check_dataset_name, find_dataset, first_local
from qlora_cli.errors import DataError, DatasetNotFoundError, ModelError, QloraError
from qlora_cli.evaluating.preflight import names_rows
from qlora_cli.model_files.source import ModelSource
from qlora_cli.runs.directory import RunDirectory
from qlora_cli.runs.record import RunRecord
from qlora_cli.settings.models import DataSettings, EvaluateSettings
from qlora_cli.settings.resolve import Resolved
from qlora_cli.settings.settle import given_values

NAME_THEM = "Name the rows to evaluate with --dataset."


@dataclass(frozen=True, kw_only=True)
class TrainedRows:
    """What a run says of the rows that it was trained on and evaluated on; data sets are named by where they are."""

    path: Path
    record: RunRecord
    settings: Mapping[str, Any]
    seed: int
    train_fingerprint: str | None
    eval_fingerprint: str | None


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Rows to evaluate. `is_training_data`: known to be what the run was trained on; `notes` say what is off."""

    data: PreparedData
    is_training_data: bool
    notes: tuple[str, ...]


def trained_rows(source: ModelSource) -> TrainedRows | None:
    """Return what the run that was named says of its rows, if one was.

    Raises:
        ModelError: it does not say how its data was read.
    """
    run, record = source.run, source.record
    if run is None or record is None:
        return None
    how = "how the data of the run was read"
    settings = record.settings_of("data", how)
    if record.seed is None:
        raise record.lacks(how, "seed")
    if record.data.train is None:
        raise record.lacks(how, "data.train")
    named = {key: _located(settings[key], record) for key in ("dataset", "eval_dataset") if key in settings}
    return TrainedRows(
        path=run,
        record=record,
        settings={**settings, **named},
        seed=record.seed,
        train_fingerprint=record.data.train.fingerprint,
        eval_fingerprint=None if record.data.eval is None else record.data.eval.fingerprint,
    )


def _located(names: JsonValue, record: RunRecord) -> JsonValue:
    """Return names of data sets as they are found from here: relative ones were given in another directory."""
    if not isinstance(names, list):
        return names
    return [first_local(map(str, record.places_of(str(name)))) or str(name) for name in names]


def _check_there(names: Any, run: TrainedRows) -> None:
    """Check that the data that a run names is there.

    Raises:
        DatasetNotFoundError: it is at none of the places that it may be at.
    """
    for name in names:
        if isinstance(wrong := check_dataset_name(name), DatasetNotFoundError):
            places = [str(place) for place in run.record.places_of(name)]
            looked = ", ".join(dict.fromkeys([*places, os.path.abspath(name)]))  # noqa: PTH100 - it may be a glob
            raise DatasetNotFoundError(
                f"the data of the run {run.path} is {name}, which is not there any more (looked for {looked})",
                hint=f"Put it back. {NAME_THEM}",
            ) from wrong


def data_settings(
    resolved: Resolved[EvaluateSettings], run: TrainedRows | None, split: str | None
) -> DataSettings | None:
    """Return how rows are read, and which: as asked for, else as the run was trained, else as training would.

    None if neither were rows named nor did the run hold any out.

    Raises:
        ModelError: the run's settings can't be read.
        DatasetNotFoundError: the run's data is gone.
    """
    asked = resolved.settings.data
    values = {**(run.settings if run is not None else {}), **given_values(asked), "packing": False}
    if names_rows(resolved):
        values |= _alone(values["dataset"], split)
    elif values.get("eval_dataset") is not None:
        values |= _alone(values["eval_dataset"], values.get("eval_split"))
    elif values.get("eval_split") is None or values.get("dataset") is None:
        return None
    if run is not None and values["dataset"] in (run.settings.get("dataset"), run.settings.get("eval_dataset")):
        _check_there(values["dataset"], run)
    try:
        return DataSettings.model_validate(values)
    except ValidationError as error:
        where = RunDirectory(run.path).run_file if run is not None else "data"
        raise ModelError(
            f"the data settings in {where} can't be read: {error.errors()[0]['msg']}",
            hint="Was it written by a newer qlora?",
        ) from error


def read_rows(
    settings: DataSettings, run: TrainedRows | None, text: TextTokenizer, *, seed: int, are_named: bool
) -> HeldOut:
    """Read and tokenize the rows that `settings` name, or hold out of what they name.

    Raises:
        DatasetNotFoundError: no such data set.
        DataError: what `prepare_data` raises; or the rows that a run held out can't be told any more.
    """
    found = prepare_data(settings, text, seed=seed)
    data = found.evaluation or found.train
    if run is None:
        return HeldOut(data=data, is_training_data=False, notes=())
    if are_named:
        is_same = data.report.fingerprint == run.train_fingerprint or _shares_files(settings, run)
        note = f"{run.path.name} was trained on {data.report.name}: a low loss on it says nothing about other rows"
        return HeldOut(data=data, is_training_data=is_same, notes=(note,) if is_same else ())
    if data.report.fingerprint == run.eval_fingerprint:
        return HeldOut(data=data, is_training_data=False, notes=())
    changed = f"the held-out rows are not those of {run.path}: data, settings or tokenizer are others than then"
    if found.evaluation is not None:  # drawn from the data that is trained, so that others may have been trained
        raise DataError(changed, hint=f"Leave out what was changed, or name them. {NAME_THEM}")
    return HeldOut(data=data, is_training_data=False, notes=(changed,))


def nothing_held_out(model: str, run: TrainedRows | None) -> DataError:
    """Return the error of an evaluation whose rows are not known."""
    if run is not None:
        return DataError(f"{run.path} held no rows out: it was trained without --eval-dataset", hint=NAME_THEM)
    return DataError(f"{model} is no run, so that its rows to evaluate are not known", hint=NAME_THEM)


def _alone(names: Any, split: str | None) -> dict[str, Any]:
    """Return the settings by which nothing is read but `names`, all of it."""
    whole = {"eval_dataset": None, "eval_split": None, "streaming": False}
    return {"dataset": names, "split": split or EVAL_SPLIT, **whole}


def _shares_files(settings: DataSettings, run: TrainedRows) -> bool:
    """Whether a file is read that the run was trained on."""
    trained: set[Path] = set()
    for name in run.settings.get("dataset") or ():
        try:
            trained |= {path.resolve() for path in find_dataset(name).files}
        except QloraError:  # moved or deleted since: it can't be one that is read now
            continue
    return any(path.resolve() in trained for name in settings.dataset for path in find_dataset(name).files)
