"""Check the model that the user named before anything is downloaded: a hub id, or the files of a directory.

Neither the network nor torch is needed.
"""

import re
from collections.abc import Collection
from pathlib import Path

from qlora_cli.errors import ModelError, ModelNotFoundError, QloraError
from qlora_cli.files import existing_path
from qlora_cli.model_files.adapter_files import ADAPTER_CONFIG, ADAPTER_PICKLE, ADAPTER_WEIGHTS, read_adapter_config
from qlora_cli.model_files.checkpoint import check_present, no_weights, weights_entry
from qlora_cli.runs.directory import RunDirectory
from qlora_cli.runs.record import load_record
from qlora_cli.runs.run_weights import is_complete, may_have_weights, missing_weights
from qlora_cli.settings.models import ModelSettings

HUB_ID = re.compile(r"(?=.{1,96}$)[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
CONFIG = "config.json"
# The files that a tokenizer's vocabulary is read from; its config alone is not enough.
VOCABULARY = (
    *("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt", "spiece.model", "tekken.json"),
    "sentencepiece.bpe.model",
)


def looks_local(name: str) -> bool:
    """Return whether `name` can only be a path: it exists, or is written as one."""
    return name.startswith(("/", "./", "../", "~", "\\")) or name in {".", ".."} or existing_path(name) is not None


def check_model_name(settings: ModelSettings) -> QloraError | None:
    """Return what is wrong with the model's name, as far as can be checked at once and locally."""
    name = settings.name
    if looks_local(name):
        path = existing_path(name)
        if path is None:
            return ModelNotFoundError(f"no model at {name}: no such directory", hint="Check the path.")
        if problem := check_path(path, settings.revision):
            return problem
        if RunDirectory(path).is_run:
            return _check_run(RunDirectory(path), settings)
        problem = check_directory(path, settings)
        is_adapter = problem is not None or (path / ADAPTER_CONFIG).is_file()
        return problem if is_adapter else base_model_problem(name, settings)
    if not HUB_ID.fullmatch(name):
        return ModelNotFoundError(
            f"no model at {name!r}: no such directory, and not a hub id",
            hint="Give a local directory or a hub id such as meta-llama/Llama-3.1-8B.",
        )
    return None


def has_vocabulary(directory: Path) -> bool:
    """Return whether a directory holds the vocabulary of a tokenizer."""
    return any((directory / file).is_file() for file in VOCABULARY)


def check_path(path: Path, revision: str | None) -> QloraError | None:
    """Return why a path can't be the directory of a model."""
    if not path.is_dir():
        if path.suffix == ".gguf":
            return _gguf_error(str(path))
        return ModelError(f"{path} is a file", hint="Give the directory that holds config.json and the weights.")
    if revision is not None:
        return ModelError(
            f"a revision ({revision}) has no meaning for the local directory {path}",
            hint="Leave --revision out, or give a hub id.",
        )
    return None


def _check_run(run: RunDirectory, settings: ModelSettings) -> QloraError | None:
    """Return what is wrong with a run, as far as can be checked without reading all of its weights."""
    try:
        record = load_record(run.path)
    except ModelError as error:
        return error
    if not may_have_weights(run):
        return missing_weights(run, record)
    return check_directory(run.adapter, settings) if is_complete(run, record) else None


def check_directory(path: Path, settings: ModelSettings) -> QloraError | None:
    """Return what is wrong with the directory of a model or an adapter, by its file names and small files."""
    names = [file.relative_to(path).as_posix() for file in path.iterdir()]
    if problem := check_files(str(path), names, settings):
        return problem
    entry = weights_entry(names, allow_pickle=settings.allow_pickle)
    weights = entry or (ADAPTER_WEIGHTS if ADAPTER_WEIGHTS in names else ADAPTER_PICKLE)
    try:
        check_present(path, [name for name in (CONFIG, ADAPTER_CONFIG, weights, VOCABULARY[0]) if name in names])
        if ADAPTER_CONFIG in names:
            read_adapter_config(path)
    except ModelError as error:
        return error
    return None


def check_files(where: str, names: Collection[str], settings: ModelSettings) -> QloraError | None:
    """Return what is wrong with a model that consists of the files `names`."""
    entry = weights_entry(names, allow_pickle=settings.allow_pickle)
    if ADAPTER_CONFIG in names:
        if entry is not None:
            return ModelError(
                f"{where} holds both a whole model ({entry}) and an adapter ({ADAPTER_CONFIG}): either may be meant",
                hint="Give a directory that holds only one of them.",
            )
        return _check_adapter_files(where, names, settings)
    if entry is None and {ADAPTER_WEIGHTS, ADAPTER_PICKLE} & set(names):
        return ModelError(
            f"{where} has the weights of an adapter, but no {ADAPTER_CONFIG}",
            hint=f"Copy {ADAPTER_CONFIG} again from where the adapter came from.",
        )
    if entry is None and any(name.endswith(".gguf") for name in names):
        return _gguf_error(where)
    if CONFIG not in names:
        return ModelError(f"{where} has no {CONFIG}", hint="Give a directory written by save_pretrained.")
    return no_weights(where, names) if entry is None else None


def _gguf_error(where: str) -> ModelError:
    return ModelError(
        f"{where} is in GGUF, the format of llama.cpp: it is quantized for inference and can't be trained",
        hint="Give the 16-bit model that it was made from.",
    )


def _check_adapter_files(where: str, names: Collection[str], settings: ModelSettings) -> QloraError | None:
    if ADAPTER_WEIGHTS in names or (settings.allow_pickle and ADAPTER_PICKLE in names):
        return None
    if ADAPTER_PICKLE in names:
        return ModelError(
            f"the adapter in {where} is a pickle ({ADAPTER_PICKLE}), which can run any code when it is read",
            hint="Save it again with a current PEFT, or use --allow-pickle if you trust its author.",
        )
    return ModelError(f"the adapter in {where} has no {ADAPTER_WEIGHTS}", hint="Save it again, or copy all of it.")


def base_model_problem(name: str, settings: ModelSettings) -> ModelError | None:
    """Return the error if `--base-model` is given although `name` is a whole model."""
    if settings.base_model is None:
        return None
    return ModelError(
        f"{settings.base_model} has no effect: {name} is a whole model, not an adapter or a run",
        hint="Leave it out, or name the adapter as the model.",
        setting="model.base_model",
    )
