"""What is known of a model before anything is computed: the content of its config.json, and where it came from.

A name of the catalogue costs nothing, a local model one small file; only another hub id asks the network, for that
one file. Imports no torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from qlora_cli.errors import ModelError, ModelNotFoundError
from qlora_cli.events import Reporter
from qlora_cli.files import existing_path
from qlora_cli.memory.catalogue import find_in_catalogue, nearest_names
from qlora_cli.model_files.adapter_files import ADAPTER_CONFIG, AdapterOutline, check_unchanged, read_outline
from qlora_cli.model_files.checkpoint import read_json
from qlora_cli.model_files.source import CONFIG, HUB_ID, base_model_problem, looks_local
from qlora_cli.runs.directory import RunDirectory, run_around
from qlora_cli.runs.record import BaseUsed, RunRecord, load_record
from qlora_cli.runs.weights import may_have_weights, weights_of
from qlora_cli.settings.models import EstimateSettings
from qlora_cli.settings.settle import of_run, over_recorded, with_sections, with_values

# What a run's record decides of a prediction for it; a flag that is given wins.
OF_A_RUN = ("model", "quantization", "lora", "data", "training")
STORED_OTHERWISE = ("mxfp4", "fp8")


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """The config of a model. `path` is its directory if it is on this disk; `notes` are for the answer.

    `adapter` is the one that was named, and trains on.
    """

    name: str
    content: Mapping[str, Any]
    path: Path | None = None
    adapter: AdapterOutline | None = None
    notes: tuple[str, ...] = ()

    @property
    def description(self) -> dict[str, Any]:
        """All that an answer depends on."""
        adapter = {} if self.adapter is None else {"adapter that trains on": self.adapter.description}
        return {**self.content, **adapter, "notes": list(self.notes)}


def find_facts(settings: EstimateSettings, reporter: Reporter) -> tuple[ModelFacts, EstimateSettings]:
    """Return what is known of `settings.model`, and the settings with those of the run that was named, if one was.

    Raises:
        ModelNotFoundError: no such model.
        ModelError: its files can't be read.
    """
    name, revision = settings.model.name, settings.model.revision
    if looks_local(name):
        return _local(name, settings, reporter)
    known = find_in_catalogue(name) if revision is None else None
    if known is not None:
        content = dict(known.config)
        notes = [f"architecture of {known.hub_id} from the catalogue"]
        stored = content.get("quantization_config")
        if isinstance(stored, Mapping) and stored.get("quant_method") in STORED_OTHERWISE:
            del content["quantization_config"]
            notes.append(f"its repository is stored in {stored['quant_method']}; this is for a 16-bit copy of it")
        found = ModelFacts(name=known.name, content=content, notes=tuple(notes))
    else:
        path = _from_hub(name, revision, reporter)
        if not (path / CONFIG).is_file():
            return _of_adapter(path, settings, reporter)
        found = ModelFacts(name=name, content=read_json(path / CONFIG), path=path)
    if problem := base_model_problem(name, settings.model):
        raise problem
    return found, settings


def _local(name: str, settings: EstimateSettings, reporter: Reporter) -> tuple[ModelFacts, EstimateSettings]:
    path = existing_path(name)
    if path is None:
        raise ModelNotFoundError(f"no model at {name}: no such file or directory", hint="Check the path.")
    if settings.model.revision is not None:
        raise ModelError(
            f"a revision ({settings.model.revision}) has no meaning for the local {path}", hint="Leave it out."
        )
    if RunDirectory(path).is_run:
        return _of_run(path, settings, reporter)
    if (path / ADAPTER_CONFIG).is_file():
        return _of_adapter(path, settings, reporter)
    if problem := base_model_problem(name, settings.model):
        raise problem
    file = path / CONFIG if path.is_dir() else path
    if not file.is_file():
        raise ModelError(f"{path} has no {CONFIG}", hint="Give a model's directory, its config.json, or a hub id.")
    if file.suffix != ".json":
        raise ModelError(f"{file} is no config.json", hint="Give a model's directory, its config.json, or a hub id.")
    return ModelFacts(name=name, content=read_json(file), path=file.parent), settings


def _of_adapter(path: Path, settings: EstimateSettings, reporter: Reporter) -> tuple[ModelFacts, EstimateSettings]:
    outline, name, run = read_outline(path), settings.model.name, run_around(path)
    check_unchanged(name, outline.config, settings.lora)
    if run is None:
        base = settings.model.base_model or _base_of_adapter(path, outline, name)
    else:
        record = load_record(run.path)
        base = settings.model.base_model or _place_of(record.base(), run.path)
        settings = _loaded_as(settings, record, run)
    facts, settings = _named(base, settings, reporter)
    seen = "" if outline.headers else "; by its config alone, since its weights are not here as safetensors"
    note = f"the adapter {name} trains on, as it is{seen}"
    return replace(facts, adapter=outline, notes=(*facts.notes, note)), settings


def _base_of_adapter(path: Path, outline: AdapterOutline, name: str) -> str:
    base = outline.config.base_model_name_or_path
    if not base:
        raise ModelError(f"the adapter {name} does not name its base model", hint="Give the base model itself.")
    beside = path / base
    return str(beside) if existing_path(base) is None and beside.is_dir() else base


def _loaded_as(settings: EstimateSettings, record: RunRecord, run: RunDirectory) -> EstimateSettings:
    """Return the settings by which a base is loaded as a run was trained; its adapter says the rest."""
    purpose = "how the run was trained"
    recorded = {
        section: of_run(section, record.settings_of(section, purpose)) for section in ("model", "quantization")
    }
    return _over_record(settings, recorded, run)


def _over_record(
    settings: EstimateSettings, recorded: Mapping[str, Mapping[str, Any]], run: RunDirectory
) -> EstimateSettings:
    try:
        sections = {
            section: over_recorded(own, {key: value for key, value in values.items() if key in type(own).model_fields})
            for section, values in recorded.items()
            for own in (getattr(settings, section),)
        }
    except ValidationError as error:
        raise ModelError(
            f"{run.run_file} does not say how the run was trained: {error}",
            hint="Was it written by qlora train? Else give the base model.",
        ) from error
    return with_sections(settings, **sections)


def _named(base: str, settings: EstimateSettings, reporter: Reporter) -> tuple[ModelFacts, EstimateSettings]:
    """Return what is known of the model that an adapter or a run names as its base."""
    model = {"model.name": base, "model.revision": None, "model.base_model": None}
    return find_facts(with_values(settings, model), reporter)


def _of_run(path: Path, settings: EstimateSettings, reporter: Reporter) -> tuple[ModelFacts, EstimateSettings]:
    record = load_record(path)
    base = record.base()
    recorded = {section: record.settings_of(section, "how the run was trained") for section in OF_A_RUN}
    taken = _over_record(settings, recorded, RunDirectory(path))
    name = settings.model.base_model or _place_of(base, path)
    facts, taken = _named(name, taken, reporter)
    note = f"settings of the run {path}, but for what was given here"
    adapter = _trained_on(path, record)
    if adapter is not None:
        check_unchanged(str(path), adapter.config, settings.lora)
    return replace(facts, name=base.name, adapter=adapter, notes=(*facts.notes, note)), taken


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
