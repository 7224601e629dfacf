"""An adapter that was put on a model with towers, brought to its text decoder, which alone is loaded here.

Its targets are names, ends of names, or a pattern, all of the whole model. Which modules of the decoder they are is
asked with the names that the whole model has, by PEFT's own rules, and written down as the decoder's names.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from peft import LoraConfig
from peft.utils.other import get_pattern_key
from transformers import PreTrainedModel

from qlora_cli.adapters.keys import AdapterKey
from qlora_cli.adapters.targets import is_target, named

# What the decoder begins with in a model with towers, in the place of the decoder's own beginning.
WHOLE = ("model.language_model.", "language_model.model.", "model.text_model.")

Value = TypeVar("Value", int, float)


@dataclass(frozen=True, kw_only=True)
class Renaming:
    """What modules of the decoder begin with, `here`, and what they begin with in the whole model."""

    here: str
    whole: str

    def in_whole(self, name: str) -> str:
        """Return what a module of the decoder is called in the whole model."""
        return f"{self.whole}{name.removeprefix(self.here)}" if name.startswith(self.here) else name

    def in_decoder(self, name: str) -> str:
        """Return what a module of the whole model is called in the decoder."""
        return f"{self.here}{name.removeprefix(self.whole)}" if name.startswith(self.whole) else name


def renaming_of(keys: Iterable[AdapterKey]) -> Renaming | None:
    """Return how the file of an adapter names the decoder; None if it does so by the decoder's own names."""
    for key in keys:
        if key.module == key.in_file or ("language_model" not in key.in_file and "text_model" not in key.in_file):
            continue
        here, whole = key.module.split("."), key.in_file.split(".")
        while here and whole and here[-1] == whole[-1]:
            here.pop()
            whole.pop()
        return Renaming(here="".join(f"{part}." for part in here), whole="".join(f"{part}." for part in whole))
    return None


def has_targets(config: LoraConfig, model: PreTrainedModel) -> bool:
    """Whether `model` has a module that `config` names as a target, by PEFT's own rules."""
    return _num_named(config, model, Renaming(here="", whole="")) > 0


def renaming_by_config(config: LoraConfig, model: PreTrainedModel) -> Renaming | None:
    """Return how a config without its file of weights names the decoder; None if it may be by the decoder's names.

    It is the way by which the config names most.
    """
    here = f"{model.base_model_prefix}."
    ways = [Renaming(here=here, whole=here), *(Renaming(here=here, whole=whole) for whole in WHOLE)]
    best = max(ways, key=lambda way: _num_named(config, model, way))
    return None if best is ways[0] else best


def _num_named(config: LoraConfig, model: PreTrainedModel, renaming: Renaming) -> int:
    """Return how many modules of `model` are targets of `config`, or have a rank or scale of their own there."""
    names = [renaming.in_whole(name) for name, _ in model.named_modules() if name]
    targets = [name for name in names if is_target(config, name)]
    patterns = [list(pattern or {}) for pattern in (config.rank_pattern, config.alpha_pattern)]
    return len(targets) + sum(get_pattern_key(keys, name) in keys for keys in patterns for name in targets)


def on_decoder(config: LoraConfig, model: PreTrainedModel, renaming: Renaming) -> None:
    """Rewrite the targets of `config`, which are those of the whole model, as full names in `model`, its decoder."""
    names = [name for name, _ in model.named_modules() if name]
    whole = {name: renaming.in_whole(name) for name in names}
    targets = [name for name in names if is_target(config, whole[name])]
    if targets:  # else PEFT says that there are none
        config.target_modules = set(targets)
        config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    config.rank_pattern = _resolved(config.rank_pattern, whole)
    config.alpha_pattern = _resolved(config.alpha_pattern, whole)
    if config.modules_to_save:
        config.modules_to_save = [
            name for name in names if any(whole[name].endswith(end) for end in config.modules_to_save)
        ]
    if config.target_parameters:
        parameters = {name: renaming.in_whole(name) for name, _ in model.named_parameters()}
        wanted = set(named(parameters.values(), config.target_parameters))
        config.target_parameters = [name for name, full in parameters.items() if full in wanted]
    if isinstance(config.trainable_token_indices, dict):
        config.trainable_token_indices = {
            name: rows
            for end, rows in config.trainable_token_indices.items()
            for name in named(names, [end]) or [here for here in names if f".{whole[here]}".endswith(f".{end}")]
        }


def _resolved(pattern: Mapping[str, Value] | None, whole: Mapping[str, str]) -> dict[str, Value]:
    """Return a pattern of PEFT's by full names of the decoder, in place of patterns that the whole model matches."""
    found: dict[str, Value] = {}
    for name, full in whole.items():
        key = get_pattern_key(list(pattern or {}), full)
        if pattern and key in pattern:
            found[re.escape(name)] = pattern[key]
    return found
