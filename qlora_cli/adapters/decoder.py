"""Convert an adapter of a model with towers to its text decoder, the only part that is loaded here.

Its targets are names, suffixes or a pattern for the names of the whole model. They are matched with those names, by
PEFT's own rules, and replaced by the names of the matching modules in the decoder.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from peft import LoraConfig
from peft.utils.other import get_pattern_key
from transformers import PreTrainedModel

from qlora_cli.adapters.keys import AdapterKey
from qlora_cli.adapters.targets import is_target, names_ending_in

# The prefixes of the decoder in a model with towers, which replace the prefix of the decoder itself.
WHOLE_PREFIXES = ("model.language_model.", "language_model.model.", "model.text_model.")

Value = TypeVar("Value", int, float)


@dataclass(frozen=True, kw_only=True)
class Renaming:
    """The prefixes of the decoder's modules: `here`, in the decoder, and in the whole model."""

    here: str
    whole: str

    def in_whole(self, name: str) -> str:
        """Return the name in the whole model of a module of the decoder."""
        return f"{self.whole}{name.removeprefix(self.here)}" if name.startswith(self.here) else name

    def in_decoder(self, name: str) -> str:
        """Return the name in the decoder of a module of the whole model."""
        return f"{self.here}{name.removeprefix(self.whole)}" if name.startswith(self.whole) else name


def renaming_of(keys: Iterable[AdapterKey]) -> Renaming | None:
    """Return the renaming from the decoder's names to those in an adapter's file; None if they are the same."""
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
    """Return whether `model` has a module that `config` targets, by PEFT's own rules."""
    return _num_targets(config, model, Renaming(here="", whole="")) > 0


def renaming_by_config(config: LoraConfig, model: PreTrainedModel) -> Renaming | None:
    """Return the renaming with which a config, whose weights are not known, targets most modules of the decoder.

    Return None if the decoder's own names match as many.
    """
    here = f"{model.base_model_prefix}."
    renamings = [Renaming(here=here, whole=here), *(Renaming(here=here, whole=whole) for whole in WHOLE_PREFIXES)]
    best = max(renamings, key=lambda renaming: _num_targets(config, model, renaming))
    return None if best is renamings[0] else best


def _num_targets(config: LoraConfig, model: PreTrainedModel, renaming: Renaming) -> int:
    """Count the modules of `model` that `config` targets, and the ranks and scales that it sets for them."""
    names = [renaming.in_whole(name) for name, _ in model.named_modules() if name]
    targets = [name for name in names if is_target(config, name)]
    patterns = [list(pattern or {}) for pattern in (config.rank_pattern, config.alpha_pattern)]
    return len(targets) + sum(get_pattern_key(keys, name) in keys for keys in patterns for name in targets)


def convert_to_decoder(config: LoraConfig, model: PreTrainedModel, renaming: Renaming) -> None:
    """Rewrite the targets of `config`, which are of the whole model, as full names in `model`, its decoder."""
    names = [name for name, _ in model.named_modules() if name]
    whole = {name: renaming.in_whole(name) for name in names}
    targets = [name for name in names if is_target(config, whole[name])]
    if targets:  # without any, PEFT reports the error
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
        targeted = set(names_ending_in(parameters.values(), config.target_parameters))
        config.target_parameters = [name for name, full in parameters.items() if full in targeted]
    if isinstance(config.trainable_token_indices, dict):
        config.trainable_token_indices = {
            name: rows
            for end, rows in config.trainable_token_indices.items()
            for name in names_ending_in(names, [end])
            or [here for here in names if f".{whole[here]}".endswith(f".{end}")]
        }


def _resolved(pattern: Mapping[str, Value] | None, whole: Mapping[str, str]) -> dict[str, Value]:
    """Return a pattern of PEFT's with the decoder's full names in place of keys that match the whole model."""
    resolved: dict[str, Value] = {}
    for name, full in whole.items():
        key = get_pattern_key(list(pattern or {}), full)
        if pattern and key in pattern:
            resolved[re.escape(name)] = pattern[key]
    return resolved
