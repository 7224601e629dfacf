"""Calls of a model with an adapter: which of its layers they reach, and those that are compared with the base."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel
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


@contextmanager
def without_adapter(model: PeftModel) -> Iterator[None]:
    """A context without gradients in which the base computes alone; the same weights are trained afterwards."""
    trained = [weight.requires_grad for weight in model.parameters()]
    with torch.no_grad(), model.disable_adapter():
        yield
    assert trained == [weight.requires_grad for weight in model.parameters()], "PEFT sets those of the active adapter"


def disable_dropout(model: torch.nn.Module) -> Callable[[], None]:
    """Let the modules of `model` drop nothing; return what undoes it."""
    before = [(module, module.p) for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    for module, _ in before:
        module.p = 0.0

    def undo() -> None:
        for module, p in before:
            module.p = p

    return undo
