"""Loading as commands do it, from flags to weights, and what tests compare: logits and messages."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from bitsandbytes.nn import Linear4bit

from qlora_cli.errors import QloraError
from qlora_cli.loading.loader import LoadedModel, load_model
from qlora_cli.settings.models import LoadSettings
from qlora_cli.settings.resolve import Resolved, Sources, resolve
from tests.conftest import ASSETS
from tests.support.models.tiny_models import save_tiny

IDS = torch.arange(20, 60)[None]  # of the bundled tokenizer, whose 3072 ids all have rows
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")

# Ways to replace a pickle of weights by something that is not one, as functions of its path.
DAMAGED_PICKLES: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "garbage": lambda path: path.write_bytes(b"garbage!" * 10),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1000]),
    "another archive": lambda path: path.write_bytes(b"PK\x03\x04" + bytes(100)),
    "a list": lambda path: torch.save([1, 2], path),
    "code": lambda path: torch.save({"weight": torch.nn.Linear(1, 1)}, path),
}

Test = TypeVar("Test", bound=Callable[..., None])
Model = TypeVar("Model", bound=torch.nn.Module)


class Proofs:
    """Records which settings the tests of a file prove to change something: `@proves("dtype")`."""

    def __init__(self) -> None:
        self.proven: set[str] = set()

    def __call__(self, *keys: str) -> Callable[[Test], Test]:
        def record(test: Test) -> Test:
            self.proven.update(keys)
            return test

        return record


def asked_load(model: Path, **flags: object) -> Resolved[LoadSettings]:
    """Return settings from flags: fp32 on the CPU unless changed; `section__key=value` sets a value, None drops it."""
    values = {"model.name": str(model), "model.dtype": "fp32", "model.device": "cpu"}
    given = {**values, **{name.replace("__", "."): value for name, value in flags.items()}}
    sources = Sources(flags={path: (path, value) for path, value in given.items() if value is not None})
    return resolve(sources, LoadSettings)


def load_settings(model: Path, **flags: object) -> LoadSettings:
    """Return the settings of `asked_load`."""
    return asked_load(model, **flags).settings


def load(model: Path, **flags: object) -> LoadedModel:
    """Load `model` with `load_settings`."""
    return load_model(load_settings(model, **flags))


def refused(model: Path, kind: type[QloraError], **flags: object) -> str:
    """Return message and hint of the error by which `model` is refused."""
    with pytest.raises(kind) as caught:
        load(model, **flags)
    assert caught.value.hint
    assert caught.value.exit_code == 2
    return f"{caught.value} | {caught.value.hint}"


def without_repacking(plain: Model) -> Model:
    """Return a model of plain transformers or PEFT that computes with the 4-bit weights as they are stored.

    On CPUs with AVX512-BF16 bitsandbytes repacks them when a model is first evaluated, and rounds their constants to
    bf16. Our loader prevents it; a comparison with a model that it did not load has to.
    """
    for module in plain.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return plain


def logits(model: torch.nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    """Return the logits in evaluation mode, without gradients and autocast."""
    model.eval()
    with torch.no_grad():
        outputs: torch.Tensor = model(input_ids=ids).logits
    return outputs


def layers_of(model: torch.nn.Module, kind: type[torch.nn.Module]) -> dict[str, Any]:
    """Return the layers of exactly this class, by full name."""
    return {name: module for name, module in model.named_modules() if type(module) is kind}


def weight_of(module: torch.nn.Module) -> torch.nn.Parameter:
    """Return the weight of a layer."""
    assert isinstance(module.weight, torch.nn.Parameter)
    return module.weight


def save_model(directory: Path, family: str = "llama", **changes: Any) -> Path:
    """Write a tiny random model in bf16 with the bundled tokenizer, and return its directory."""
    ids: dict[str, Any] = {"vocab_size": 3072, "bos_token_id": 1, "eos_token_id": 4, "pad_token_id": 0}
    save_tiny(directory, family, **{**ids, **changes})
    return copy_tokenizer(directory)


def copy_tokenizer(directory: Path) -> Path:
    """Give a model the bundled tokenizer."""
    for file in TOKENIZER:
        shutil.copy(ASSETS / "base" / file, directory / file)
    return directory
