"""Compile the decoder layers of a model: once for all layers of one kind, whatever the length of a row.

The rest of a model is not compiled. It is little, and a compiled model as a whole is compiled anew for each shape of a
batch, for minutes.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from qlora_cli.errors import ModelError
from qlora_cli.events import Noted, Reporter
from qlora_cli.hardware.counters import is_out_of_memory

BACKEND = "inductor"
MOST_CHARACTERS = 300  # of an error


class CompiledLayers:
    """The compiled layers of a model."""

    def __init__(self, model: PeftModel, *, has_one_length: bool) -> None:
        """Have the layers compiled when they are next called.

        If all batches have about one length, as packed ones do, the code is specialized to it, and made general with
        the second length; else it is made for all lengths at once.

        Raises:
            ModelError: the model has no layers of a kind that repeats.
        """
        self._base: PreTrainedModel = model.get_base_model()
        self._layers = [layer for layer in self._base.modules() if isinstance(layer, GradientCheckpointingLayer)]
        if not self._layers:
            raise ModelError(
                f"{type(self._base).__name__} has no decoder layers that could be compiled",
                hint="Leave training.torch_compile out.",
            )
        # The first layer's input requires a gradient like that of the others, or that layer would be compiled apart.
        self._hook = self._base.get_input_embeddings().register_forward_hook(_require_gradient)
        # Scales are constants of a layer. With general lengths they are taken for inputs, until it turns out that they
        # can't be any, and the layer is captured a second time.
        self._compiler_settings = ExitStack()
        self._compiler_settings.enter_context(torch._dynamo.config.patch(specialize_float=True))
        for layer in self._layers:
            layer.compile(backend=BACKEND, dynamic=None if has_one_length else True)

    def can_run(self, run: Callable[[], object], reporter: Reporter) -> bool:
        """Call `run`, which is known to work uncompiled or is called again then; False if compiling it has failed.

        A failure is reported, and nothing is compiled from then on. Too little memory is no such failure.
        """
        try:
            run()
        except RuntimeError as error:  # what the compiler and its backends raise
            if is_out_of_memory(error):
                raise
            self.remove()
            # What to set to debug follows after an empty line.
            reason = " ".join(str(error).split("\n\n")[0].split())[:MOST_CHARACTERS]
            message = f"the decoder layers can't be compiled, and the run goes on without that: {reason}"
            reporter.report(Noted(level="warning", message=message))
            return False
        return True

    def paused(self) -> AbstractContextManager[None]:
        """Return a context in which nothing compiled is called, and nothing is compiled."""
        context: AbstractContextManager[None] = torch.compiler.set_stance("force_eager")
        return context

    def remove(self) -> None:
        """Compute as without compiling from now on."""
        self._hook.remove()
        self._compiler_settings.close()
        for layer in self._layers:
            layer.compile(disable=True)


def _require_gradient(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> None:
    output.requires_grad_(True)
