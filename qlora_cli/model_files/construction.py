"""Build configs and models with transformers, and find the key of a config.json that prevents it.

Whatever an architecture's code raises while it builds from a config is an error of that config. To find the key,
each is left out in turn: if its default builds instead, it is named. A bug in our own code is not caught.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from itertools import dropwhile, islice, takewhile
from pathlib import Path
from time import monotonic
from traceback import walk_tb
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

import qlora_cli
from qlora_cli.errors import MissingDependencyError, ModelError
from qlora_cli.model_files.checkpoint import how_to_restore, read_json
from qlora_cli.model_files.given_model import CONFIG

PACKAGE = Path(qlora_cli.__file__).parent
MOST_NAMED = 3
MOST_CHARACTERS = 200
# Limits on the search for a key; one that is not found within them is not named.
MOST_TRIED = 64
MOST_SECONDS = 20.0
# Sizes that are positive integers in every architecture of transformers that has them.
SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
NUM_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
NUM_CHOSEN = "num_experts_per_tok"
# No model comes near these, and more can't be built within minutes: DeepNet has 1,000 layers.
MOST_LAYERS, MOST_EXPERTS, MOST_EXPERTS_IN_ALL = 2_000, 10_000, 200_000
LAYERS, EXPERTS = re.compile(r"(\w+_)?layers?"), re.compile(r"(\w+_)?experts")
# What a config.json must not choose: kernels, which are code from the hub, other files, and devices.
IGNORED_KEYS = ("transformers_weights", "distributed_config", "fusion_config")
KERNELS = ("attn_implementation", "experts_implementation")
# Keys that describe the config itself; leaving them out does not change the model.
METADATA_KEYS = {"model_type", "architectures", "transformers_version", "_name_or_path", "auto_map"}
FLOAT, FLOATS = "__float__", ("NaN", "Infinity", "-Infinity")  # {"__float__": "Infinity"}
DEEPEST = 50  # nested lists and objects; configs have about five levels
OLDER_NAMES = {"rope_parameters": "rope_scaling", "dtype": "torch_dtype"}
VALIDATION = re.compile(r"Validation error for field '(?P<key>\w+)'")
CLASS_VALIDATION = re.compile(r"Class validation error for validator")
EXPECTED = re.compile(r"expected (?P<type>[\w ]+), got (?P<found>\w+)")


class NoConfigError(TypeError):
    """A part of a config is not a config itself."""


SELF_EXPLANATORY = (ValueError, OSError, ImportError, NoConfigError)  # whose messages need no type before them


def build_config(content: Mapping[str, Any]) -> PreTrainedConfig:
    """Return the transformers config for the content of a config.json.

    Raises:
        Exception: whatever the architecture's code raises.
    """
    kind: type[PreTrainedConfig] = CONFIG_MAPPING[content["model_type"]]
    config = kind.from_dict(_decoded(content))  # a copy: transformers changes nested values in place
    text_config(config)
    return config


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the part of `config` that the text decoder is built from; it may be the whole.

    Raises:
        Exception: whatever the architecture's code raises if a part is not a config.
    """
    text = config.get_text_config(decoder=True)
    if not isinstance(text, PreTrainedConfig):
        raise NoConfigError("it must be an object with keys of its own")
    text.to_dict()  # as building the model does
    return text


def build_model(config: PreTrainedConfig, dtype: torch.dtype, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """Return the model that `config` describes, on torch's current default device, without values in its weights.

    To draw values takes a third of the time even on the meta device, where there are none.

    Raises:
        ModelError: its architecture can't build it; names file, key and value.
        MissingDependencyError: its code needs a package that is not installed.
    """

    def build(described: PreTrainedConfig) -> PreTrainedModel:
        with no_init_weights():
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                described, dtype=dtype, trust_remote_code=trust_remote_code
            )
        model.tie_weights(recompute_mapping=False)  # which is a part of what was left out
        return model

    try:
        return build(config)
    except ImportError as error:
        raise MissingDependencyError(
            f"{config.model_type} can't be built: {reason_of(error)}", hint="Install what its code needs."
        ) from error
    except Exception as error:  # whatever the code of an architecture raises
        if is_ours(error):
            raise
        values = config.to_dict()
        changed = [] if trust_remote_code else _changed(config, values)
        keys = faulty_keys(values, changed, error, lambda content: build(type(config).from_dict(dict(content))))
        raise refused(config.name_or_path or config.model_type, values, keys, error) from error


