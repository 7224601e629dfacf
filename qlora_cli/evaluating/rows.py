"""Choose the rows to evaluate, named ones or those that a run held out, and read them by the code of training."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from qlora_cli.data.feeding.prepare import PreparedData, prepare_data
from qlora_cli.data.finding.sources import check_dataset_name, find_dataset, first_local
from qlora_cli.data.finding.split_names import TRAIN
from qlora_cli.data.opening.train_and_eval import EVAL_SPLIT, trained_sources
from qlora_cli.data.tokenizing.encode import TextTokenizer
from qlora_cli.errors import DataError, DatasetNotFoundError, QloraError
from qlora_cli.evaluating.answer_losses import OF_COMPARISON
from qlora_cli.evaluating.evaluation_checks import names_rows
from qlora_cli.model_files.source import ModelSource
from qlora_cli.runs.directory import RunDirectory
from qlora_cli.runs.record import RunRecord
from qlora_cli.settings.choices import Mixing
from qlora_cli.settings.models import DataSettings, EvaluateSettings
from qlora_cli.settings.resolve import Resolved
from qlora_cli.settings.settle import InferredSettings, by_path, inferred_origin

NAME_THEM = "Name the rows to evaluate with --dataset."


@dataclass(frozen=True, kw_only=True)
class TrainedRows:
    """The record of a run's training and evaluation rows; data sets are named by their current paths."""

    path: Path
    record: RunRecord
    settings: Mapping[str, Any]
    seed: int
    train_fingerprint: str | None
    eval_fingerprint: str | None

    @property
    def comparison(self) -> Mapping[str, Any]:
        """The settings of training by which the answers of a row are compared."""
        recorded = self.record.settings.get("training", {})
        return {key: recorded[key] for key in OF_COMPARISON if key in recorded}

    @property
    def longest_tokens(self) -> int:
        """The tokens of the longest row that was trained; 0 if it is not known."""
        trained = self.record.data.train
        return (None if trained is None else trained.integer("longest_row_tokens")) or 0


@dataclass(frozen=True, kw_only=True)
class HeldOutRows:
    """Rows to evaluate. `is_training_data` is set if the run is known to be trained on them; `notes` are warnings."""

    data: PreparedData
    is_training_data: bool
    notes: tuple[str, ...]


def trained_rows(source: ModelSource) -> TrainedRows | None:
    """Return the record of the rows of the named run, if any.

    Raises:
        ModelError: the record does not say how its data was read.
    """
    run, record = source.run, source.record
    if run is None or record is None:
        return None
    how = "how the data of the run was read"
    known = DataSettings.model_fields.keys()  # others are of another version
    settings: dict[str, Any] = {k: value for k, value in record.settings_of("data", how).items() if k in known}
    if record.seed is None:
        raise record.missing_error(how, "seed")
    if record.data.train is None:
        raise record.missing_error(how, "data.train")
    for key in ("dataset", "eval_dataset"):
        if key in settings:
            settings[key] = _located(settings[key], record)
    return TrainedRows(
        path=run,
        record=record,
        settings=settings,
        seed=record.seed,
        train_fingerprint=record.data.train.fingerprint,
        eval_fingerprint=None if record.data.eval is None else record.data.eval.fingerprint,
    )


def _located(names: JsonValue, record: RunRecord) -> JsonValue:
    """Return names of data sets as valid in the working directory: relative ones were given in another one."""
    if not isinstance(names, list):
        return names
    return [first_local(map(str, record.candidate_paths(str(name)))) or str(name) for name in names]


def _check_there(names: Any, run: TrainedRows) -> None:
    """Check that the data that a run names exists.

    Raises:
        DatasetNotFoundError: it is at none of its possible paths.
    """
    for name in names:
        if isinstance(wrong := check_dataset_name(name), DatasetNotFoundError):
            places = [str(place) for place in run.record.candidate_paths(name)]
            looked = ", ".join(dict.fromkeys([*places, os.path.abspath(name)]))  # noqa: PTH100 - it may be a glob
            raise DatasetNotFoundError(
                f"the data of the run {run.path} is {name}, which is not there any more (looked for {looked})",
                hint=f"Put it back. {NAME_THEM}",
            ) from wrong


