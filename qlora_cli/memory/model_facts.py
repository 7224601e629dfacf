"""The facts of a model that a prediction needs: the content of its config.json, and its origin.

The catalogue has them in memory, a local model in one small file; only another hub id needs the network, for that one
file. Imports no torch.
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qlora_cli.errors import ModelError, ModelNotFoundError
from qlora_cli.events import Reporter
from qlora_cli.files import existing_path
from qlora_cli.memory.catalogue import CatalogueModel, find_in_catalogue, nearest_names
from qlora_cli.model_files.adapter_files import (
    ADAPTER_CONFIG,
    AdapterOutline,
    check_unchanged,
    inferred_from_adapter,
    read_outline,
)
from qlora_cli.model_files.checkpoint import read_json
from qlora_cli.model_files.given_model import CONFIG, HUB_ID, base_model_problem, looks_local
from qlora_cli.runs.directory import RunDirectory, enclosing_run
from qlora_cli.runs.record import BaseUsed, RunRecord, load_record
from qlora_cli.runs.run_weights import may_have_weights, weights_of
from qlora_cli.settings.models import SECTIONS, EstimateSettings
from qlora_cli.settings.resolve import Resolved
from qlora_cli.settings.settle import InferredSettings, inferred_from_run, inferred_origin

# The sections of a run's record that give the defaults of a prediction for it.
RUN_SECTIONS = ("model", "quantization", "lora", "data", "training", "output")
# Those for an adapter, whose own config has the settings of LoRA.
RUN_SECTIONS_WITHOUT_LORA = tuple(section for section in RUN_SECTIONS if section != "lora")
# Those that a prediction does not take over.
OWN_SETTINGS = {
    "model": {"name", "revision", "base_model"},
    "output": SECTIONS["output"].model_fields.keys() - {"max_checkpoints"},
}
HOW_TRAINED = "how the run was trained"
# Storage of repositories whose models are predicted as 16-bit copies.
PREDICTED_IN_16_BIT = ("mxfp4", "fp8")


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """The config of a model, and what a named adapter or run adds to it.

    Attributes:
        name: As the user gave it, or as the catalogue spells it.
        content: Of its config.json.
        path: Its directory, if the model is local.
        repository: Its name on the hub, if it is of the catalogue.
        adapter: The adapter that was named, to train further.
        settings: Defaults from the adapter or the run.
        notes: Sentences for the report.
    """

    name: str
    content: Mapping[str, Any]
    path: Path | None = None
    repository: str | None = None
    adapter: AdapterOutline | None = None
    settings: tuple[InferredSettings, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def weight_directories(self) -> tuple[Path | None, ...]:
        """Where its weights may lie on this disk."""
        if self.repository is None:
            return (self.path,)
        from qlora_cli.hub.repository import cached_snapshot

        return (self.path, cached_snapshot(self.repository))

    @property
    def description(self) -> dict[str, Any]:
        """Everything that a prediction depends on, for its key in the cache."""
        adapter = {} if self.adapter is None else {"adapter": self.adapter.description}
        return {**self.content, **adapter, "settings": [fact.values for fact in self.settings], "notes": self.notes}


def find_model_facts(asked: Resolved[EstimateSettings], reporter: Reporter) -> ModelFacts:
    """Return the facts of the model that was asked about: a model, an adapter, or a run.

    Raises:
        ModelNotFoundError: no such model.
        ModelError: its files can't be read.
    """
    model = asked.settings.model
    path = existing_path(model.name)
    if path is None and looks_local(model.name):
        raise _no_such_path(model.name).for_setting("model.name")
    if path is not None and RunDirectory(path).is_run:
        _check_no_revision(path, model.revision)
        return _facts_of_run(path, asked, reporter)
    facts = _facts_by_name(model.name, model.revision, reporter)
    if isinstance(facts, Path):
        return _facts_of_adapter(facts, asked, reporter)
    if problem := base_model_problem(model.name, model):
        raise problem
    return facts


def _no_such_path(name: str) -> ModelNotFoundError:
    return ModelNotFoundError(f"no model at {name}: no such file or directory", hint="Check the path.")


def _facts_by_name(name: str, revision: str | None, reporter: Reporter) -> ModelFacts | Path:
    """Return the facts of a model; for an adapter, its directory."""
    if looks_local(name):
        return _local_facts(name, revision)
    known = find_in_catalogue(name) if revision is None else None
    if known is None:
        return _facts_in_directory(name, _fetch_config(name, revision, reporter))
    # Weights are those of the repository that was named; a short name stands for the catalogue's own.
    repository = name.strip() if "/" in name else known.hub_id
    return replace(facts_of_catalogue(known), repository=repository)


def facts_of_catalogue(model: CatalogueModel) -> ModelFacts:
    """Return the facts of a model of the catalogue; of one that is stored in other formats, those of a 16-bit copy."""
    content = deepcopy(dict(model.config))
    notes = [f"architecture of {model.hub_id} from the catalogue"]
    stored = content.get("quantization_config")
    if isinstance(stored, Mapping) and stored.get("quant_method") in PREDICTED_IN_16_BIT:
        del content["quantization_config"]
        notes.append(f"its repository is stored in {stored['quant_method']}; this is for a 16-bit copy of it")
    return ModelFacts(name=model.name, content=content, notes=tuple(notes))


def _local_facts(name: str, revision: str | None) -> ModelFacts | Path:
    path = existing_path(name)
    if path is None:
        raise _no_such_path(name)
    _check_no_revision(path, revision)
    if path.is_dir():
        return _facts_in_directory(name, path)
    if path.suffix != ".json":
        raise ModelError(f"{path} is no config.json", hint="Give a model's directory, its config.json, or a hub id.")
    return ModelFacts(name=name, content=read_json(path), path=path.parent)


def _facts_in_directory(name: str, path: Path) -> ModelFacts | Path:
    if (path / ADAPTER_CONFIG).is_file():
        return path
    if not (path / CONFIG).is_file():
        raise ModelError(f"{path} has no {CONFIG}", hint="Give a model's directory, its config.json, or a hub id.")
    return ModelFacts(name=name, content=read_json(path / CONFIG), path=path)


def _check_no_revision(path: Path, revision: str | None) -> None:
    if revision is not None:
        raise ModelError(f"a revision ({revision}) has no meaning for the local {path}", hint="Leave it out.")


def _facts_of_base(name: str, reporter: Reporter) -> ModelFacts:
    """Return the facts of the base that an adapter, a run or the user names."""
    facts = _facts_by_name(name, None, reporter)
    if isinstance(facts, Path):
        raise ModelError(
            f"the base is {name}, an adapter itself",
            hint="Merge that one into its own base first, and name the result.",
        )
    return facts


def _facts_of_adapter(path: Path, asked: Resolved[EstimateSettings], reporter: Reporter) -> ModelFacts:
    outline, run, model = read_outline(path), enclosing_run(path), asked.settings.model
    recorded: Sequence[Mapping[str, Any]] = ()
    settings: tuple[InferredSettings, ...] = (inferred_from_adapter(outline.config, path),)
    if run is None:
        base = model.base_model or _base_of_adapter(path, outline, model.name)
    else:
        record = load_record(run.path)
        recorded = record.recorded_settings("lora")
        base = model.base_model or _locate_base(record.base(), run.path)
        loaded = {section: record.settings_of(section, HOW_TRAINED) for section in ("model", "quantization")}
        settings = (inferred_from_run(loaded, run.run_file), *settings)
    check_unchanged(model.name, outline.config, asked.given("lora"), recorded)
    facts = _facts_of_base(base, reporter)
    note = f"the adapter {model.name} is trained further, with its own rank and targets"
    if outline.headers is None:
        note += "; by its config alone, since there are no safetensors weights"
    return replace(facts, adapter=outline, settings=settings, notes=(*facts.notes, note))


def _base_of_adapter(path: Path, outline: AdapterOutline, name: str) -> str:
    base = outline.config.base_model_name_or_path
    if not base:
        raise ModelError(f"the adapter {name} does not name its base model", hint="Give the base model itself.")
    relative = path / base
    return str(relative) if existing_path(base) is None and relative.is_dir() else base


def _facts_of_run(path: Path, asked: Resolved[EstimateSettings], reporter: Reporter) -> ModelFacts:
    record = load_record(path)
    base, adapter = record.base(), _adapter_of_run(path, record)
    settings = [_settings_of_run(record, path, RUN_SECTIONS if adapter is None else RUN_SECTIONS_WITHOUT_LORA)]
    if adapter is not None:
        check_unchanged(str(path), adapter.config, asked.given("lora"), record.recorded_settings("lora"))
        settings.append(inferred_from_adapter(adapter.config, adapter.directory))
    facts = _facts_of_base(asked.settings.model.base_model or _locate_base(base, path), reporter)
    note = f"settings of the run {path}, except for those that were given here"
    return replace(facts, name=base.name, adapter=adapter, settings=tuple(settings), notes=(*facts.notes, note))


def _settings_of_run(record: RunRecord, path: Path, sections: Sequence[str]) -> InferredSettings:
    """Return the settings of a run that a prediction has as well; another version may have recorded more."""
    known = {section: SECTIONS[section].model_fields.keys() - OWN_SETTINGS.get(section, set()) for section in sections}
    values = {
        f"{section}.{key}": value
        for section, keys in known.items()
        for key, value in record.settings_of(section, HOW_TRAINED).items()
        if key in keys
    }
    return InferredSettings(values=values, origin=inferred_origin(RunDirectory(path).run_file))


def _adapter_of_run(path: Path, record: RunRecord) -> AdapterOutline | None:
    """Return the adapter of a run that trains an existing one further; None if the run made a new one.

    No settings describe such an adapter: its outline is read from the weights of the run or, before there are any,
    from the adapter that the run began with.
    """
    initial_adapter = None if record.base_model is None else record.base_model.adapter
    if initial_adapter is None:
        return None
    run = RunDirectory(path)
    if may_have_weights(run):
        return read_outline(weights_of(run, record).path)
    paths = (initial_adapter, *record.candidate_paths(str(initial_adapter)))
    existing = next((adapter for adapter in paths if (adapter / ADAPTER_CONFIG).is_file()), None)
    if existing is None:
        raise ModelNotFoundError(
            f"the run {path} has no weights yet, and the adapter that it began with is not here (looked for "
            f"{' and '.join(map(str, paths))})",
            hint="Put it there, or name an adapter of the same kind.",
        )
    return read_outline(existing)


def _locate_base(base: BaseUsed, run: Path) -> str:
    """Return the local path of a run's base, or its name on the hub."""
    existing = next((str(path) for path in base.candidate_paths if (path / CONFIG).is_file()), None)
    if existing is None and base.commit is None:
        searched = " and ".join(map(str, base.candidate_paths))
        raise ModelNotFoundError(
            f"the base of the run {run} is {base.name}, which is not here (looked for {searched})",
            hint="Put it there, or say where it is: --base-model BASE.",
        )
    return existing or base.name


def _fetch_config(name: str, revision: str | None, reporter: Reporter) -> Path:
    """Download the config of a model or of an adapter; return the directory that has it."""
    if not HUB_ID.fullmatch(name):
        raise ModelNotFoundError(f"no model at {name!r}: no such path, and not a hub id", hint=_hint_for_unknown(name))
    from qlora_cli.hub.repository import fetch_files, open_repository

    try:
        repository = open_repository(name, revision, reporter)
    except ModelNotFoundError as error:
        raise ModelNotFoundError(str(error), hint=f"{error.hint or ''} {_hint_for_unknown(name)}".strip()) from error
    file_name = next((file for file in (CONFIG, ADAPTER_CONFIG) if file in repository.file_names), None)
    if file_name is None:
        raise ModelError(f"{name} has no {CONFIG} on the hub", hint="Give the repository of the base model.")
    return fetch_files(repository, [file_name], reporter)


def _hint_for_unknown(name: str) -> str:
    nearest = nearest_names(name)
    if nearest:
        return f"Known without a network are, for example, {', '.join(nearest)}."
    return "Give a directory, a config.json, a hub id, or a name of the catalogue such as llama-3.1-8b."