def check_sizes(where: str, config: PreTrainedConfig) -> None:
    """Check what architectures accept and then fail on in a forward pass: sizes below one, heads that do not divide.

    Raises:
        ModelError: a size is impossible; names file, key and value.
    """
    if not isinstance(config.dtype, torch.dtype | None):
        raise refused(where, {"dtype": str(config.dtype)}, ["dtype"], "torch has no such dtype")
    values, own = config.to_dict(), {field.name for field in fields(config)}
    names = {key: config.attribute_map.get(key, key) for key in (*SIZES, *NUM_EXPERTS, NUM_CHOSEN)}
    sizes = {key: values[name] for key, name in names.items() if name in own and type(values.get(name)) is int}
    for key in SIZES:
        if sizes.get(key, 1) < 1:
            raise refused(where, values, [names[key]], "it must be at least 1")
    heads, key_value_heads = sizes.get("num_attention_heads"), sizes.get("num_key_value_heads")
    if heads and key_value_heads and heads % key_value_heads:
        keys = [names["num_attention_heads"], names["num_key_value_heads"]]
        raise refused(where, values, keys, "the first must be a multiple of the second")
    experts = {names[key]: sizes[key] for key in NUM_EXPERTS if key in sizes}
    if 1 < max(experts.values(), default=0) < sizes.get(NUM_CHOSEN, 0):  # with at most one expert there is no routing
        raise refused(where, values, [names[NUM_CHOSEN], *experts], "there are fewer experts than a token is given")


def check_dtypes(where: str, content: Mapping[str, Any]) -> None:
    """Check the dtypes that a config.json names, under either key, whichever transformers uses.

    Raises:
        ModelError: torch has no such dtype; names file, keys and values.
    """
    for part in (content, content.get("text_config")):
        written = part if isinstance(part, Mapping) else {}
        keys = [key for key in (OLDER_NAMES["dtype"], "dtype") if not _may_be_dtype(written.get(key))]
        if keys:
            raise refused(where, written, keys, "torch has no such dtype")


def _may_be_dtype(value: object) -> bool:
    """Return whether transformers accepts `value` as a dtype: a name, None, or one for each part."""
    if isinstance(value, Mapping):
        return True
    return value is None or (isinstance(value, str) and isinstance(getattr(torch, value, None), torch.dtype))


def check_bounds(where: str, content: Mapping[str, Any]) -> None:
    """Check that a config.json has no more layers and experts than can be built, before anything is built from it.

    Raises:
        ModelError: it has more; names file, key and value.
    """
    parts: list[Any] = [content]
    for part in parts:  # the list grows meanwhile
        parts += [value for value in part.values() if isinstance(value, Mapping)]
        counts = {key: value for key, value in part.items() if type(value) is int}
        layers = {key: value for key, value in counts.items() if LAYERS.fullmatch(key)}
        experts = {key: value for key, value in counts.items() if EXPERTS.fullmatch(key)}
        for sizes, most in ((layers, MOST_LAYERS), (experts, MOST_EXPERTS)):
            if excessive := [key for key, value in sizes.items() if value > most]:
                raise refused(where, part, excessive[:1], f"more than {most:,} are not built")
        in_all = max(layers.values(), default=0) * max(experts.values(), default=0)
        if in_all > MOST_EXPERTS_IN_ALL:
            raise refused(where, part, [*layers, *experts], f"more than {MOST_EXPERTS_IN_ALL:,} experts are not built")


def check_values(where: str, content: Mapping[str, Any]) -> None:
    """Check that a config.json holds no invalid floats and is not nested too deeply.

    Raises:
        ModelError: it does; names file, key and value.
    """
    for key, value in content.items():
        if why := _decoding_problem(value):
            raise refused(where, content, [key], why)


def _decoding_problem(value: Any, depth: int = 1) -> str | None:
    """Return why a value can't be decoded; None if it can."""
    if depth > DEEPEST:
        return f"it is nested too deeply (more than {DEEPEST} lists and objects in each other)"
    if isinstance(value, Mapping) and value.keys() == {FLOAT}:
        return None if value[FLOAT] in FLOATS else f"{FLOAT} must be one of {', '.join(FLOATS)}"
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return next((why for part in parts if (why := _decoding_problem(part, depth + 1))), None)


def drop_choices(config: PreTrainedConfig, content: Mapping[str, Any]) -> tuple[str, ...]:
    """Remove from `config`, read from `content`, the keys that a file must not set; return a note that names them."""
    parts = [config, *(part for key in config.sub_configs if (part := getattr(config, key, None)) is not None)]
    config._attn_implementation = None  # of its parts too
    config._experts_implementation = None
    for part in parts:
        for key in IGNORED_KEYS:
            part.__dict__.pop(key, None)
    written = [content, *(value for value in content.values() if isinstance(value, Mapping))]
    keys = [key for key in (*KERNELS, *IGNORED_KEYS) if any(one.get(key) or one.get(f"_{key}") for one in written)]
    if not keys:
        return ()
    return (f"{CONFIG}: {', '.join(keys)} ignored: a config file does not choose this",)


