"""What is known of a model before anything is computed: the content of its config.json, and where it came from.

A name of the catalogue costs nothing, a local model one small file; only another hub id asks the network, for that
one file. Imports no torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qlora_cli.errors import ModelError, ModelNotFoundError
from qlora_cli.events import Reporter
from qlora_cli.files import existing_path
from qlora_cli.memory.catalogue import find_in_catalogue, nearest_names
from qlora_cli.model_files.adapter_files import (
    ADAPTER_CONFIG,
    AdapterOutline,
    adapter_fact,
    check_unchanged,
    read_outline,
)
from qlora_cli.model_files.checkpoint import read_json
from qlora_cli.model_files.source import CONFIG, HUB_ID, base_model_problem, looks_local
from qlora_cli.runs.directory import RunDirectory, run_around
from qlora_cli.runs.record import BaseUsed, RunRecord, load_record
from qlora_cli.runs.run_weights import may_have_weights, weights_of
from qlora_cli.settings.models import SECTIONS, EstimateSettings
from qlora_cli.settings.resolve import Resolved
from qlora_cli.settings.settle import Fact, found, run_fact

# What a run's record decides of a prediction for it; a flag that is given wins.
OF_A_RUN = ("model", "quantization", "lora", "data", "training")
WITHOUT_LORA = tuple(section for section in OF_A_RUN if section != "lora")  # which an adapter that trains on says
NAMES = {"model": {"name", "revision", "base_model"}}
HOW_TRAINED = "how the run was trained"
STORED_OTHERWISE = ("mxfp4", "fp8")


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """The config of a model. `path` is its directory if it is on this disk; `notes` are for the answer.

    `adapter` is the one that was named, and trains on. `settings` are what it and its run say of the settings.
    """

    name: str
    content: Mapping[str, Any]
    path: Path | None = None
    adapter: AdapterOutline | None = None
    settings: tuple[Fact, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def description(self) -> dict[str, Any]:
        """All that an answer depends on."""
        adapter = {} if self.adapter is None else {"adapter that trains on": self.adapter.description}
        return {**self.content, **adapter, "settings": [fact.values for fact in self.settings], "notes": self.notes}


def find_facts(asked: Resolved[EstimateSettings], reporter: Reporter) -> ModelFacts:
    """Return what is known of the model that was asked about, and of the settings, if it is a run or an adapter.

    Raises:
        ModelNotFoundError: no such model.
        ModelError: its files can't be read.
    """
    model = asked.settings.model
    path = existing_path(model.name)
    if path is None and looks_local(model.name):
        raise _not_there(model.name).of("model.name")
    if path is not None and RunDirectory(path).is_run:
        _check_no_revision(path, model.revision)
        return _of_run(path, asked, reporter)
    facts = _named(model.name, model.revision, reporter)
    if isinstance(facts, Path):
        return _of_adapter(facts, asked, reporter)
    if problem := base_model_problem(model.name, model):
        raise problem
    return facts


def _not_there(name: str) -> ModelNotFoundError:
    return ModelNotFoundError(f"no model at {name}: no such file or directory", hint="Check the path.")


def _named(name: str, revision: str | None, reporter: Reporter) -> ModelFacts | Path:
    """Return what is known of a model; of an adapter the directory that it is in."""
    if looks_local(name):
        return _local(name, revision)
    known = find_in_catalogue(name) if revision is None else None
    if known is None:
        return _in_directory(name, _from_hub(name, revision, reporter))
    content = dict(known.config)
    notes = [f"architecture of {known.hub_id} from the catalogue"]
    stored = content.get("quantization_config")
    if isinstance(stored, Mapping) and stored.get("quant_method") in STORED_OTHERWISE:
        del content["quantization_config"]
        notes.append(f"its repository is stored in {stored['quant_method']}; this is for a 16-bit copy of it")
    return ModelFacts(name=known.name, content=content, notes=tuple(notes))


def _local(name: str, revision: str | None) -> ModelFacts | Path:
    path = existing_path(name)
    if path is None:
        raise _not_there(name)
    _check_no_revision(path, revision)
    if path.is_dir():
        return _in_directory(name, path)
    if path.suffix != ".json":
        raise ModelError(f"{path} is no config.json", hint="Give a model's directory, its config.json, or a hub id.")
    return ModelFacts(name=name, content=read_json(path), path=path.parent)


def _in_directory(name: str, path: Path) -> ModelFacts | Path:
    if (path / ADAPTER_CONFIG).is_file():
        return path
    if not (path / CONFIG).is_file():
        raise ModelError(f"{path} has no {CONFIG}", hint="Give a model's directory, its config.json, or a hub id.")
    return ModelFacts(name=name, content=read_json(path / CONFIG), path=path)


def _check_no_revision(path: Path, revision: str | None) -> None:
    if revision is not None:
        raise ModelError(f"a revision ({revision}) has no meaning for the local {path}", hint="Leave it out.")


def _base(name: str, reporter: Reporter) -> ModelFacts:
    """Return what is known of the base that an adapter, a run or the user names."""
    facts = _named(name, None, reporter)
    if isinstance(facts, Path):
        raise ModelError(
            f"the base is {name}, an adapter itself",
            hint="Merge that one into its own base first, and name the result.",
        )
    return facts


def _of_adapter(path: Path, asked: Resolved[EstimateSettings], reporter: Reporter) -> ModelFacts:
    outline, run, model = read_outline(path), run_around(path), asked.settings.model
    recorded: Sequence[Mapping[str, Any]] = ()
    settings: tuple[Fact, ...] = (adapter_fact(outline.config, path),)
    if run is None:
        base = model.base_model or _base_of_adapter(path, outline, model.name)
    else:
        record = load_record(run.path)
        recorded = record.said_of("lora")
        base = model.base_model or _place_of(record.base(), run.path)
        loaded = {section: record.settings_of(section, HOW_TRAINED) for section in ("model", "quantization")}
        settings = (run_fact(loaded, run.run_file), *settings)
    check_unchanged(model.name, outline.config, asked.given("lora"), recorded)
    facts = _base(base, reporter)
    note = f"the adapter {model.name} trains on, as it is"
    if outline.headers is None:
        note += "; by its config alone, since its weights are not here as safetensors"
    return replace(facts, adapter=outline, settings=settings, notes=(*facts.notes, note))


def _base_of_adapter(path: Path, outline: AdapterOutline, name: str) -> str:
    base = outline.config.base_model_name_or_path
    if not base:
        raise ModelError(f"the adapter {name} does not name its base model", hint="Give the base model itself.")
    beside = path / base
    return str(beside) if existing_path(base) is None and beside.is_dir() else base


def _of_run(path: Path, asked: Resolved[EstimateSettings], reporter: Reporter) -> ModelFacts:
    record = load_record(path)
    base, adapter = record.base(), _trained_on(path, record)
    settings = [_all_of_run(record, path, OF_A_RUN if adapter is None else WITHOUT_LORA)]
    if adapter is not None:
        check_unchanged(str(path), adapter.config, asked.given("lora"), record.said_of("lora"))
        settings.append(adapter_fact(adapter.config, adapter.directory))
    facts = _base(asked.settings.model.base_model or _place_of(base, path), reporter)
    note = f"settings of the run {path}, but for what was given here"
    return replace(facts, name=base.name, adapter=adapter, settings=tuple(settings), notes=(*facts.notes, note))


def _all_of_run(record: RunRecord, path: Path, sections: Sequence[str]) -> Fact:
    """Return all that a run recorded of the settings that a prediction has, which may be of another version."""
    known = {section: SECTIONS[section].model_fields.keys() - NAMES.get(section, set()) for section in sections}
    values = {
        f"{section}.{key}": value
        for section, keys in known.items()
        for key, value in record.settings_of(section, HOW_TRAINED).items()
        if key in keys
    }
    return Fact(values=values, origin=found(RunDirectory(path).run_file))


def _trained_on(path: Path, record: RunRecord) -> AdapterOutline | None:
    """Return the adapter of a run that trains one on, which no settings describe; None if it made a new one.

    It is as the run's own weights are, or as the one that it began with before there are any.
    """
    began_with = None if record.base_model is None else record.base_model.adapter
    if began_with is None:
        return None
    run = RunDirectory(path)
    if may_have_weights(run):
        return read_outline(weights_of(run, record).path)
    places = (began_with, *record.places_of(str(began_with)))
    here = next((place for place in places if (place / ADAPTER_CONFIG).is_file()), None)
    if here is None:
        raise ModelNotFoundError(
            f"the run {path} has no weights yet, and the adapter that it trains on is not here (looked for "
            f"{' and '.join(map(str, places))})",
            hint="Put it there, or name an adapter of the same kind.",
        )
    return read_outline(here)


def _place_of(base: BaseUsed, run: Path) -> str:
    """Return the base of a run by where it is on this disk, or by its name on the hub."""
    here = next((str(place) for place in base.places if (place / CONFIG).is_file()), None)
    if here is None and base.commit is None:
        looked = " and ".join(map(str, base.places))
        raise ModelNotFoundError(
            f"the base of the run {run} is {base.name}, which is not here (looked for {looked})",
            hint="Put it there, or say where it is: --base-model BASE.",
        )
    return here or base.name


def _from_hub(name: str, revision: str | None, reporter: Reporter) -> Path:
    """Return where the config of a model, or of an adapter, was brought to."""
    if not HUB_ID.fullmatch(name):
        raise ModelNotFoundError(f"no model at {name!r}: no such path, and not a hub id", hint=_known(name))
    from qlora_cli.hub.repository import fetch_files, open_repository

    try:
        repository = open_repository(name, revision, reporter)
    except ModelNotFoundError as error:
        raise ModelNotFoundError(str(error), hint=f"{error.hint or ''} {_known(name)}".strip()) from error
    wanted = next((file for file in (CONFIG, ADAPTER_CONFIG) if file in repository.file_names), None)
    if wanted is None:
        raise ModelError(f"{name} has no {CONFIG} on the hub", hint="Give the repository of the base model.")
    return fetch_files(repository, [wanted], reporter)


def _known(name: str) -> str:
    nearest = nearest_names(name)
    if nearest:
        return f"Known without a network are, for example, {', '.join(nearest)}."
    return "Give a directory, a config.json, a hub id, or a name of the catalogue such as llama-3.1-8b."
