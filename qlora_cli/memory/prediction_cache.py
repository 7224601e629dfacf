"""A cache of predictions on disk, by the request, the model's config, and the versions of all code that computes.

A cached prediction costs no import of torch, and is never stale: the code itself is part of the key.
"""

import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from qlora_cli.cache import cache_folder, code_digests, digest_of, is_digest, versions_of
from qlora_cli.files import as_json
from qlora_cli.memory.prediction import MemoryReport
from qlora_cli.memory.request import MemoryRequest
from qlora_cli.settings.models import all_settings, metadata_of
from qlora_cli.timing.rates_file import rates_digest
from qlora_cli.writing import PRIVATE_FILE, private_folder, unsafe_reason, write_file

COMPUTING = ("torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate")
# The packages and data of this project that a prediction depends on.
PARTS = (
    "memory",
    "timing",
    "loading",
    "attention",
    "loss",
    "adapters",
    "quantization",
    "model_files",
    "settings",
    "tokenizing",
    "hardware",
    "memory/models.json",
    "presets/predicted.json",
)
# Parsed values are in the key; the file of a plot, and what a prediction is compared with, change nothing.
UNKEYED = ("gpus", "sweep", "prices", "plot", "write_lock", "check", "max_change")
OF_RUN = ("training.epochs", "training.max_steps", "output.max_checkpoints")  # on which memory does not depend
OF_STRATEGY = ("training.auto_micro_batch",)  # with which `--strategy auto` does not shard the base
KEYED = (*OF_RUN, *OF_STRATEGY)  # in addition to settings that say so themselves
MAX_PREDICTIONS = 500


def key_of(request: MemoryRequest, content: Mapping[str, Any]) -> str:
    """Return the key of the prediction for `request` and a model with this config."""
    settings = request.asked.settings
    values = settings.model_dump(mode="json")
    prediction = {key: value for key, value in values["inspect_memory"].items() if key not in UNKEYED}
    asked = {**prediction, "gpus": [dataclasses.asdict(gpu) for gpu in request.gpus], "sweep": request.sweep}
    asked["prices"] = dict(request.prices)
    asked["rows of the data"] = None if request.rows is None else request.rows.digest
    for path in (path for path in all_settings() if metadata_of(path).affects_memory or path in KEYED):
        section, key = path.split(".")
        asked[path] = values[section][key]
        # The default of a setting that is not given may depend on the model.
        asked[f"{path} is given"] = request.asked.is_given(path)
    parts = [json.dumps(as_json(asked), sort_keys=True), json.dumps(as_json(dict(content)), sort_keys=True)]
    return digest_of([*parts, sys.version, *versions_of(COMPUTING), *code_digests(PARTS), rates_digest()])


def load(key: str) -> MemoryReport | None:
    """Return the prediction under `key`; None if there is none, or it can't be read."""
    file = cache_folder("memory") / f"{key}.json"
    try:
        if unsafe_reason(file) is not None:
            return None
        return TypeAdapter(MemoryReport).validate_json(file.read_bytes())
    except (OSError, ValidationError):
        return None


def store(key: str, report: MemoryReport) -> None:
    """Store a prediction; if it can't be written, it is computed again the next time."""
    folder = cache_folder("memory")
    try:
        private_folder(folder)
        write_file(folder / f"{key}.json", json.dumps(as_json(dataclasses.asdict(report))), mode=PRIVATE_FILE)
        _delete_oldest(folder)
    except OSError:  # a full or read-only disk costs time only
        return


def _delete_oldest(folder: Path) -> None:
    predictions = [path for path in folder.glob("*.json") if is_digest(path.stem) and not path.is_symlink()]
    by_age = sorted(predictions, key=lambda path: path.stat().st_mtime)
    for path in by_age[:-MAX_PREDICTIONS]:
        path.unlink(missing_ok=True)
