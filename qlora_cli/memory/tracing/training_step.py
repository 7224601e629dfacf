"""Run one training step, and an evaluation batch, on the meta device, and record their allocations.

The step is the one that `train` runs: the model's own code, autograd, checkpointing, the loss. Marks between the
layers, in both the forward and the backward pass, divide it into segments, which `extension` repeats for layers that
were not traced.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge, saved_tensors_hooks
from transformers import PreTrainedModel
from transformers.integrations.neftune import activate_neftune, deactivate_neftune

from qlora_cli.adapters.checkpointing import CheckpointingHandle, enable_checkpointing
from qlora_cli.adapters.fused_lora import switch_fused
from qlora_cli.errors import ModelError
from qlora_cli.garbage import gc_disabled
from qlora_cli.loss.chunked_loss import TokenLosses, slices, token_losses
from qlora_cli.loss.output_head import backbone_of, output_head
from qlora_cli.memory.tracing.attention_packages import attention_on_meta, shown_name
from qlora_cli.memory.tracing.functions import GpuFunctions
from qlora_cli.memory.tracing.gathers import Gathers
from qlora_cli.memory.tracing.kernels import Kernels
from qlora_cli.memory.tracing.loss_chunks import LossChunks
from qlora_cli.memory.tracing.meta_model import MetaModel
from qlora_cli.memory.tracing.operation_count import OfParts, OperationCount
from qlora_cli.memory.tracing.trace import NOT_PACKED, NOT_PADDED, MemoryTrace
from qlora_cli.quantization.methods import auxiliary_tensors
from qlora_cli.quantization.methods.method import META
from qlora_cli.settings.choices import Checkpointing, SdpaBackend
from qlora_cli.settings.objectives import Objective

GRADIENTS, LOSS, ACTIVATIONS = "gradients", "loss", "activations"
CHECKPOINT = "_gradient_checkpointing_func"  # what transformers calls to checkpoint a layer
HEAD, TAIL = "head", "tail"
RECURRENT_MASK = "create_recurrent_attention_mask"  # of transformers: no mask where no row is padded


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """The settings of a traced step.

    Attributes:
        length: The length of a row, in tokens.
        is_packed: Whether rows are packed into one of `batch_size` times the length.
        is_padded: Whether rows of a batch differ in length, so that there is an attention mask; never with packing.
        objective: What is learned; with pairs, rows are their sequences.
        fuses_lora: Whether layers compute together with their adapters where they can.
        trains_dft: Whether the loss of each trained token is weighted by its probability.
        adds_noise: Whether NEFTune adds noise to the embedded tokens; its strength does not matter.
        num_shards: The processes that hold a part of the base each; 1 if it is not sharded.
        shards_on_host: Whether these parts are kept in host memory.
    """

    batch_size: int
    length: int
    gradient_accumulation_steps: int
    checkpointing: Checkpointing  # not `auto`
    kept_products: tuple[str, ...] | None = None  # of selective checkpointing; None: all
    attention: str
    backend: SdpaBackend
    capability: tuple[int, int]
    dtype: torch.dtype
    is_autocast: bool
    is_packed: bool = False
    is_padded: bool = False
    objective: Objective = Objective.SFT
    fuses_lora: bool = False
    trains_dft: bool = False
    adds_noise: bool = False
    evaluates: bool = False
    num_shards: int = 1
    shards_on_host: bool = False
    device: torch.device = META  # another one only in tests, which compare with real tensors


@dataclass(frozen=True, kw_only=True)
class TracedStep:
    """The trace of a first micro-batch, of a second one if gradients are accumulated, and of an evaluation batch.

    `pinned_host_bytes` are activations of one micro-batch in host memory, and `operations` those of the last
    micro-batch, both for the layers that were traced.
    """

    trace: MemoryTrace
    operations: OfParts
    backends: tuple[str, ...]
    pinned_host_bytes: int


def trace_step(meta_model: MetaModel, settings: StepSettings, loop: "Loop | None" = None) -> TracedStep:
    """Record a step of `meta_model`, in segments that are marked `(pass, part)`.

    A part is the index of a layer, or `HEAD` or `TAIL` for what comes before or after the layers. `loop` makes the
    step that is traced: that of another training loop, or one that is observed; by default that of `qlora train`.

    Raises:
        ModelError: the model can't be trained as asked, or its code needs values.
    """
    branches = {
        **dict.fromkeys(NOT_PACKED, not settings.is_packed),
        **dict.fromkeys((*NOT_PADDED, RECURRENT_MASK), not settings.is_padded),
    }
    trace = MemoryTrace(Kernels(settings.capability), branches, device_type=settings.device.type)
    functions = GpuFunctions(
        settings.capability, backend=settings.backend, dtype=settings.dtype if settings.is_autocast else None
    )
    step = (loop or TrainingStep)(meta_model, settings, trace, functions)
    try:
        # Garbage collection would release tensors in cycles at a time that depends on what ran before.
        with gc_disabled(), step.prepared(), trace, functions:
            step.run()
    except NotImplementedError as error:  # raised by meta tensors for `nonzero` and `tolist`
        raise ModelError(
            f"what {type(step.base).__name__} computes depends on values, and can't be traced without them: {error}",
            hint="Measure it: train for a few steps with --max-steps.",
        ) from error
    return TracedStep(
        trace=trace,
        operations=step.operations.of_parts,
        backends=tuple(sorted(backend.value for backend in functions.backends)) or (shown_name(settings.attention),),
        pinned_host_bytes=step.pinned_host_bytes,
    )


class TrainingStep:
    """The passes of a step as `qlora train` runs it, and the hooks that tracing needs.

    The step of another training loop is a subclass with its own `loss`, `columns` and `zero_gradients`.
    """

    def __init__(
        self, meta_model: MetaModel, settings: StepSettings, trace: MemoryTrace, functions: GpuFunctions
    ) -> None:
        self.model = meta_model.model
        self.base: PreTrainedModel = meta_model.model.get_base_model()
        self.layers: list[nn.Module] = (
            list(self.base.get_submodule(meta_model.stack.path).children()) if meta_model.stack else []
        )
        self.settings = settings
        self.trace = trace
        self.functions = functions
        self.pinned_host_bytes = 0
        self.operations = OperationCount(trace, settings.batch_size * settings.length)
        shards = settings.num_shards
        from_host = settings.shards_on_host
        self._gathers = Gathers(trace, self.base, shards, from_host=from_host) if shards > 1 else None
        # Where values are computed, every chunk is needed.
        self._chunks = LossChunks(trace, self.operations) if settings.device == META else slices
        self._phase = ""
        # Attributes without a value: a tensor in one of them later is state that the module carries between passes.
        self._empty_attributes = [
            (module, name) for module in self.model.modules() for name, v in vars(module).items() if v is None
        ]

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """Set up attention, checkpointing, noise and hooks for the step, and remove them afterwards."""
        # The weights are part of loading; only what the step itself allocates is recorded.
        tensors = [*self.model.parameters(), *self.model.buffers()]
        for module in self.model.modules():
            tensors += (tensor for tensor in auxiliary_tensors(module) if tensor.device == self.settings.device)
        for tensor in tensors:
            self.trace.ignore(tensor)
        hooks = [] if self._gathers is None else self._gathers.before_marks()
        hooks += [hook for index, layer in enumerate(self.layers) for hook in self._mark_layer(index, layer)]
        hooks += [] if self._gathers is None else self._gathers.after_marks(backbone_of(self.base))
        hooks += self._label_loss()
        hooks += self.operations.watch(self.model, self.base)
        hooks += self.functions.disable_autocast_hooks(self.model)
        hooks += [
            parameter.register_post_accumulate_grad_hook(
                lambda parameter: self.trace.relabel(parameter.grad, GRADIENTS)
            )
            for parameter in self.model.parameters()
            if parameter.requires_grad
        ]
        self._set_attention()
        switch_fused(self.model, enabled=self.settings.fuses_lora)
        checkpointing = self._enable_checkpointing()
        noise = activate_neftune(self.model, 1.0) if self.settings.adds_noise else None
        self.base.config.use_cache = False
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            if noise is not None:
                deactivate_neftune(self.model, noise)
            if checkpointing is not None:
                checkpointing.remove()

    def run(self) -> None:
        """Run a micro-batch, a second one if gradients are accumulated, and an evaluation batch if asked."""
        self.train("first")
        if self.settings.gradient_accumulation_steps > 1:
            self.train("again")
        self.trace.mark("zero", TAIL)
        self.zero_gradients()
        if self.settings.evaluates:
            self.evaluate()

    def train(self, name: str) -> None:
        """Run one micro-batch: forward and backward."""
        trace = self.trace
        self.model.train()
        self.pinned_host_bytes = 0  # those of the previous pass are released
        if name == "again" or self.settings.gradient_accumulation_steps == 1:
            self.operations.start()
        self._phase = self.opening_of(f"{name} forward")
        trace.mark(self._phase, HEAD)
        # The trainer fetches the micro-batches of a step together, before the first of them runs.
        batches = [self._batch() for _ in range(self.settings.gradient_accumulation_steps if name == "first" else 1)]
        with self.functions.autocast():
            loss, outputs = self.loss(batches[0])
        del outputs  # before the backward pass, as the trainer does
        self._phase = f"{name} backward"
        trace.mark(self._phase, HEAD)
        trace.in_autograd_thread, trace.label = True, LOSS
        try:
            # `loss.backward()` would leave the function mode, which recomputation needs; the edge stays within it.
            torch.autograd.backward((get_gradient_edge(loss),), (torch.ones_like(loss),))
        finally:
            trace.in_autograd_thread, trace.label = False, ACTIVATIONS
        if self._gathers is not None:
            self._gathers.end_backward()
        self._phase = ""
        trace.mark(f"{name} end", TAIL)
        del loss, batches
        self.operations.stop()
        self._drop_states()

    def evaluate(self) -> None:
        """Run one batch of evaluation: forward, without gradients."""
        self.model.eval()
        self._phase = self.opening_of("evaluation")
        self.trace.mark(self._phase, HEAD)
        with torch.no_grad(), self.functions.autocast():
            outputs = self.loss(self._batch())
        self._phase = ""
        self.trace.mark("evaluation end", TAIL)
        del outputs
        self._drop_states()

    def opening_of(self, phase: str) -> str:
        """Return the pass that a forward pass begins with: itself, unless another one is part of the loss."""
        return phase

    def begin(self, phase: str) -> None:
        """Begin another pass within the forward pass."""
        self._phase = phase
        self.trace.label = ACTIVATIONS
        self.trace.mark(phase, HEAD)

    @property
    def phase(self) -> str:
        """The pass in progress."""
        return self._phase

    def _drop_states(self) -> None:
        """Drop tensors that modules hold after a pass, as recurrent layers do, so that all passes start alike."""
        for module, name in self._empty_attributes:
            if isinstance(getattr(module, name, None), torch.Tensor):
                setattr(module, name, None)

    def loss(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, Any]:
        """Return the loss of a batch in which every token is trained, and the other outputs of the forward pass.

        Raises:
            ModelError: the loss of this model can't be computed.
        """
        losses = self.token_losses(batch)
        num_rows, length = batch["labels"].shape
        return losses.total / (num_rows * (length - 1)), losses

    def token_losses(self, batch: dict[str, torch.Tensor]) -> TokenLosses:
        """Return the losses of the tokens of a batch."""
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        hidden = backbone_of(self.base)(**inputs, use_cache=False).last_hidden_state
        # Where labels are trained depends on their values; here they are at all positions but the last of a row.
        positions, targets = (torch.zeros_like(batch["labels"][:, 1:]).flatten() for _ in range(2))
        head, dtype = output_head(self.base), self.settings.dtype
        with nullcontext() if self._gathers is None else self._gathers.head():
            is_dft = self.settings.trains_dft and self.model.training
            return token_losses(hidden, head, positions, targets, dtype, self._chunks, weighs_by_probability=is_dft)

    def columns(self) -> dict[str, int]:
        """Return the columns of a batch, each with the value that fills it.

        With real tensors, transformers reads the mask: all ones mean no padding.
        """
        if self.settings.is_packed:
            return {"input_ids": 0, "labels": 0, "position_ids": 0}
        return {"input_ids": 0, "labels": 0, "attention_mask": 0 if self.settings.is_padded else 1}

    def zero_gradients(self) -> None:
        """Drop the gradients, after the optimizer's step."""
        for parameter in self.model.parameters():
            parameter.grad = None

    def _batch(self) -> dict[str, torch.Tensor]:
        """Return a batch as the collator makes it: `(batch, seq)`, or `(1, batch * seq)` with packing."""
        settings = self.settings
        rows = (settings.batch_size, settings.length)
        if settings.is_packed:
            rows = (1, settings.batch_size * settings.length)
        return {
            name: torch.full(rows, value, dtype=torch.long, device=settings.device)
            for name, value in self.columns().items()
        }

    def _set_attention(self) -> None:
        name = attention_on_meta(self.settings.attention)
        for module in self.base.modules():
            if isinstance(module, PreTrainedModel):
                module.config._attn_implementation = name

    def _mark_layer(self, index: int, layer: nn.Module) -> list[Any]:
        last = len(self.layers) - 1

        def before(_: nn.Module, args: Any, kwargs: Any) -> None:
            if self.trace.in_autograd_thread:  # recomputation calls the hooks of a layer as well
                return
            self.trace.mark(self._phase, index)
            if index == 0 and torch.is_grad_enabled():
                self._mark_gradient(args[0] if args else kwargs.get("hidden_states"), TAIL)

        def after(_: nn.Module, __: Any, output: Any) -> None:
            if self.trace.in_autograd_thread:
                return
            if index == last:
                self.trace.mark(self._phase, TAIL)
            if torch.is_grad_enabled():
                self._mark_gradient(output[0] if isinstance(output, tuple) else output, index)

        return [
            layer.register_forward_pre_hook(before, with_kwargs=True),
            layer.register_forward_hook(after),
        ]

    def _label_loss(self) -> list[Any]:
        """Label allocations between the last hidden states and the completion of their gradient as the loss's."""

        def label_activations(_: torch.Tensor) -> None:
            self.trace.label = ACTIVATIONS

        def label_loss(_: nn.Module, __: Any, output: Any) -> None:
            self.trace.label = LOSS
            if torch.is_grad_enabled():
                output.last_hidden_state.register_hook(label_activations)

        backbone = self.base.base_model
        return [] if backbone is self.base else [backbone.register_forward_hook(label_loss)]

    def _mark_gradient(self, tensor: Any, part: int | str) -> None:
        """Mark the completion of the gradient of `tensor`, where the backward pass of the layer below begins."""

        def mark(_: torch.Tensor) -> None:
            self.trace.mark(self._phase, part)

        if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
            tensor.register_hook(mark)  # type: ignore[no-untyped-call]

    def _enable_checkpointing(self) -> CheckpointingHandle | None:
        """Enable checkpointing as `train` does, but for the copies to the host, which are only counted."""
        chosen = self.settings.checkpointing
        on_gpu = Checkpointing.ON if chosen == Checkpointing.OFFLOAD else chosen
        handle = enable_checkpointing(self.model, on_gpu, self.settings.kept_products)
        if handle is not None:
            self._checkpoint_as_on_a_gpu()
        return handle

    def _checkpoint_as_on_a_gpu(self) -> None:
        """Recompute under autocast, as PyTorch does on a GPU, and count what is offloaded to the host.

        `torch.utils.checkpoint` restores the autocast state of the device of its tensors, and meta has none.
        """

        def pack(tensor: torch.Tensor) -> tuple[torch.Size, torch.dtype]:
            self.pinned_host_bytes += tensor.numel() * tensor.element_size()
            return tensor.shape, tensor.dtype

        def unpack(packed: tuple[torch.Size, torch.dtype]) -> torch.Tensor:
            return torch.empty(packed[0], dtype=packed[1], device=self.settings.device)

        offloads = self.settings.checkpointing == Checkpointing.OFFLOAD

        def wrapped(checkpoint: Callable[..., Any]) -> Callable[..., Any]:
            def checkpointed(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
                def run(*args: Any, **kwargs: Any) -> Any:
                    with self.functions.autocast() if self.trace.in_autograd_thread else nullcontext():
                        return function(*args, **kwargs)

                # As `save_on_cpu` does, around each layer.
                with saved_tensors_hooks(pack, unpack) if offloads else nullcontext():
                    return checkpoint(run, *args, **kwargs)

            return checkpointed

        for module in self.model.modules():
            if CHECKPOINT in vars(module):
                setattr(module, CHECKPOINT, wrapped(getattr(module, CHECKPOINT)))


Loop = Callable[[MetaModel, StepSettings, MemoryTrace, GpuFunctions], TrainingStep]
