"""The record of a run (`run.json`): every command writes it from one model and reads it through that model.

A run that was killed, or written by an older version, is not an error: missing parts are None, unreadable ones are
left out and listed in `problems`. A command that requires a part asks for it by `need`, `base` or `settings_of`.
"""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, PrivateAttr, ValidationError

from qlora_cli.errors import ModelError
from qlora_cli.files import as_json, existing_path, read_small
from qlora_cli.runs.directory import RUN_FILE, RunDirectory
from qlora_cli.units import LARGEST, Whole
from qlora_cli.writing import PRIVATE_FILE, USUAL_FILE, write_file

SCHEMA_VERSION = 1  # a record that names none is of version 0: its paths are as they were given
DEFAULT = "default"
FIGURES = ("plan.", "hardware.", "data.")  # no number there is ever NaN or infinite; losses may be
DEEPEST = 50  # lists and objects in each other; a run writes about six
BY_QLORA = "Was it written by qlora train, and to its end?"
RESTORE = f"Restore {RUN_FILE} as qlora train wrote it"
UPDATE = "Update qlora: pip install -U qlora-cli"

Values = Mapping[str, JsonValue]


class RecordSection(BaseModel):
    """A part of the record: what it needs of it by name, and all else as it was written."""

    model_config = ConfigDict(extra="allow", frozen=True, protected_namespaces=())

    @property
    def content(self) -> dict[str, Any]:
        """All that was written, by key."""
        return self.model_dump(mode="json", exclude_unset=True)

    def integer(self, key: str) -> int | None:
        """Return the whole number that was written under a key; None if none was."""
        value = self.content.get(key)
        return value if isinstance(value, int) and not isinstance(value, bool) else None


class Resumption(RecordSection):
    """A resumption of the run after a step; `checkpoint` is relative to the run, or absolute.

    `from_run` is the path from this run to a checkpoint of another one, so that the two may be moved together.
    """

    time: str | None = None
    step: Whole = 0
    checkpoint: Path | None = None
    from_run: Path | None = None


class NamedFrom(RecordSection):
    """The working directory that relative names were given in, and where that is as seen from the run."""

    directory: Path
    from_run: Path


class LoadedBase(RecordSection):
    """How the base was loaded."""

    base_model: str | None = None
    commit: str | None = None
    adapter: Path | None = None
    device: str | None = None
    dtype_bytes: Mapping[str, Whole] = Field(default_factory=dict)


class RecordedRows(RecordSection):
    """What became of a data set's rows."""

    name: str | None = None
    fingerprint: str | None = None


class RecordedData(RecordSection):
    """The rows that were trained, and those that were held out."""

    train: RecordedRows | None = None
    eval: RecordedRows | None = None


class RecordedPrediction(RecordSection):
    """What the run was predicted to take on its GPU, in bytes."""

    gpu: str | None = None
    allocated_bytes: Whole | None = None
    reserved_bytes: Whole | None = None
    process_bytes: Whole | None = None


class RecordedPlan(RecordSection):
    """What was settled before the first step."""

    model: str | None = None
    device: str | None = None
    compute_dtype: str | None = None
    num_steps: Whole | None = None
    predicted_memory: RecordedPrediction | None = None


class RecordedPeak(RecordSection):
    """The largest memory seen by the process that ended the run, in bytes."""

    host_bytes: Whole | None = None
    device_allocated_bytes: Whole | None = None
    device_reserved_bytes: Whole | None = None


class RecordedResult(RecordSection):
    """What came of a run that ended by itself, or by a signal."""

    steps: Whole | None = None
    num_steps: Whole | None = None
    best_step: Whole | None = None
    peak_memory: RecordedPeak | None = None


@dataclass(frozen=True, kw_only=True)
class SettingUsed:
    """A setting of a run, and where its value came from."""

    path: str
    value: object
    origin: str

    @property
    def text(self) -> str:
        """The value as people read it."""
        return as_text(self.value)

    @property
    def is_default(self) -> bool:
        """Whether nobody set it."""
        return self.origin == DEFAULT


