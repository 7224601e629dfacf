"""Read a model's generation_config.json, and name the key that makes it invalid."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from qlora_cli.errors import ModelError
from qlora_cli.model_files.checkpoint import how_to_restore, read_json
from qlora_cli.model_files.construction import faulty_keys, is_ours, reason_of, shown

GENERATION_CONFIG = "generation_config.json"
IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
WHOLE_NUMBERS = (
    *("max_length", "max_new_tokens", "min_length", "min_new_tokens", "num_beams", "num_return_sequences", "top_k"),
    *("no_repeat_ngram_size", "num_beam_groups"),
)
NUMBERS = ("temperature", "top_p", "min_p", "typical_p", "repetition_penalty", "length_penalty")


def read_generation_config(directory: Path) -> Mapping[str, Any]:
    """Return the content of the generation_config.json in `directory`; empty if there is none.

    Raises:
        ModelError: transformers can't read it, or generating with it would fail; names the key.
    """
    file = directory / GENERATION_CONFIG
    if not file.is_file():
        return {}
    content = read_json(file)
    for key, value in content.items():
        if why := _type_problem(key, value):
            raise _refused(file, content, [key], why)
    try:
        with _without_warnings():
            GenerationConfig.from_dict(dict(content))
    except Exception as error:  # whatever transformers raises
        if is_ours(error):
            raise
        keys = faulty_keys(content, content, error, lambda values: GenerationConfig.from_dict(dict(values)))
        raise _refused(file, content, keys, reason_of(error)) from error
    return content


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Suppress transformers' warnings about flags that have no effect together: they are all kept unchanged."""
    logger = logging.getLogger(GenerationConfig.__module__)
    previous = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(previous)


def _type_problem(key: str, value: object) -> str | None:
    parts = value if isinstance(value, list) and key in IDS else [value]
    if key in (*IDS, *WHOLE_NUMBERS) and not all(part is None or type(part) is int for part in parts):
        return "it must be a whole number"
    if key in NUMBERS and not (value is None or type(value) in {int, float}):
        return "it must be a number"
    return None


def _refused(file: Path, content: Mapping[str, Any], keys: list[str], why: str) -> ModelError:
    named = ", ".join(f"{key} is {shown(content[key])}" for key in keys)
    return ModelError(
        f"{file} is not a valid generation config: {named}{': ' if named else ''}{why}",
        hint=f"Correct it there, or download it again. {how_to_restore(file.parent, file.name)}",
    )