def has_rows(asked: Resolved[EvaluateSettings], run: TrainedRows | None) -> bool:
    """Return whether the rows to evaluate are known: they were named, or held out of training."""
    data = _data_of(asked, run)
    holds_out = data.get("eval_split") is not None and data.get("dataset") is not None
    return names_rows(asked) or data.get("eval_dataset") is not None or holds_out


def inferred_from_rows(asked: Resolved[EvaluateSettings], run: TrainedRows | None) -> list[InferredSettings]:
    """Return the inferred settings for reading the rows: those of the run, without packing."""
    data = _data_of(asked, run)
    here: dict[str, object] = {"packing": False}
    if names_rows(asked):
        here |= _alone(data["dataset"], asked.settings.evaluate.split)
    elif data.get("eval_dataset") is not None:
        here |= _alone(data["eval_dataset"], data.get("eval_split"))
    facts = [
        InferredSettings(values=by_path("data", here), origin=inferred_origin("what is evaluated"), is_fixed=True)
    ]
    if run is not None:
        training = {**run.comparison, "seed": run.seed}
        of_run = {**by_path("data", run.settings), **by_path("training", training)}
        facts.append(InferredSettings(values=of_run, origin=inferred_origin(RunDirectory(run.path).run_file)))
    return facts


def _data_of(asked: Resolved[EvaluateSettings], run: TrainedRows | None) -> dict[str, Any]:
    return {**(run.settings if run is not None else {}), **asked.given("data")}


def read_rows(
    settings: DataSettings, run: TrainedRows | None, text: TextTokenizer, *, seed: int, are_named: bool
) -> HeldOutRows:
    """Read and tokenize the rows that the settled `settings` name, or hold out.

    Raises:
        DatasetNotFoundError: no such data set.
        DataError: what `prepare_data` raises; or the rows that a run held out can't be identified any more.
    """
    if run is not None and list(settings.dataset) in (run.settings.get("dataset"), run.settings.get("eval_dataset")):
        _check_there(settings.dataset, run)
    prepared = prepare_data(settings, text, seed=seed)
    data = prepared.evaluation or prepared.train
    if run is None:
        return HeldOutRows(data=data, is_training_data=False, notes=())
    if are_named:
        is_same = data.report.fingerprint == run.train_fingerprint or _shares_files(settings, run)
        return HeldOutRows(data=data, is_training_data=is_same, notes=(_of_trained(data, run),) if is_same else ())
    if data.report.fingerprint == run.eval_fingerprint:
        return HeldOutRows(data=data, is_training_data=False, notes=())
    changed = f"the held-out rows are not those of {run.path}: data, settings or tokenizer are others than then"
    if prepared.evaluation is not None:  # drawn from the data that is trained, so that others may have been trained
        raise DataError(changed, hint=f"Leave out what was changed, or name them. {NAME_THEM}")
    is_trained = data.report.fingerprint == run.train_fingerprint or _shares_files(settings, run)
    return HeldOutRows(
        data=data, is_training_data=is_trained, notes=(changed, *((_of_trained(data, run),) * is_trained))
    )


def _of_trained(data: PreparedData, run: TrainedRows) -> str:
    return f"{run.path.name} was trained on {data.report.name}: a low loss on it says nothing about other rows"


def nothing_held_out(model: str, run: TrainedRows | None) -> DataError:
    """Return the error for an evaluation without known rows."""
    if run is not None:
        return DataError(f"{run.path} held no rows out: it was trained without --eval-dataset", hint=NAME_THEM)
    return DataError(f"{model} is not a run, so the rows to evaluate are not known", hint=NAME_THEM)


def _alone(names: Any, split: str | None) -> dict[str, Any]:
    """Return the settings to read all of `names`, and nothing else."""
    whole = {
        "eval_dataset": None,
        "eval_split": None,
        "eval_group": None,
        "mixing": Mixing.WEIGHTS,
        "streaming": False,
    }
    return {"dataset": names, "split": split or EVAL_SPLIT, **whole}


def _shares_files(settings: DataSettings, run: TrainedRows) -> bool:
    """Return whether a file of the run's training data is read."""
    trained: set[Path] = set()
    for name in run.settings.get("dataset") or ():
        try:
            source = find_dataset(name, run.settings.get("split") or TRAIN)
            trained |= {path.resolve() for path in source.files}
        except QloraError:  # moved or deleted since: it can't be one that is read now
            continue
    return any(path.resolve() in trained for source in trained_sources(settings) for path in source.files)