@dataclass(frozen=True, kw_only=True)
class BaseUsed:
    """The base of a run: its name, and its commit if it is on the hub, or else the places that it may be at."""

    name: str
    commit: str | None
    places: tuple[Path, ...]


class RunRecord(RecordSection):
    """The record of a run. `problems` are what could not be read of it, in sentences."""

    schema_version: Whole = 0
    status: Literal["running", "done", "interrupted", "failed"] | None = None
    error: str | None = None
    started: str | None = None
    resumed: tuple[Resumption, ...] = ()
    pid: Whole | None = None
    host: str | None = None
    named_from: NamedFrom | None = None
    settings: Mapping[str, Values] = Field(default_factory=dict)
    origins: Mapping[str, str] = Field(default_factory=dict)
    asked: Mapping[str, Values] = Field(default_factory=dict)
    asked_of_adapter: Mapping[str, Values] = Field(default_factory=dict)
    seed: Whole | None = None
    versions: Mapping[str, str] = Field(default_factory=dict)
    hardware: Values = Field(default_factory=dict)
    base_model: LoadedBase | None = None
    base_model_path: Path | None = None
    base_model_digest: str | None = None
    data: RecordedData = Field(default_factory=RecordedData)
    plan: RecordedPlan = Field(default_factory=RecordedPlan)
    result: RecordedResult | None = None
    adapter_files: Mapping[str, JsonValue] = Field(default_factory=dict)

    _directory: Path = PrivateAttr(default=Path())
    _problems: tuple[str, ...] = PrivateAttr(default=())
    _remedy: str | None = PrivateAttr(default=None)  # of a record of which nothing can be read

    @property
    def problems(self) -> tuple[str, ...]:
        """What could not be read, in sentences."""
        return self._problems

    @property
    def is_done(self) -> bool:
        """Whether the run has done all it was to do."""
        return self.status == "done"

    @property
    def settings_used(self) -> tuple[SettingUsed, ...]:
        """Every setting, those that somebody set first."""
        used = [
            SettingUsed(path=f"{section}.{key}", value=value, origin=self.origins.get(f"{section}.{key}", DEFAULT))
            for section, values in self.settings.items()
            for key, value in values.items()
        ]
        return tuple(sorted(used, key=lambda setting: setting.is_default))

    def changed(self, **content: object) -> "RunRecord":
        """Return the record with other content under some keys."""
        record = RunRecord.model_validate({**self.content, **as_json(content)})
        record._directory = self._directory
        return record

    def setting(self, path: str) -> JsonValue:
        """Return the value of the setting `section.key`; None if there is none."""
        section, key = path.split(".")
        return self.settings.get(section, {}).get(key)

    def recorded_settings(self, section: str) -> tuple[Values, ...]:
        """Return the settings of a section as they came to be, as they were given, and as they were for its adapter.

        The latter are those of the run that the adapter is from which this one trained on.
        """
        return tuple(part.get(section, {}) for part in (self.settings, self.asked, self.asked_of_adapter))

    def lacks(self, purpose: str, key: str) -> ModelError:
        """Return the error of a record without what it must say: `purpose` in words, `key` in the file."""
        reasons = [problem for problem in self._problems if problem.startswith(key.split(".")[0])]
        reason = reasons[0] if reasons else f"{key} is missing"
        return ModelError(f"{self._directory / RUN_FILE} does not say {purpose}: {reason}", hint=BY_QLORA)

    def settings_of(self, section: str, purpose: str) -> Values:
        """Return a section of the settings.

        Raises:
            ModelError: there is none.
        """
        if section not in self.settings:
            raise self.lacks(purpose, f"settings.{section}")
        return self.settings[section]

    def base(self) -> BaseUsed:
        """Return the base that the run was trained on.

        Raises:
            ModelError: the record names none.
        """
        purpose = "what the run was based on, and how"
        loaded = self.base_model
        if loaded is None or loaded.base_model is None:
            raise self.lacks(purpose, "base_model.base_model")
        if self.base_model_path is None:
            raise self.lacks(purpose, "base_model_path")
        places = (self.base_model_path, *self.candidate_paths(loaded.base_model))
        return BaseUsed(name=loaded.base_model, commit=loaded.commit, places=tuple(dict.fromkeys(places)))

    def candidate_paths(self, name: str) -> tuple[Path, ...]:
        """Return where a relative path may be: where it was named from, and there as seen from the run; else none."""
        if Path(name).is_absolute() or name.startswith("~"):
            return ()
        return tuple(dict.fromkeys(place / name for place in self._named_from()))

    def checkpoint_candidates(self, entry: Resumption) -> tuple[Path, ...]:
        """Return where the checkpoint may be that an entry of `resumed` names, the likeliest place first."""
        if entry.checkpoint is None:
            return ()
        here = self._directory.resolve()
        places = [here / entry.checkpoint]
        if entry.from_run is not None:
            places.insert(0, Path(os.path.normpath(here / entry.from_run)))
        elif self.schema_version == 0 and not entry.checkpoint.is_absolute():  # as it was given
            places = [*self.candidate_paths(str(entry.checkpoint)), entry.checkpoint.absolute(), *places]
        return tuple(sorted(places, key=lambda place: existing_path(place) is None))

    def _named_from(self) -> Iterator[Path]:
        """Yield the directory that relative names refer to: its recorded path, then its place relative to the run."""
        if self.named_from is not None:
            yield self.named_from.directory
            yield Path(os.path.normpath(self._directory.resolve() / self.named_from.from_run))
            return
        # Version 0 did not record it; it follows from the relative name of the run itself.
        output, here = self.setting("output.directory"), self._directory.resolve()
        parts = Path(os.path.normpath(output)).parts if isinstance(output, str) else ()
        if parts and here.parts[-len(parts) :] == parts:
            yield Path(*here.parts[: -len(parts)])


