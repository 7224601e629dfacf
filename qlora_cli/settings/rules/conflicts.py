"""Settings that have no effect with others, or can't work together: an error, never silently ignored."""

from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from enum import StrEnum
from functools import partial
from typing import Any

from qlora_cli.errors import Problem
from qlora_cli.settings.choices import Mixing, Sampling
from qlora_cli.settings.models import (
    DataSettings,
    EstimateDataSettings,
    Section,
    TrainingSettings,
    metadata_of,
)
from qlora_cli.settings.rules.conflict import Conflict
from qlora_cli.settings.rules.conflicts_calibrating import calibrating_conflicts
from qlora_cli.settings.rules.conflicts_commands import (
    generation_conflicts,
    load_conflicts,
    loading_conflicts,
    prediction_conflicts,
    push_conflicts,
)
from qlora_cli.settings.rules.conflicts_lora import lora_conflicts
from qlora_cli.settings.rules.conflicts_training import (
    attention_conflicts,
    evaluation_conflicts,
    sharding_conflicts,
    training_conflicts,
)
from qlora_cli.settings.rules.objective_rules import objective_conflicts
from qlora_cli.settings.setting_metadata import field_metadata
from qlora_cli.settings.value_sources import SettingEntry
from qlora_cli.settings.values import either, held_out_share


def find_conflicts(validated: Mapping[str, Any], merged: Mapping[str, SettingEntry]) -> list[Problem]:
    """Return the problems of validated settings as a whole; `merged` records where each came from."""
    conflicts = [*_run_conflicts(validated), *_command_conflicts(validated)]
    if (lora := validated.get("lora")) is not None:
        conflicts += lora_conflicts(lora, validated["quantization"].method)
        conflicts += calibrating_conflicts(validated)
    elif (quantization := validated.get("quantization")) is not None and "inspect_data" not in validated:
        conflicts += load_conflicts(quantization)
    for name, section in validated.items():
        conflicts += ineffective_settings(name, section, given=merged)
    changed = {
        path: entry
        for path, entry in merged.items()
        if entry.section in validated and not is_default(validated[entry.section], entry.key)
    }
    problems = [
        Problem(where=_where(changed[path], message), message=message, hint=hint)
        for path, message, hint in conflicts
        if path in changed
    ]
    return problems + forbidden_in_files(merged)


def _where(entry: SettingEntry, message: str) -> str:
    """Return where a value came from, with the setting's name unless the message contains it."""
    return entry.origin.where if entry.path in message else entry.origin.locate(entry.path)


def _run_conflicts(validated: Mapping[str, Any]) -> list[Conflict]:
    """Return the conflicts of a training run and its data."""
    conflicts: list[Conflict] = []
    data, training = (validated.get(section) for section in ("data", "training"))
    if training is not None:
        conflicts += training_conflicts(training)
        conflicts += attention_conflicts(training, validated["model"].attention)
        conflicts += sharding_conflicts(validated)
        conflicts += objective_conflicts(validated)
    # A prediction reads no data.
    if training is not None and isinstance(data, DataSettings) and not isinstance(data, EstimateDataSettings):
        conflicts += evaluation_conflicts(training, data)
        conflicts += _data_conflicts(data, training)
        conflicts += _streaming_conflicts(data, training)
    return conflicts


def _command_conflicts(validated: Mapping[str, Any]) -> list[Conflict]:
    """Return the conflicts within the sections of single commands."""
    checks: Mapping[str, Callable[[Any], Iterable[Conflict]]] = {
        "generate": generation_conflicts,
        "inspect_memory": prediction_conflicts,
        "load": loading_conflicts,
        "output": partial(push_conflicts, "output"),
        "merge": partial(push_conflicts, "merge"),
    }
    return [conflict for name, check in checks.items() if name in validated for conflict in check(validated[name])]


