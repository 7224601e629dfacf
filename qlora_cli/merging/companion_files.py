"""Write the companion files of merged weights, which make them usable: configs, tokenizer, licence."""

import json
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from qlora_cli.errors import MergeError
from qlora_cli.merging.planning.inputs import COPIED_FILES, Inputs
from qlora_cli.merging.planning.merge_plan import WRITTEN_IN, MergePlan
from qlora_cli.merging.verifying.texts import PROMPTS
from qlora_cli.model_files.checkpoint import read_json
from qlora_cli.model_files.generation import GENERATION_CONFIG
from qlora_cli.model_files.given_model import CONFIG
from qlora_cli.settings.choices import MergeDtype
from qlora_cli.tokenizing.tokenizer import LoadedTokenizer
from qlora_cli.writing import copy_file, escapes_directory

CODE = "*.py"
TOKENIZER_CONFIG, WRITTEN_BY_5 = "tokenizer_config.json", "TokenizersBackend"
SENTENCEPIECE = "tokenizer.model"  # transformers neither needs nor writes it; llama.cpp needs it for some models


def write_companion_files(inputs: Inputs, plan: MergePlan, target: Path) -> None:
    """Write everything but the weights and the card of a merged model to `target`.

    The config is that of the base, verbatim except for what training and merging changed.
    """
    tokenizer = inputs.tokenizer.tokenizer
    tokenizer.save_pretrained(target)
    _name_class(inputs.source.path, target)
    _copy_files(inputs, target)
    config = read_json(inputs.source.path / CONFIG)
    write_json(target / CONFIG, _config(config, inputs, plan))
    generation = inputs.source.path / GENERATION_CONFIG
    content = read_json(generation) if generation.is_file() else {"_from_model_config": True}
    write_json(
        target / GENERATION_CONFIG, {**content, **_end_tokens({**_text_part(config), **content}, inputs.tokenizer)}
    )


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file as transformers does."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _name_class(base: Path, target: Path) -> None:
    """Name the tokenizer class as the base does: transformers 4 does not know the name that version 5 writes."""
    theirs, ours = base / TOKENIZER_CONFIG, target / TOKENIZER_CONFIG
    if not (theirs.is_file() and ours.is_file()):
        return
    name, content = read_json(theirs).get("tokenizer_class"), read_json(ours)
    if isinstance(name, str) and content.get("tokenizer_class") == WRITTEN_BY_5:
        write_json(ours, {**content, "tokenizer_class": name})


def _copy_files(inputs: Inputs, target: Path) -> None:
    patterns = (*COPIED_FILES, CODE) if inputs.request.model.trust_remote_code else COPIED_FILES
    for path in sorted(inputs.source.path.iterdir()):
        if path.is_file() and not escapes_directory(path) and any(fnmatch(path.name, pattern) for pattern in patterns):
            copy_file(path, target / path.name)
    of_tokenizer = inputs.source.tokenizer_path / SENTENCEPIECE
    of_base = inputs.source.path / SENTENCEPIECE
    if of_tokenizer.is_file() and not escapes_directory(of_tokenizer):
        copy_file(of_tokenizer, target / SENTENCEPIECE)
    elif of_base.is_file() and not escapes_directory(of_base) and not _has_more_tokens(inputs):
        copy_file(of_base, target / SENTENCEPIECE)


def _has_more_tokens(inputs: Inputs) -> bool:
    """Return whether the adapter has tokens that the base's tokenizer lacks."""
    trained = (inputs.source.run_model or {}).get("new_tokens")
    return bool(inputs.base.extended or trained)


def _config(config: Mapping[str, Any], inputs: Inputs, plan: MergePlan) -> dict[str, Any]:
    config = dict(config)
    config.pop("quantization_config", None)
    text = dict(_text_part(config))
    text.pop("quantization_config", None)
    text |= _positions(text, inputs.config_changes)
    text |= _end_tokens(text, inputs.tokenizer)
    if (dtype := _dtype(inputs)) is not None:
        for part in (text, config):
            part.pop("torch_dtype", None)  # the older name, which would take precedence
            part["dtype"] = str(dtype).removeprefix("torch.")
    if isinstance(config.get("text_config"), Mapping):
        config["text_config"] = text
    else:
        config |= text
    if plan.unties:
        config["tie_word_embeddings"] = False
        if isinstance(config.get("text_config"), dict):
            config["text_config"]["tie_word_embeddings"] = False
    return config


def _positions(text: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return `changes` with rotary positions in the form of the base's config: under the older name, if it has that.

    The layout of image positions (`mrope_section`), which the text decoder does not have, is preserved.
    """
    new = changes.get("rope_parameters")
    if new is None or any(isinstance(value, Mapping) for value in new.values()):
        return dict(changes)
    old = text.get("rope_parameters") or text.get("rope_scaling") or {}
    new = {**{key: value for key, value in old.items() if key.startswith("mrope")}, **new}
    rest = {key: value for key, value in changes.items() if key != "rope_parameters"}
    if "rope_theta" not in text:
        return {**rest, "rope_parameters": new}
    # As transformers 4 wrote it; older tools read only this form, newer ones read it, too.
    return {**rest, "rope_theta": new.pop("rope_theta"), "rope_scaling": new}


def _text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    text = config.get("text_config")
    return text if isinstance(text, Mapping) else config


def _dtype(inputs: Inputs) -> torch.dtype | None:
    """Return the dtype that the model is written in, if it differs from the base's."""
    if inputs.request.merge.dtype != MergeDtype.KEEP:
        return WRITTEN_IN[inputs.request.merge.dtype]
    return inputs.base.layout.dtype if inputs.base.packed else None


def _end_tokens(config: Mapping[str, Any], loaded: LoadedTokenizer) -> dict[str, Any]:
    """Return the ids that end and pad generation, with the end tokens of training added."""
    known = config.get("eos_token_id")
    ends: list[int] = list(known) if isinstance(known, list) else [] if known is None else [known]
    if loaded.tokenizer.eos_token_id not in ends:
        ends.insert(0, loaded.tokenizer.eos_token_id)
    ends += sorted(loaded.end_ids - set(ends))
    return {"eos_token_id": ends if len(ends) > 1 else ends[0], "pad_token_id": loaded.tokenizer.pad_token_id}


def check_tokenizer(inputs: Inputs, target: Path) -> None:
    """Check that the tokenizer in `target`, read back, is the one of training.

    Raises:
        MergeError: it is not.
    """
    trained = inputs.tokenizer.tokenizer
    written = AutoTokenizer.from_pretrained(target, trust_remote_code=inputs.request.model.trust_remote_code)
    is_same = written.get_vocab() == trained.get_vocab() and written.chat_template == trained.chat_template
    if not is_same or any(written(text)["input_ids"] != trained(text)["input_ids"] for text in PROMPTS):
        raise MergeError(
            "the tokenizer that was written encodes text differently from the one that was trained with",
            hint="Please report it with the name of the base, and copy the tokenizer of the adapter by hand.",
        )
