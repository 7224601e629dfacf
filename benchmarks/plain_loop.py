"""Predict a plain training loop around PEFT's `prepare_model_for_kbit_training`, of which there are measurements.

The tracer, the extension and the allocator are those of `qlora inspect-memory`. Such a loop differs in that

- everything but the quantized weights is cast to fp32 after loading, and the allocator's cache is emptied;
- the model computes its own loss, from full logits, without autocast and without an attention mask;
- the outputs of the forward pass live until the optimizer has stepped, and gradients are not clipped.
"""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import PreTrainedModel

from qlora_cli.attention.sdpa_rules import representative_capability
from qlora_cli.hardware.device import TORCH_DTYPES
from qlora_cli.memory.gpus import Gpu
from qlora_cli.memory.prediction import Estimate
from qlora_cli.memory.replaying.figures import estimate_of
from qlora_cli.memory.replaying.loaded_weights import (
    ADAPT,
    LOAD,
    UNQUANTIZED,
    load_adapter,
    load_weight,
    trained_parameters,
    warm_up,
)
from qlora_cli.memory.replaying.optimizer_step import embedding_ids, optimizer_steps, parameter_groups
from qlora_cli.memory.replaying.replay import Replay, RunEvents
from qlora_cli.memory.tracing.extension import extend
from qlora_cli.memory.tracing.kernels import cublas_workspace_bytes
from qlora_cli.memory.tracing.meta_model import MetaModel, store_few_layers
from qlora_cli.memory.tracing.passes import Passes, Recorder
from qlora_cli.memory.tracing.training_step import StepSettings, TrainingStep, trace_step
from qlora_cli.model_files.model_config import config_from
from qlora_cli.quantization.storage_plan import StoragePlan, build_on_meta, plan_layout
from qlora_cli.settings.choices import SdpaBackend
from qlora_cli.settings.models import EstimateSettings, LoraSettings

CUDA = torch.device("cuda")
UPCAST = "upcast"
FLOAT_BYTES = 4


def predict_plain_loop(
    content: Mapping[str, Any], settings: EstimateSettings, gpu: Gpu, backend: SdpaBackend
) -> Estimate:
    """Return the memory of the loop on `gpu` for the model of a config.json, with one micro-batch of full rows a step.

    The compute dtype, the attention and the checkpointing of `settings` must be explicit, not automatic.
    """
    dtype = TORCH_DTYPES[settings.model.dtype]
    config = config_from(settings.model.name, content).config
    layout = plan_layout(build_on_meta(deepcopy(config), dtype), settings.quantization, dtype, device=CUDA)
    adapted = prepare(build_on_meta(config, dtype), layout, settings.lora)
    assert adapted.stack is not None, f"the layers of {settings.model.name} can't be distinguished"
    step = StepSettings(
        batch_size=settings.training.micro_batch_size,
        length=settings.data.max_length,
        gradient_accumulation_steps=1,
        checkpointing=settings.training.gradient_checkpointing,
        attention=settings.model.attention.value,
        backend=backend,
        capability=representative_capability(gpu.capability, adapted.model),
        dtype=dtype,
        is_autocast=False,
    )
    traced = trace_step(adapted, step, PlainStep)
    trained = trained_parameters(adapted.model, adapted.stack, adapted.chosen)
    optimized = optimizer_steps(
        settings.training.optimizer,
        parameter_groups(adapted.model, trained, loraplus=False),
        clips=False,
        decays=settings.training.weight_decay > 0,
        embeddings=embedding_ids(adapted.model),
    )
    resident = load_and_upcast(layout)
    load_adapter(resident, trained)
    events = RunEvents(
        resident=resident,
        step=extend(traced.trace, adapted.stack, adapted.chosen),
        optimizer=optimized.passes,
        num_micro_batches=1,
        evaluates=False,
    )
    return estimate_of(
        PlainReplay(cublas_workspace_bytes(gpu.capability)).peaks(events),
        gpu,
        dtype=settings.model.dtype.value,
        backends=traced.backends,
        checkpointing=step.checkpointing,
        paged_bytes=optimized.paged_bytes,
        pinned_host_bytes=0,
    )


def prepare(model: PreTrainedModel, layout: StoragePlan, lora: LoraSettings, *, whole: bool = False) -> MetaModel:
    """Return `model`, reduced and stored as planned by `layout`, prepared and adapted by PEFT: all else in fp32."""
    stack, chosen = store_few_layers(model, layout, layout.dtype, whole=whole)
    model.requires_grad_(False)
    if layout.settings.method.is_quantized:
        # The step switches checkpointing on, if the settings ask for it.
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    targets = lora.target_modules
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        bias="none",
    )
    return MetaModel(model=get_peft_model(model, config), stack=stack, chosen=chosen, notes=())


def load_and_upcast(layout: StoragePlan) -> Passes:
    """Return the allocations of loading, and of the cast to fp32 after it, in the order of the model.

    A model that is not quantized is moved from host memory as a whole, and stays in 16 bit.
    """
    passes = Passes()
    load = Recorder(passes, LOAD, UNQUANTIZED)
    is_quantized = layout.settings.method.is_quantized
    in_order = layout.inventory.entries
    numbers = {
        entry.name: load_weight(load, entry, layout)
        for entry in (warm_up(load, in_order) if is_quantized else in_order)
    }
    load.allocate(layout.inventory.buffer_bytes)
    upcast = Recorder(passes, UPCAST, UNQUANTIZED)
    for entry in in_order if is_quantized else ():
        if not entry.is_quantized:
            upcast.allocate(entry.num_parameters * FLOAT_BYTES)
            upcast.free(*numbers[entry.name])
    return passes


class PlainStep(TrainingStep):
    """A step that calls the model with labels, and drops its outputs after the optimizer's step."""

    outputs: Any = None

    def loss(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, Any]:
        """Return the model's own loss, and the outputs with the full logits, `(batch, seq, vocabulary)`."""
        self.outputs = self.model(**batch)
        return self.outputs.loss, self.outputs

    def columns(self) -> dict[str, int]:
        """Return the columns of a batch whose rows have equal length."""
        return {"input_ids": 0, "labels": 0}

    def zero_gradients(self) -> None:
        """Drop the outputs, then the gradients."""
        self.outputs = None
        super().zero_gradients()


class PlainReplay(Replay):
    """A run that empties the allocator's cache after the cast to fp32, as PEFT's preparation does."""

    def load(self, resident: Passes) -> None:
        """Replay loading, cast and adapter."""
        self.run("load", resident, [LOAD, UPCAST])
        if resident.events[UPCAST]:
            self.allocator.empty_cache()
        self.run("load", resident, [ADAPT])