def _data_conflicts(data: DataSettings, training: TrainingSettings) -> list[Conflict]:
    conflicts = []
    share = None if data.eval_split is None else held_out_share(data.eval_split)
    if data.eval_dataset is None and data.eval_split is None and training.eval_steps is not None:
        hint = "Give --eval-dataset or --eval-split, or leave eval_steps out."
        conflicts.append(("training.eval_steps", "training.eval_steps has no effect without held-out data", hint))
    if data.eval_dataset is None and data.eval_split is None and data.eval_group is not None:
        message = "data.eval_group has no effect without held-out data"
        conflicts.append(
            ("data.eval_group", message, "Give --eval-split or --eval-dataset, or leave --eval-group out.")
        )
    if share is not None and data.eval_dataset is not None:
        message = f"{data.eval_split} would hold rows out of the training data, and --eval-dataset names held-out data"
        conflicts.append(("data.eval_split", message, "Leave one of them out."))
    if data.mixing != Mixing.WEIGHTS and len(data.dataset) == 1:
        conflicts.append(
            ("data.mixing", "data.mixing has no effect on a single data set", "Give several, or leave it out.")
        )
    if data.packing:
        for path, is_set in (
            ("training.sampling", training.sampling == Sampling.GROUP_BY_LENGTH),
            ("training.longest_first", training.longest_first),
        ):
            if is_set:
                message = f"{path} has no effect with packing: packed rows have about the same length"
                conflicts.append((path, message, "Leave it or --packing out."))
        if training.micro_batch_tokens is not None:
            message = "training.micro_batch_tokens has no effect with packing: rows are joined to --max-length already"
            conflicts.append(("training.micro_batch_tokens", message, "Leave it or --packing out."))
    return conflicts


def _streaming_conflicts(data: DataSettings, training: TrainingSettings) -> list[Conflict]:
    """Return the conflicts of a stream with settings that need all rows."""
    if not data.streaming:
        return []
    share = None if data.eval_split is None else held_out_share(data.eval_split)
    needs = (
        ("data.eval_split", data.eval_dataset is None and share is not None, "to hold rows out"),
        ("data.drop_duplicates", data.drop_duplicates, "to know duplicates"),
        ("training.sampling", training.sampling != Sampling.RANDOM, "to order them"),
        ("training.longest_first", training.longest_first, "to know the longest"),
    )
    conflicts = [
        (
            path,
            f"{path} needs to read all rows before the first step {why}, and data.streaming does not",
            "Leave one out.",
        )
        for path, is_set, why in needs
        if is_set
    ]
    if data.mixing != Mixing.WEIGHTS:
        message = "data.mixing has no effect on a stream: its weights are the probabilities of an endless draw"
        conflicts.append(("data.mixing", message, "Leave it out."))
    if training.max_steps is None:
        message = "a stream has no known end: training.max_steps must say where to stop"
        conflicts.append(("data.streaming", message, "Give --max-steps."))
    return conflicts


def ineffective_settings(name: str, section: Section, *, given: Container[str] | None = None) -> Iterator[Conflict]:
    """Yield the settings of a section that have no effect because of another one, by `effective_with`.

    `given` are the settings that were given, before all are settled: the other setting may be inherited from the run.
    """
    for key, field in type(section).model_fields.items():
        needed = field_metadata(field).effective_with
        if needed is None or section.has_effect(key) or is_off_or_default(section, key):
            continue
        path, other_path = f"{name}.{key}", f"{name}.{needed.key}"
        if given is not None and other_path not in given and metadata_of(other_path).is_inherited:
            continue
        flag, other = metadata_of(other_path).flag, getattr(section, needed.key)
        needs = f"{flag} {either([value.value for value in needed.values])}"
        context = f"without {needs}" if isinstance(other, tuple) else f"with {flag} {other.value}"
        message = f"{path} has no effect {context}{': ' if needed.why else ''}{needed.why}"
        yield path, message, f"Leave it out, or use {needs}."


def is_off_or_default(section: Section, key: str) -> bool:
    """Return whether a setting is off or at its default: then it does no harm that it has no effect."""
    value = getattr(section, key)
    is_off = value is None or value is False or (isinstance(value, StrEnum) and value.value in {"auto", "none", "off"})
    return is_off or is_default(section, key)


def is_default(section: Section, key: str) -> bool:
    """Return whether a setting has its default value."""
    field = type(section).model_fields[key]
    return bool(getattr(section, key) == field.get_default(call_default_factory=True))


def forbidden_in_files(merged: Mapping[str, SettingEntry]) -> list[Problem]:
    """Return the settings that a settings file enables and must not."""
    return [
        Problem(
            where=entry.origin.locate(path),
            message="can't be enabled in a settings file: it runs code that comes with the model",
            hint=f"Give {metadata_of(path).flag} on the command line if you trust the model's author.",
        )
        for path, entry in merged.items()
        if metadata_of(path).is_forbidden_in_files and entry.origin.kind == "file" and entry.value is not False
    ]
