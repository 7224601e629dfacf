"""The record of a run (`run.json`), which all commands write and read through one model.

The record of a killed run, or from an older version, is not an error: missing parts are None, unreadable ones are left
out and listed in `problems`. Commands that require a part get it from `base` or `settings_of`, which raise.
"""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, PrivateAttr, ValidationError

from qlora_cli.errors import ModelError
from qlora_cli.files import as_json, existing_path, read_small
from qlora_cli.runs.adapter_health import AdapterHealth
from qlora_cli.runs.directory import BASE, RUN_FILE, RunDirectory
from qlora_cli.runs.forgetting import Forgetting
from qlora_cli.units import LARGEST, Whole
from qlora_cli.writing import PRIVATE_FILE, USUAL_FILE, write_file

SCHEMA_VERSION = 1  # a record without one has version 0: its paths are as they were given
DEFAULT = "default"
FINITE = ("plan.", "hardware.", "data.")  # sections whose numbers are never NaN or infinite; losses may be
MAX_DEPTH = 50  # levels of lists and objects; a run writes about six
INCOMPLETE_HINT = "Did qlora train write it, and finish writing?"
RESTORE = f"Restore {RUN_FILE} as qlora train wrote it"
UPDATE = "Update qlora: pip install -U qlora-cli"

Values = Mapping[str, JsonValue]


class RecordSection(BaseModel):
    """A part of the record, with its known fields typed, and all others as they were written."""

    model_config = ConfigDict(extra="allow", frozen=True, protected_namespaces=())

    @property
    def content(self) -> dict[str, Any]:
        """Everything that was written, by key."""
        return self.model_dump(mode="json", exclude_unset=True)

    def integer(self, key: str) -> int | None:
        """Return the value of a key if it is an integer, otherwise None."""
        value = self.content.get(key)
        return value if isinstance(value, int) and not isinstance(value, bool) else None


class Resumption(RecordSection):
    """A resumption of the run after a step; `checkpoint` is relative to the run, or absolute.

    `from_run` is the relative path from this run to a checkpoint of another one, so that both may be moved together.
    """

    time: str | None = None
    step: Whole = 0
    checkpoint: Path | None = None
    from_run: Path | None = None


class NamedFrom(RecordSection):
    """The working directory that relative paths refer to, absolute and relative to the run."""

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
    """The rows of a data set."""

    name: str | None = None
    fingerprint: str | None = None


class RecordedData(RecordSection):
    """The rows for training, and the held-out rows."""

    train: RecordedRows | None = None
    eval: RecordedRows | None = None


class RecordedPrediction(RecordSection):
    """The predicted memory of the run on its GPU, in bytes."""

    gpu: str | None = None
    allocated_bytes: Whole | None = None
    reserved_bytes: Whole | None = None
    process_bytes: Whole | None = None


class RecordedTime(RecordSection):
    """The predicted time of a step of the run, in seconds."""

    step_seconds: float | None = None


class RecordedPlan(RecordSection):
    """The plan of the run before the first step."""

    model: str | None = None
    device: str | None = None
    compute_dtype: str | None = None
    num_steps: Whole | None = None
    predicted_memory: RecordedPrediction | None = None
    predicted_time: RecordedTime | None = None


class RecordedPeak(RecordSection):
    """The peak memory of the process that ended the run, in bytes."""

    host_bytes: Whole | None = None
    device_allocated_bytes: Whole | None = None
    device_reserved_bytes: Whole | None = None


class RecordedResult(RecordSection):
    """The result of a run that ended by itself, or by a signal."""

    steps: Whole | None = None
    num_steps: Whole | None = None
    best_step: Whole | None = None
    step_seconds: float | None = None
    peak_memory: RecordedPeak | None = None
    adapter_health: AdapterHealth | None = None
    forgetting: Forgetting | None = None


@dataclass(frozen=True, kw_only=True)
class SettingUsed:
    """A setting of a run, and where its value came from."""

    path: str
    value: object
    origin: str

    @property
    def text(self) -> str:
        """The value as text for people."""
        return as_text(self.value)

    @property
    def is_default(self) -> bool:
        """Whether it was not set."""
        return self.origin == DEFAULT


@dataclass(frozen=True, kw_only=True)
class BaseUsed:
    """The base of a run: its name, its commit if it is on the hub, and the local paths where it may be."""

    name: str
    commit: str | None
    candidate_paths: tuple[Path, ...]


