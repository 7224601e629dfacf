"""An adapter that was put on a model with towers, brought to its text decoder, which alone is loaded here.

Its targets are names, ends of names, or a pattern, all of the whole model. Which modules of the decoder they are is
asked with the names that the whole model has, by PEFT's own rules, and written down as the decoder's names.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from transformers import PreTrainedModel

from qlora_cli.adapters.keys import Key
from qlora_cli.adapters.targets import named

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


def renaming_of(keys: Iterable[Key]) -> Renaming | None:
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


def on_decoder(config: LoraConfig, model: PreTrainedModel, renaming: Renaming) -> None:
    """Rewrite the targets of `config`, which are those of the whole model, as full names in `model`, its decoder."""
    names = [name for name, _ in model.named_modules() if name]
    whole = {name: renaming.in_whole(name) for name in names}
    is_listed = config.target_modules != "all-linear"
    targets = [name for name in names if check_target_module_exists(config, whole[name])] if is_listed else []
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
