"""What an adapter's file calls its weights, whoever wrote it, by the names of the base.

A state dict that was taken from a compiled or distributed model, or without PEFT's own writer, has more in its keys
than PEFT's: wrappers, the name of the adapter, the place of the decoder in a model with towers.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from transformers import PreTrainedModel

from qlora_cli.adapters.targets import BASE
from qlora_cli.model_files.model_config import DECODER_NAMES, ModelConfig

WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
PARTS = (  # of an adapter: the module that they are on, what they are, and the name of the adapter, if it is there
    re.compile(r"(?P<path>.+?)\.(?P<part>lora_[AB])(?:\.(?P<adapter>[^.]+))?(?P<leaf>\.(?:weight|bias))"),
    re.compile(r"(?P<path>.+?)\.(?P<part>lora_embedding_[AB])(?:\.(?P<adapter>[^.]+))?(?P<leaf>)"),
    re.compile(
        r"(?P<path>.+?)\.(?P<part>lora_magnitude_vector)(?:\.(?P<adapter>(?!weight$)[^.]+))?(?P<leaf>)(?:\.weight)?"
    ),
    re.compile(r"(?P<path>.+?)\.(?P<part>token_adapter\.trainable_tokens_delta)(?:\.(?P<adapter>[^.]+))?(?P<leaf>)"),
)
COPY = re.compile(r"(?P<path>.+?)\.modules_to_save\.(?P<rest>.+)")
ORIGINAL = ".original_module."  # the values of the base next to those of a module that trained whole


@dataclass(frozen=True, kw_only=True)
class AdapterKey:
    """A key of a file, taken apart.

    Attributes:
        module: The module of the base that it belongs to.
        tail: What follows, as PEFT writes it.
        adapter: The name of the adapter, if the key has one.
        is_copy: Whether it stands for a module that trains whole by PEFT's inner name for it.
        in_file: The module as the file names it, without wrappers.
    """

    module: str
    tail: str
    adapter: str | None = None
    is_copy: bool = False
    in_file: str

    @property
    def name(self) -> str:
        """What PEFT calls the weight without the name of the adapter: `model.layers.0.….lora_A.weight`."""
        return f"{self.module}.{self.tail}"


class Names:
    """The names of a model's modules, and the way to them from those that a file has."""

    def __init__(self, model: PreTrainedModel, base: ModelConfig) -> None:
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._prefix = model.base_model_prefix
        self._base = base

    def read(self, key: str) -> AdapterKey | None:
        """Return a key of a file, taken apart; None for a copy of the base's own values."""
        name = without_wrappers(key)
        if is_of_base(name):
            return None
        for pattern in PARTS:
            if match := pattern.fullmatch(name):
                tail = f"{match['part']}{match['leaf']}"
                return self._key(match["path"], tail, adapter=match["adapter"])
        if match := COPY.fullmatch(name):
            module = self._find(match["path"])
            rest = match["rest"]
            first, _, others = rest.partition(".")
            here = self._modules.get(module)
            is_part = here is None or first in here._parameters or first in here._modules or not others
            return self._key(match["path"], rest if is_part else others, is_copy=True)
        path, _, leaf = name.rpartition(".")
        return self._key(path, leaf)

    def _key(self, path: str, tail: str, *, adapter: str | None = None, is_copy: bool = False) -> AdapterKey:
        return AdapterKey(module=self._find(path), tail=tail, adapter=adapter, is_copy=is_copy, in_file=path)

    def _find(self, path: str) -> str:
        """Return what the module `path` of a file is called in the model; as it is, where it is none of them."""
        for candidate in self._candidates(path):
            if in_base(candidate) in self._modules:
                return candidate
        return self._base.renamed(path)

    def _candidates(self, path: str) -> Iterable[str]:
        yield path
        yield self._base.renamed(path)
        for pattern, replacement in DECODER_NAMES.items():
            yield re.sub(pattern, replacement, f"{path}.").removesuffix(".")
        yield f"{self._prefix}.{path}"
        yield path.removeprefix(f"{self._prefix}.")


def without_wrappers(key: str) -> str:
    """Return a key without what wrappers of a model, PEFT's among them, put into it."""
    parts = [part for part in key.split(".") if part not in WRAPPERS]
    while parts[:1] == ["module"] or parts[:2] == ["base_model", "model"]:
        parts = parts[1 if parts[0] == "module" else 2 :]
    return ".".join(parts)


def is_of_base(key: str) -> bool:
    """Whether a key of a file is that of the base's own values, next to those of a module that trained whole."""
    return ORIGINAL in key


def in_base(path: str) -> str:
    """Return what a module or parameter of the adapted model is called in the base."""
    inner = path.removeprefix(BASE).replace(".original_module", "")
    return inner.replace(".token_adapter", "").replace(".base_layer", "")


def with_ties(names: Iterable[str], tied: Mapping[str, str]) -> dict[str, str]:
    """Return for each of `names`, and for those that are one with them, the one that is named."""
    found = {name: name for name in names}
    for one, other in tied.items():
        for name, tied_to in ((one, other), (other, one)):
            if tied_to in found:
                found.setdefault(name, tied_to)
    return found


def beginning_of(names: Collection[str]) -> str:
    """Return what names begin with: their common parts, or the first parts of a few where they have none."""
    parts = [name.split(".") for name in names]
    common: list[str] = []
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            break
        common.append(level[0])
    if common:
        return ".".join(common)
    firsts = sorted({one[0] for one in parts})
    return ", ".join(firsts[:3]) + (", …" if len(firsts) > 3 else "")