class RunRecord(RecordSection):
    """The record of a run; `problems` lists what could not be read."""

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
    _remedy: str | None = PrivateAttr(default=None)  # a hint if nothing of the record can be read

    @property
    def problems(self) -> tuple[str, ...]:
        """What could not be read, as sentences."""
        return self._problems

    @property
    def is_done(self) -> bool:
        """Whether all steps of the run are done."""
        return self.status == "done"

    @property
    def settings_used(self) -> tuple[SettingUsed, ...]:
        """All settings; those that were set come first."""
        used = [
            SettingUsed(path=f"{section}.{key}", value=value, origin=self.origins.get(f"{section}.{key}", DEFAULT))
            for section, values in self.settings.items()
            for key, value in values.items()
        ]
        return tuple(sorted(used, key=lambda setting: setting.is_default))

    def updated(self, **content: object) -> "RunRecord":
        """Return a copy of the record with other values for some keys."""
        record = RunRecord.model_validate({**self.content, **as_json(content)})
        record._directory = self._directory
        return record

    def setting(self, path: str) -> JsonValue:
        """Return the value of the setting `section.key`; None if there is none."""
        section, key = path.split(".")
        return self.settings.get(section, {}).get(key)

    def recorded_settings(self, section: str) -> tuple[Values, ...]:
        """Return the settings of a section: those in effect, those given, and those of the adapter's run.

        The last are the settings of the run whose adapter this run continued to train.
        """
        return tuple(part.get(section, {}) for part in (self.settings, self.asked, self.asked_of_adapter))

    def missing_error(self, purpose: str, key: str) -> ModelError:
        """Return the error for a record without a required value: its `purpose` in words, its `key` in the file."""
        reasons = [problem for problem in self._problems if problem.startswith(key.split(".")[0])]
        reason = reasons[0] if reasons else f"{key} is missing"
        return ModelError(f"{self._directory / RUN_FILE} does not say {purpose}: {reason}", hint=INCOMPLETE_HINT)

    def settings_of(self, section: str, purpose: str) -> Values:
        """Return a section of the settings.

        Raises:
            ModelError: there is none.
        """
        if section not in self.settings:
            raise self.missing_error(purpose, f"settings.{section}")
        return self.settings[section]

    def base(self) -> BaseUsed:
        """Return the base that the run was trained on.

        Raises:
            ModelError: the record names none.
        """
        purpose = "what the run was based on, and how"
        loaded = self.base_model
        if loaded is None or loaded.base_model is None:
            raise self.missing_error(purpose, "base_model.base_model")
        if self.base_model_path is None:
            raise self.missing_error(purpose, "base_model_path")
        paths = [self.base_model_path, *self.candidate_paths(loaded.base_model)]
        if self.setting("training.calibrate"):  # which is moved with the run
            paths.append(self._directory.resolve() / BASE)
        return BaseUsed(name=loaded.base_model, commit=loaded.commit, candidate_paths=tuple(dict.fromkeys(paths)))

    def candidate_paths(self, name: str) -> tuple[Path, ...]:
        """Return the paths that a relative name may refer to; empty if it is absolute."""
        if Path(name).is_absolute() or name.startswith("~"):
            return ()
        return tuple(dict.fromkeys(directory / name for directory in self._working_directories()))

    def checkpoint_candidates(self, entry: Resumption) -> tuple[Path, ...]:
        """Return the paths of the checkpoint that an entry of `resumed` may refer to, the most likely first."""
        if entry.checkpoint is None:
            return ()
        run = self._directory.resolve()
        paths = [run / entry.checkpoint]
        if entry.from_run is not None:
            paths.insert(0, Path(os.path.normpath(run / entry.from_run)))
        elif self.schema_version == 0 and not entry.checkpoint.is_absolute():  # as it was given
            paths = [*self.candidate_paths(str(entry.checkpoint)), entry.checkpoint.absolute(), *paths]
        return tuple(sorted(paths, key=lambda path: existing_path(path) is None))

    def _working_directories(self) -> Iterator[Path]:
        """Yield the directory that relative names refer to: its recorded path, then its path relative to the run."""
        if self.named_from is not None:
            yield self.named_from.directory
            yield Path(os.path.normpath(self._directory.resolve() / self.named_from.from_run))
            return
        # Version 0 did not record it; it follows from the relative name of the run itself.
        output, run = self.setting("output.directory"), self._directory.resolve()
        parts = Path(os.path.normpath(output)).parts if isinstance(output, str) else ()
        if parts and run.parts[-len(parts) :] == parts:
            yield Path(*run.parts[: -len(parts)])


def read_record(directory: Path) -> RunRecord:
    """Return the record of the run in `directory`, as far as it can be read; never raise."""
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
        return _unreadable(directory, f"{RUN_FILE} is damaged: it is not a JSON object")
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
    """Return the entry of a resumption from a checkpoint of this or another run; `checkpoint` is None on a restart."""
    if checkpoint is None:
        return Resumption(time=time, step=step, checkpoint=None)
    own = recorded_path(directory, checkpoint)
    from_run = Path(os.path.relpath(checkpoint.resolve(), directory.path.resolve())) if own.is_absolute() else None
    return Resumption(time=time, step=step, checkpoint=own, from_run=from_run)