def read_record(directory: Path) -> RunRecord:
    """Return what the run in `directory` recorded of itself, as far as it can be read; never an error."""
    if (directory / RUN_FILE).exists() and not (directory / RUN_FILE).is_file():
        return _unreadable(directory, f"{RUN_FILE} is no file")
    try:
        content = _parsed(read_small(directory / RUN_FILE))
    except FileNotFoundError:
        return _unreadable(directory, f"there is no {RUN_FILE}")
    except OSError as error:
        return _unreadable(directory, f"{RUN_FILE} can't be read: {error.strerror}")
    except (ValueError, RecursionError) as error:
        return _unreadable(directory, f"{RUN_FILE} is damaged: {error}")
    if not isinstance(content, dict):
        return _unreadable(directory, f"{RUN_FILE} is damaged: it holds no object")
    version = content.get("schema_version", 0)
    if not isinstance(version, int) or isinstance(version, bool):
        shown = json.dumps(version)
        return _unreadable(directory, f"{RUN_FILE} is damaged: schema_version is {shown}, which is no whole number")
    if version > SCHEMA_VERSION:
        known = f"and this qlora knows versions up to {SCHEMA_VERSION}"
        return _unreadable(directory, f"{RUN_FILE} is of schema version {version}, {known}", UPDATE)
    return _read(directory, content)


def load_record(directory: Path) -> RunRecord:
    """Return the record of a run.

    Raises:
        ModelError: it can't be read, or was written by a newer version.
    """
    record = read_record(directory)
    if record._remedy is not None:
        raise ModelError(f"{directory}: {record.problems[0]}", hint=record._remedy)
    return record


def resumption(directory: RunDirectory, time: str | None, step: int, checkpoint: Path | None) -> Resumption:
    """Return the entry of a resumption from a checkpoint, of this or another run; None for a run that restarts."""
    if checkpoint is None:
        return Resumption(time=time, step=step, checkpoint=None)
    own = within(directory, checkpoint)
    from_run = Path(os.path.relpath(checkpoint.resolve(), directory.path.resolve())) if own.is_absolute() else None
    return Resumption(time=time, step=step, checkpoint=own, from_run=from_run)


