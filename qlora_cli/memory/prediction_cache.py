"""Answers that were given before, kept on disk: by what was asked, the config, and the versions of all that computes.

A question whose answer is here costs no import of torch. A stale answer is impossible: the code itself is in the key.
"""

import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from qlora_cli.cache import cache_folder, digest_of, digests_of_code, is_name, versions_of
from qlora_cli.files import as_json
from qlora_cli.memory.prediction import MemoryReport
from qlora_cli.memory.request import MemoryRequest
from qlora_cli.settings.models import all_settings, marks
from qlora_cli.writing import PRIVATE_FILE, not_in_place, private_folder, write_file

COMPUTING = ("torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate")
# Of our own code: what an answer depends on.
PARTS = ("memory", "loading", "adapters", "quantization", "model_files", "settings", "tokenizing", "hardware")
WORDS = ("gpus", "sweep", "plot")  # of the question: what is read of them counts, and where a picture goes does not
MOST_ANSWERS = 500


def key_of(request: MemoryRequest, content: Mapping[str, Any]) -> str:
    """Return the name that the answer to `request` about a model with this config goes by."""
    settings = request.asked.settings
    values = settings.model_dump(mode="json")
    question = {key: value for key, value in values["inspect_memory"].items() if key not in WORDS}
    asked = {**question, "gpus": [dataclasses.asdict(gpu) for gpu in request.gpus], "sweep": request.sweep}
    for path in (path for path in all_settings() if marks(path).affects_memory):
        section, key = path.split(".")
        asked[path] = values[section][key]
        # What is not given depends on the model, or on whose run it is.
        asked[f"{path} is given"] = request.asked.is_given(path)
    parts = [json.dumps(as_json(asked), sort_keys=True), json.dumps(as_json(dict(content)), sort_keys=True)]
    return digest_of([*parts, sys.version, *versions_of(COMPUTING), *digests_of_code(PARTS)])


def recall(key: str) -> MemoryReport | None:
    """Return the answer kept under `key`; None if there is none that can be read."""
    file = cache_folder("memory") / f"{key}.json"
    try:
        if not_in_place(file) is not None:
            return None
        return TypeAdapter(MemoryReport).validate_json(file.read_bytes())
    except (OSError, ValidationError):
        return None


def keep(key: str, report: MemoryReport) -> None:
    """Keep an answer; where it can't be written, it is computed anew another time."""
    place = cache_folder("memory")
    try:
        private_folder(place)
        write_file(place / f"{key}.json", json.dumps(as_json(dataclasses.asdict(report))), mode=PRIVATE_FILE)
        _forget_oldest(place)
    except OSError:  # a full or read-only disk: nothing is lost but time
        return


def _forget_oldest(place: Path) -> None:
    own = [path for path in place.glob("*.json") if is_name(path.stem) and not path.is_symlink()]
    found = sorted(own, key=lambda path: path.stat().st_mtime)
    for path in found[:-MOST_ANSWERS]:
        path.unlink(missing_ok=True)
