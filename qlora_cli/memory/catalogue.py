"""The models that people fine-tune most, with their `config.json` as far as memory depends on it.

A prediction for one of them needs neither a network nor access to a gated repository. Shapes, dtypes and the attention
pattern follow from these configs; tests build each model from its own and count the parameters.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from importlib.resources import files
from types import MappingProxyType
from typing import Any

NUM_SUGGESTIONS = 3


@dataclass(frozen=True, kw_only=True)
class CatalogueModel:
    """One model: its short `name`, the repository `hub_id` that its config is from, and other names for it.

    `aliases` have the same config: chat variants, mirrors, fine-tunes. `is_gated` is about `hub_id` alone.
    `num_parameters` is the published count of the decoder that `config` builds, tied weights once; None where no count
    was published. `source` is the origin of the config. Transformers changes nested values of a config that is passed
    to it, so pass a deep copy.
    """

    name: str
    hub_id: str
    aliases: tuple[str, ...]
    is_gated: bool
    num_parameters: int | None
    source: str
    config: Mapping[str, Any]

    @property
    def spellings(self) -> tuple[str, ...]:
        """Every name of this model."""
        return (self.name, self.hub_id, *self.aliases)


@cache
def catalogue() -> tuple[CatalogueModel, ...]:
    """Return every model of the catalogue, in the order of the file: by family, then by size."""
    text = files("qlora_cli.memory").joinpath("models.json").read_text(encoding="utf-8")
    return tuple(_model(entry) for entry in json.loads(text)["models"])


def find_in_catalogue(name: str) -> CatalogueModel | None:
    """Return the model with this name, hub id or alias, ignoring case; None if there is none."""
    return _by_spelling().get(name.strip().casefold())


def nearest_names(name: str) -> list[str]:
    """Return the names most like `name`, best first, for an error message; a hub id is also compared by its end."""
    folded = name.strip().casefold()
    by_spelling = _by_spelling()
    nearest: dict[str, None] = {}
    for text in dict.fromkeys((folded, folded.rpartition("/")[2])):
        for spelling in get_close_matches(text, by_spelling, n=NUM_SUGGESTIONS):
            nearest[by_spelling[spelling].name] = None
    return list(nearest)[:NUM_SUGGESTIONS]


@cache
def _by_spelling() -> Mapping[str, CatalogueModel]:
    return MappingProxyType(dict(_spellings()))


def _spellings() -> Iterator[tuple[str, CatalogueModel]]:
    for model in catalogue():
        for spelling in model.spellings:
            yield spelling.casefold(), model


def _model(entry: Mapping[str, Any]) -> CatalogueModel:
    return CatalogueModel(
        name=entry["name"],
        hub_id=entry["hub_id"],
        aliases=tuple(entry["aliases"]),
        is_gated=entry["gated"],
        num_parameters=entry["num_parameters"],
        source=entry["source"],
        config=MappingProxyType(entry["config"]),
    )