def resumptions_in(directory: RunDirectory, record: RunRecord) -> tuple[Resumption, ...]:
    """Return the earlier resumptions in `record`, with paths relative to the run in `directory`, which resumes it."""
    if record._directory.resolve() == directory.path.resolve():
        return record.resumed
    return tuple(
        resumption(directory, entry.time, entry.step, next(iter(record.checkpoint_candidates(entry)), None))
        for entry in record.resumed
    )


def write_record(directory: RunDirectory, record: RunRecord) -> None:
    """Replace the record of a run atomically; one that may quote rows or prompts is readable by its owner only."""
    may_quote = record.error is not None or bool(record.setting("training.sample_prompts"))
    mode = PRIVATE_FILE if may_quote else USUAL_FILE
    write_file(directory.run_file, json.dumps(record.content, indent=2) + "\n", mode=mode)


def new_record(directory: RunDirectory, content: Mapping[str, object]) -> RunRecord:
    """Return a new record of the run in `directory`; relative names in it refer to the current working directory."""
    current = Path.cwd()
    named_from = {"directory": current, "from_run": os.path.relpath(current, directory.path.resolve())}
    whole = {"schema_version": SCHEMA_VERSION, "named_from": named_from, **content}
    record = RunRecord.model_validate(as_json(whole))
    record._directory = directory.path
    return record


def recorded_path(directory: RunDirectory, path: Path) -> Path:
    """Return a path as a record contains it: relative to the run if it is within it, so that the run may be moved."""
    run, absolute = directory.path.absolute(), path.absolute()
    return absolute.relative_to(run) if absolute.is_relative_to(run) else absolute


def _unreadable(directory: Path, problem: str, remedy: str = RESTORE) -> RunRecord:
    record = RunRecord()
    record._directory, record._problems, record._remedy = directory, (problem,), remedy
    return record


def _parsed(text: str) -> object:
    content = json.loads(text)
    if "\\ud" not in text.lower():
        return content
    # Lone surrogates, as from a file name that is not UTF-8, can't be encoded later.
    raw = json.dumps(content, ensure_ascii=False).encode("utf-8", "surrogatepass")
    return json.loads(raw.decode("utf-8", "replace"))


def _read(directory: Path, content: dict[str, Any]) -> RunRecord:
    problems: list[str] = []
    content = {key: _bounded(value, key, problems) for key, value in content.items()}
    while True:
        try:
            record = RunRecord.model_validate(content)
        except ValidationError as error:
            left_out: set[tuple[str, ...]] = set()
            for problem in error.errors(include_url=False):
                location = tuple(map(str, problem["loc"]))
                problems.append(f"{'.'.join(location)}: {problem['msg']}")
                if not any(location[:length] in left_out for length in range(1, len(location) + 1)):
                    left_out.add(_leave_out(content, location))
            continue
        record._directory, record._problems = directory, tuple(problems)
        return record


def _bounded(value: Any, path: str, problems: list[str], depth: int = 1) -> Any:
    """Return a copy of a value in a record, with None for values that no run writes; each adds to `problems`."""
    is_bounded = isinstance(value, int) or (isinstance(value, float) and path.startswith(FINITE))
    if is_bounded and not -LARGEST <= value <= LARGEST:  # NaN too
        problems.append(f"{path}: a number that no run has")
        return None
    if not isinstance(value, dict | list):
        return value
    if depth > MAX_DEPTH:
        problems.append(f"{path}: more than {MAX_DEPTH} levels of lists and objects")
        return None
    if isinstance(value, list):
        return [_bounded(part, f"{path}.{index}", problems, depth + 1) for index, part in enumerate(value)]
    return {key: _bounded(part, f"{path}.{key}", problems, depth + 1) for key, part in value.items()}


def _leave_out(content: dict[str, Any], location: tuple[str, ...]) -> tuple[str, ...]:
    """Remove the value at a location: a list as a whole, and a part as a whole if it lacks a required value.

    Returns:
        The location of what was removed.
    """
    parent, depth = content, 0
    for key, inner_key in pairwise(location):
        inner = parent.get(key)
        if not isinstance(inner, dict) or inner_key not in inner:
            break
        parent, depth = inner, depth + 1
    parent.pop(location[depth], None)
    return location[: depth + 1]


def as_name(value: object) -> str | None:
    """Return a value if it is a string, otherwise None."""
    return value if isinstance(value, str) else None


def as_text(value: object) -> str:
    """Return a JSON value as text for people."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return ", ".join(map(as_text, value)) or "-"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {as_text(part)}" for key, part in value.items()) or "-"
    return str(value)
