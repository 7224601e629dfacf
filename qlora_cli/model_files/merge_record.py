"""The record of a merged model, for programs: what it was merged from, how, and how it was verified."""

import json
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from qlora_cli.errors import ModelError
from qlora_cli.files import as_json, read_small

MERGE_FILE = "merge.json"
MERGE_SCHEMA_VERSION = 1  # a record without one has version 0


class _RecordPart(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True)


class MergedAdapter(_RecordPart):
    """An adapter that was merged. `sha256` is the digest of its weights, `step` the step of its run."""

    name: str | None = None
    weight: float | None = None
    kind: str | None = None
    sha256: str | None = None
    step: int | None = None
    run_is_done: bool | None = None


class MergedRows(_RecordPart):
    """The data that the first adapter's run was trained on."""

    name: str
    rows_trained: int | None = None
    supervised_tokens: int | None = None
    fingerprint: str | None = None


class MergeRecord(_RecordPart):
    """The record of a merge. It may be published with the weights, so local paths are reduced to their last part.

    `request` is the settings that change what is written, `files` the size in bytes of every other file next to it.
    """

    schema_version: int = 0
    written_by: str | None = None
    written: str | None = None
    versions: Mapping[str, str] = {}
    format: str | None = None
    base_model: str | None = None
    commit: str | None = None
    adapters: tuple[MergedAdapter, ...] = ()
    data: tuple[MergedRows, ...] = ()
    base: str | None = None
    base_choice: JsonValue = None
    dtype: str | None = None
    num_tensors: int | None = None
    num_merged_tensors: int | None = None
    verification: JsonValue = None
    requantized: JsonValue = None
    request: Mapping[str, JsonValue] | None = None
    base_model_digest: str | None = None
    files: Mapping[str, int] | None = None
    merge_seconds: float | None = None
    peak_host_bytes: int | None = None


def new_merge_record(content: Mapping[str, object]) -> MergeRecord:
    """Return a record of this version."""
    return MergeRecord.model_validate(as_json({"schema_version": MERGE_SCHEMA_VERSION, **content}))


def read_merge_record(directory: Path) -> MergeRecord | None:
    """Return the record of a merged model; None if there is none.

    Raises:
        ModelError: it can't be read, or was written by a newer version.
    """
    file = directory / MERGE_FILE
    if not file.is_file():
        return None
    hint = "Merge it again."
    try:
        record = MergeRecord.model_validate(json.loads(read_small(file)))
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        location = ".".join(map(str, problem["loc"])) or "it"
        raise ModelError(f"{file} is damaged: {location}: {problem['msg']}", hint=hint) from error
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{file} can't be read: {error}", hint=hint) from error
    if record.schema_version > MERGE_SCHEMA_VERSION:
        raise ModelError(
            f"{file} is of schema version {record.schema_version}, and this qlora knows versions up to "
            f"{MERGE_SCHEMA_VERSION}",
            hint="Update qlora: pip install -U qlora-cli, or merge it again.",
        )
    return record