def resumptions_in(directory: RunDirectory, record: RunRecord) -> tuple[Resumption, ...]:
    """Return the earlier resumptions in `record`, with paths as seen from the run in `directory` that resumes it."""
    if record._directory.resolve() == directory.path.resolve():
        return record.resumed
    return tuple(
        resumption(directory, entry.time, entry.step, next(iter(record.checkpoint_candidates(entry)), None))
        for entry in record.resumed
    )


def write_record(directory: RunDirectory, record: RunRecord) -> None:
    """Replace the record of a run in one move; only its owner reads one that may quote rows or prompts."""
    may_quote = record.error is not None or bool(record.setting("training.sample_prompts"))
    mode = PRIVATE_FILE if may_quote else USUAL_FILE
    write_file(directory.run_file, json.dumps(record.content, indent=2) + "\n", mode=mode)


def new_record(directory: RunDirectory, content: Mapping[str, object]) -> RunRecord:
    """Return a record for the run in `directory`, whose relative names are given in the present working directory."""
    here = Path.cwd()
    named_from = {"directory": here, "from_run": os.path.relpath(here, directory.path.resolve())}
    whole = {"schema_version": SCHEMA_VERSION, "named_from": named_from, **content}
    record = RunRecord.model_validate(as_json(whole))
    record._directory = directory.path
    return record


def within(directory: RunDirectory, path: Path) -> Path:
    """Return a path as a record holds it: of the run's own relative to it, so that it may be moved, else absolute."""
    place, absolute = directory.path.absolute(), path.absolute()
    return absolute.relative_to(place) if absolute.is_relative_to(place) else absolute


def _unreadable(directory: Path, problem: str, remedy: str = RESTORE) -> RunRecord:
    record = RunRecord()
    record._directory, record._problems, record._remedy = directory, (problem,), remedy
    return record


def _parsed(text: str) -> object:
    found = json.loads(text)
    if "\\ud" not in text.lower():
        return found
    # Halves of characters, as of a file name that is not UTF-8, which no text may hold.
    raw = json.dumps(found, ensure_ascii=False).encode("utf-8", "surrogatepass")
    return json.loads(raw.decode("utf-8", "replace"))


def _read(directory: Path, content: dict[str, Any]) -> RunRecord:
    problems: list[str] = []
    content = {key: _bounded(value, key, problems) for key, value in content.items()}
    while True:
        try:
            record = RunRecord.model_validate(content)
        except ValidationError as error:
            for problem in error.errors(include_url=False):
                problems.append(f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}")
                _leave_out(content, problem["loc"])
            continue
        record._directory, record._problems = directory, tuple(problems)
        return record


def _bounded(value: Any, place: str, problems: list[str], depth: int = 1) -> Any:
    """Return a copy of what a record holds, with None for what no run writes, each of which is a problem."""
    is_figure = isinstance(value, int) or (isinstance(value, float) and place.startswith(FIGURES))
    if is_figure and not -LARGEST <= value <= LARGEST:  # NaN too
        problems.append(f"{place}: a number that no run has")
        return None
    if not isinstance(value, dict | list):
        return value
    if depth > DEEPEST:
        problems.append(f"{place}: more than {DEEPEST} lists and objects in each other")
        return None
    if isinstance(value, list):
        return [_bounded(part, f"{place}.{number}", problems, depth + 1) for number, part in enumerate(value)]
    return {key: _bounded(part, f"{place}.{key}", problems, depth + 1) for key, part in value.items()}


def _leave_out(content: dict[str, Any], place: tuple[int | str, ...]) -> None:
    """Remove the value at a place; a list as a whole, and a part as a whole if it lacks a required value."""
    holder, key = content, str(place[0])
    for inner_key in map(str, place[1:]):
        inner = holder.get(key)
        if not isinstance(inner, dict) or inner_key not in inner:
            break
        holder, key = inner, inner_key
    holder.pop(key, None)


def as_name(value: object) -> str | None:
    """Return a value that is a name; None if it is none."""
    return value if isinstance(value, str) else None


def as_text(value: object) -> str:
    """Return a value of JSON as people read it."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return ", ".join(map(as_text, value)) or "-"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {as_text(part)}" for key, part in value.items()) or "-"
    return str(value)
