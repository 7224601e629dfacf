"""Run a model over many rows one decoder layer at a time, so that one layer is in memory, and may be changed there.

A stage is a decoder layer. The model's own code runs for each batch, with its masks and positions, but only the layer
of the stage computes: the others pass on what they are given. Its input, the output of the layer before, is held in
host memory.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from qlora_cli.errors import ModelError
from qlora_cli.merging.planning.adapter_changes import Read
from qlora_cli.merging.verifying.streamed import Slot, StreamedModel
from qlora_cli.model_files.finite import is_finite

HIDDEN = "hidden_states"  # the first argument of a decoder layer in all models of transformers


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Token ids `(rows, seq)`, padded on the right, and which of them are no padding, `(rows, seq)`."""

    ids: torch.Tensor
    mask: torch.Tensor


class StagedModel(StreamedModel):
    """A model whose weights `read` returns by full name, run stage by stage over `batches`."""

    def __init__(
        self,
        config: PreTrainedConfig,
        read: Read,
        batches: Sequence[Batch],
        *,
        device: torch.device,
        dtype: torch.dtype,
        attention: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        """Build the model on the meta device, with the default kernel of attention unless another is named.

        Raises:
            ModelError: its decoder layers can't be run one after another.
        """
        super().__init__(config, read, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
        if attention is not None:
            self._base.set_attn_implementation(attention)
        self._base.set_experts_implementation("eager")  # whose products with single experts can be told apart
        self._batches = batches
        self._hidden: list[torch.Tensor | None] = [None] * len(batches)
        self._number = 0
        self._num_outputs: int | None = None
        layers = [n for n, module in enumerate(self._modules) if isinstance(module, GradientCheckpointingLayer)]
        shares_keys = getattr(self._base.config.get_text_config(), "num_kv_shared_layers", None)
        if not layers or shares_keys:
            raise self._error()
        self._stages = [_Stage(self._modules[number], self._run_layer) for number in layers]
        self._slots_of_stages = [self._units[number] for number in layers]
        self._other_slots = [
            slot for number, slots in enumerate(self._units) if number not in layers for slot in slots
        ]
        _insert(self._base, self._stages)

    def _error(self) -> ModelError:
        return ModelError(
            f"the layers of {type(self._base).__name__} can't be run one after another, so it can't be calibrated",
            hint="Leave --calibrate out.",
        )

    @property
    def num_stages(self) -> int:
        """The number of decoder layers."""
        return len(self._stages)

    @contextmanager
    def stage(self, index: int) -> Iterator[dict[str, Slot]]:
        """Load the layer of a stage; yield its weights, in the order of the stages' names, by full name."""
        own = self._slots_of_stages[index]
        slots = own if index else [*self._other_slots, *own]  # the embedding computes the input of the first one
        placeholders = [slot.module.get_parameter(slot.attribute) for slot in slots]
        try:
            for slot in slots:
                _put(slot, nn.Parameter(self._load(slot), requires_grad=False))
            self._stages[index].is_open = True
            yield {slot.name: slot for slot in own}
        finally:
            self._stages[index].is_open = False
            for slot, placeholder in zip(slots, placeholders, strict=True):
                _put(slot, placeholder)

    @torch.no_grad()
    def run(self, *, keep: bool, before: Callable[[Batch], None] | None = None) -> None:
        """Run the open stage over all batches, `before` each of which it is called; `keep` its outputs as inputs."""
        self._keeps = keep
        for number, batch in enumerate(self._batches):
            if before is not None:
                before(batch)
            self._number = number
            self._base.base_model(
                input_ids=batch.ids.to(self._device),
                attention_mask=batch.mask.to(self._device).long(),
                use_cache=False,
            )

    def _run_layer(self, stage: "_Stage", hidden: torch.Tensor, call: Callable[[torch.Tensor], Any]) -> Any:
        """Return the output of a layer if its stage is open, for the input that is held, and else its input."""
        if not stage.is_open:
            return hidden if self._num_outputs is None else (hidden, *(None,) * (self._num_outputs - 1))
        held = self._hidden[self._number]
        output = call(hidden if held is None else held.to(self._device))
        self._num_outputs = len(output) if isinstance(output, tuple) else None
        if self._keeps:
            made = output[0] if isinstance(output, tuple) else output
            if not is_finite(made):  # as if it read weights of another layer, which are not loaded
                raise self._error()
            self._hidden[self._number] = made.to("cpu")
        return output

    @property
    def outputs(self) -> list[torch.Tensor]:
        """The outputs of the last stage that was run and kept, by batch, `(rows, seq, width)` on the CPU."""
        return [hidden for hidden in self._hidden if hidden is not None]


class _Stage(nn.Module):
    """A decoder layer that is run by `run_layer`, which decides whether it computes."""

    def __init__(self, layer: nn.Module, run_layer: Callable[..., Any]) -> None:
        super().__init__()
        self.layer = layer
        self._run_layer = run_layer
        self.is_open = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        def call(given: torch.Tensor) -> Any:
            return self.layer(given, *args[1:], **kwargs) if args else self.layer(**{**kwargs, HIDDEN: given})

        return self._run_layer(self, args[0] if args else kwargs[HIDDEN], call)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # models ask what kind of layer it is
            return getattr(super().__getattr__("layer"), name)


def _insert(model: nn.Module, stages: Sequence[_Stage]) -> None:
    """Put each stage in the place of its layer."""
    by_layer = {id(stage.layer): stage for stage in stages}
    for module in [module for module in model.modules() if isinstance(module, nn.ModuleList)]:
        for name, child in list(module.named_children()):
            if id(child) in by_layer:
                setattr(module, name, by_layer[id(child)])


def _put(slot: Slot, parameter: nn.Parameter) -> None:
    setattr(slot.module, slot.attribute, parameter)
