"""Which layers with an adapter a model calls."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft.tuners.lora import LoraLayer


@contextmanager
def watch_calls(model: torch.nn.Module) -> Iterator[set[str]]:
    """Yield the names of the layers with an adapter; those that are called meanwhile are removed."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    unused = set(layers)
    handles = [
        module.register_forward_pre_hook(lambda *_, name=name: unused.discard(name)) for name, module in layers.items()
    ]
    try:
        yield unused
    finally:
        for handle in handles:
            handle.remove()
