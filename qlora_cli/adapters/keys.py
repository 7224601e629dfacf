"""Parse the keys of an adapter's file, whichever tool wrote it, into the names of the base.

Keys from a compiled or distributed model, or written without PEFT, contain more than PEFT's own: wrappers, the name of
the adapter, the prefix of the decoder in a model with towers.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from transformers import PreTrainedModel

from qlora_cli.adapters.targets import BASE
from qlora_cli.model_files.model_config import DECODER_NAMES, ModelConfig

WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
PARTS = (  # the module, the kind of parameter, and the name of the adapter, if any
    re.compile(r"(?P<path>.+?)\.(?P<part>lora_[AB])(?:\.(?P<adapter>[^.]+))?(?P<leaf>\.(?:weight|bias))"),
    re.compile(r"(?P<path>.+?)\.(?P<part>lora_embedding_[AB])(?:\.(?P<adapter>[^.]+))?(?P<leaf>)"),
    re.compile(
        r"(?P<path>.+?)\.(?P<part>lora_magnitude_vector)(?:\.(?P<adapter>(?!weight$)[^.]+))?(?P<leaf>)(?:\.weight)?"
    ),
    re.compile(r"(?P<path>.+?)\.(?P<part>token_adapter\.trainable_tokens_delta)(?:\.(?P<adapter>[^.]+))?(?P<leaf>)"),
)
COPY = re.compile(r"(?P<path>.+?)\.modules_to_save\.(?P<rest>.+)")
ORIGINAL = ".original_module."  # the base's values next to those of a module that was trained whole


@dataclass(frozen=True, kw_only=True)
class AdapterKey:
    """A parsed key of a file.

    Attributes:
        module: The module of the base.
        tail: The rest of the key, as PEFT writes it.
        adapter: The name of the adapter, if the key has one.
        is_copy: Whether the key uses PEFT's internal name for a module that is trained whole.
        in_file: The name of the module in the file, without wrappers.
    """

    module: str
    tail: str
    adapter: str | None = None
    is_copy: bool = False
    in_file: str

    @property
    def name(self) -> str:
        """PEFT's name for the weight, without that of the adapter: `model.layers.0.….lora_A.weight`."""
        return f"{self.module}.{self.tail}"


class KeyParser:
    """Parses the keys of adapter files into the names of a model's modules."""

    def __init__(self, model: PreTrainedModel, base: ModelConfig) -> None:
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._prefix = model.base_model_prefix
        self._base = base

    def parse(self, key: str) -> AdapterKey | None:
        """Parse a key of a file; return None for a copy of the base's own values."""
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
            first, _, remainder = rest.partition(".")
            here = self._modules.get(module)
            is_part = here is None or first in here._parameters or first in here._modules or not remainder
            return self._key(match["path"], rest if is_part else remainder, is_copy=True)
        path, _, leaf = name.rpartition(".")
        return self._key(path, leaf)

    def _key(self, path: str, tail: str, *, adapter: str | None = None, is_copy: bool = False) -> AdapterKey:
        return AdapterKey(module=self._find(path), tail=tail, adapter=adapter, is_copy=is_copy, in_file=path)

    def _find(self, path: str) -> str:
        """Return the name in the model of the module `path` of a file; if it has none, the name it should have."""
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
    """Return a key without the parts that wrappers of a model, including PEFT's, add to it."""
    parts = [part for part in key.split(".") if part not in WRAPPERS]
    while parts[:1] == ["module"] or parts[:2] == ["base_model", "model"]:
        parts = parts[1 if parts[0] == "module" else 2 :]
    return ".".join(parts)


def is_of_base(key: str) -> bool:
    """Return whether a key is of the base's own values, stored next to those of a module that was trained whole."""
    return ORIGINAL in key


def in_base(path: str) -> str:
    """Return the name in the base of a module or parameter of the adapted model."""
    inner = path.removeprefix(BASE).replace(".original_module", "")
    return inner.replace(".token_adapter", "").replace(".base_layer", "")


def with_ties(names: Iterable[str], tied: Mapping[str, str]) -> dict[str, str]:
    """Map `names`, and the names of weights tied to them, to the one in `names`."""
    named = {name: name for name in names}
    for one, other in tied.items():
        for name, tied_to in ((one, other), (other, one)):
            if tied_to in named:
                named.setdefault(name, tied_to)
    return named


def describe_prefix(names: Collection[str]) -> str:
    """Return the common prefix of names; if they have none, the first parts of a few."""
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