def refused(where: str, content: Mapping[str, Any], keys: list[str], reason: Exception | str) -> ModelError:
    """Return the error for the config.json of `where` (a directory, file or name), which `keys` make unusable."""
    path = Path(where)
    file = path / CONFIG if path.is_dir() else path
    is_file = file.is_file()
    written = _as_written(file) if is_file else {}
    named = [f"{_written_name(key, written)} is {shown(content.get(key))}" for key in keys]
    why = reason if isinstance(reason, str) else reason_of(reason)
    return ModelError(
        f"{file if is_file else f'{CONFIG} of {where}'} describes no model that can be built: "
        f"{', '.join(named)}{': ' if named else ''}{why}",
        hint=f"Correct it there, or download the file again. {how_to_restore(file.parent, file.name)}"
        if is_file
        else "Correct it there.",
    )


def faulty_keys(
    content: Mapping[str, Any],
    candidates: Iterable[str],
    error: Exception,
    builds: Callable[[Mapping[str, Any]], object],
) -> list[str]:
    """Return those of `candidates` that `content` builds without, or with null in their place.

    If `error` mentions some of them, by name or by value, only those are returned. None are if all of `content`
    builds; and not all are tried if they are many, or building takes long.
    """
    end = monotonic() + MOST_SECONDS
    if _succeeds(builds, content):
        return []
    message = str(error)
    mentioned = [key for key in candidates if _is_mentioned(key, content[key], message)][:MOST_TRIED]
    rest = [key for key in candidates if key not in mentioned][: MOST_TRIED - len(mentioned)]

    def is_faulty(key: str) -> bool:
        without = {other: value for other, value in content.items() if other != key}
        return any(_succeeds(builds, changed) for changed in (without, {**without, key: None}))

    def faulty_among(keys: Iterable[str]) -> list[str]:
        tried = takewhile(lambda _: monotonic() < end, keys)
        return list(islice(filter(is_faulty, tried), MOST_NAMED))

    return faulty_among(mentioned) or faulty_among(rest)


def _succeeds(builds: Callable[[Mapping[str, Any]], object], content: Mapping[str, Any]) -> bool:
    try:
        builds(content)
    except Exception:  # noqa: BLE001 - it fails as before, or otherwise, whatever it raises
        return False
    return True


def is_ours(error: BaseException) -> bool:
    """Return whether an error raised in a library call comes from our own code or passed through it."""
    if isinstance(error, NoConfigError):
        return False
    frames = [Path(frame.f_code.co_filename).is_relative_to(PACKAGE) for frame, _ in walk_tb(error.__traceback__)]
    below = list(dropwhile(bool, frames))  # the frames of the library and of what it called
    return not below or any(below)


def reason_of(error: Exception) -> str:
    """Return the message of `error` in one line, with its type where the message alone is unclear."""
    text = str(error)
    if field := VALIDATION.search(text):
        types = [match for match in EXPECTED.findall(text) if match[0] != "NoneType"]
        return f"it must be {' or '.join(dict.fromkeys(kind for kind, _ in types))}" if types else field[0]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    last = lines[-1] if lines else ""
    if CLASS_VALIDATION.match(text):
        last = last.removeprefix("ValueError: ")
    elif not last or not isinstance(error, SELF_EXPLANATORY):
        last = f"{type(error).__name__}: {last}".removesuffix(": ")
    return last if len(last) <= MOST_CHARACTERS else f"{last[:MOST_CHARACTERS]}…"


def _decoded(value: Any) -> Any:
    """Return a copy of a JSON file's content, with floats for the values that JSON can't express."""
    if isinstance(value, Mapping):
        return float(value[FLOAT]) if value.keys() == {FLOAT} else {key: _decoded(part) for key, part in value.items()}
    return [_decoded(part) for part in value] if isinstance(value, list) else value


def _changed(config: PreTrainedConfig, values: Mapping[str, Any]) -> list[str]:
    """Return the keys of `values`, the content of `config`, that differ from the default of its class."""
    try:
        default = type(config)().to_dict()
    except Exception:  # noqa: BLE001 - some classes have no default, and raise what they like
        default = {}
    return [key for key, value in values.items() if key not in METADATA_KEYS and default.get(key) != value]


def _is_mentioned(key: str, value: object, message: str) -> bool:
    parts = value.values() if isinstance(value, Mapping) else [value]
    values = [str(part) for part in parts if isinstance(part, str | int) and not isinstance(part, bool)]
    return any(re.search(rf"(?<![\w-]){re.escape(word)}(?!\w)", message) for word in (key, *values) if word)


def _as_written(file: Path) -> Mapping[str, Any]:
    content = read_json(file)
    text = content.get("text_config")
    return {**content, **text} if isinstance(text, Mapping) else content


def _written_name(key: str, written: Mapping[str, Any]) -> str:
    older = OLDER_NAMES.get(key, key)
    return older if older in written and key not in written else key


def shown(value: object) -> str:
    """Return a value as JSON, truncated to one line."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]}…"
