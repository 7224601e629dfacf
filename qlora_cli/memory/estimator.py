"""Predict a run on a GPU: build its model without bytes, trace a step, extend it; replay its memory, add up its time.

What several predictions share is computed once: the shapes for a dtype, the meta model for a storage and an adapter,
the peaks for GPUs with the same kernels.
"""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

from qlora_cli.adapters.base_parameters import switched_parameters_in
from qlora_cli.adapters.reader import Adapter, fit_outline, num_vocabulary_rows, without_values
from qlora_cli.attention.choice import choose_attention
from qlora_cli.attention.sdpa_rules import representative_capability
from qlora_cli.errors import ModelError, QloraError
from qlora_cli.hardware.device import AMPERE, TORCH_DTYPES, choose_compute_dtype, settle_compute_dtype
from qlora_cli.loading.model_outline import check_effect, stored_facts
from qlora_cli.memory.costs.host_memory import host_memory
from qlora_cli.memory.costs.run_files import FileSizes, weights_bytes
from qlora_cli.memory.costs.step_time import kind_of_step, rates_on, step_time
from qlora_cli.memory.gpus import Gpu
from qlora_cli.memory.kept_products import recomputed_products
from qlora_cli.memory.model_facts import ModelFacts
from qlora_cli.memory.prediction import Estimate, HostMemory, Product, StepTime
from qlora_cli.memory.replaying.figures import estimate_of
from qlora_cli.memory.replaying.loaded_weights import load_adapter, load_weights, trained_parameters
from qlora_cli.memory.replaying.optimizer_step import embedding_ids, optimizer_steps, parameter_groups
from qlora_cli.memory.replaying.replay import Peaks, Replay, RunEvents
from qlora_cli.memory.replaying.update_operations import update_operations
from qlora_cli.memory.request import runs_evaluation
from qlora_cli.memory.traced_run import TracedRun, checkpointing_of, micro_batches_of
from qlora_cli.memory.tracing.extension import UnevenError, extend, passes_of
from qlora_cli.memory.tracing.kernels import cublas_workspace_bytes
from qlora_cli.memory.tracing.meta_model import MetaModel, build_meta_model
from qlora_cli.memory.tracing.operation_count import extended
from qlora_cli.memory.tracing.pair_step import loop_of
from qlora_cli.memory.tracing.passes import Passes
from qlora_cli.memory.tracing.shards import ShardedBase, sharded_base
from qlora_cli.memory.tracing.training_step import Loop, StepSettings, TracedStep, trace_step
from qlora_cli.model_files.given_model import CONFIG
from qlora_cli.model_files.model_config import ModelConfig, balances_experts, config_from, read_config
from qlora_cli.model_files.source import ModelSource
from qlora_cli.quantization.embedding import embedding_of, is_tied
from qlora_cli.quantization.methods import method_of
from qlora_cli.quantization.methods.skip_modules import fused_experts
from qlora_cli.quantization.prequantized import Prequantized, check_settings, read_prequantized
from qlora_cli.quantization.storage_plan import StoragePlan, build_on_meta, plan_layout, with_rows
from qlora_cli.settings.choices import Dtype, SdpaBackend, TrainingLoss
from qlora_cli.settings.models import EstimateSettings
from qlora_cli.settings.resolve import Resolved
from qlora_cli.settings.sections.inspect_memory import Link
from qlora_cli.settings.settle import settle
from qlora_cli.tokenizing.positions import apply_rope_scaling, check_length, limit_length, num_positions

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
Value = TypeVar("Value")
EstimateT = TypeVar("EstimateT", bound=EstimateSettings)


class Estimator:
    """Predicts runs of one model."""

    def __init__(
        self,
        facts: ModelFacts,
        *,
        backend: SdpaBackend = SdpaBackend.AUTO,
        evaluates: bool | None = None,
        whole: bool = False,
        loop: Loop | None = None,
        on_host: bool = False,
        link: Link = Link.PCIE,
    ) -> None:
        """Predict from the model's facts, for settings that are `settled`.

        `evaluates`: whether an evaluation batch is run as well; None if the settings decide. `whole` traces all layers
        instead of a few: slower, with the same result. `loop` makes the step that is traced, as for `trace_step`.
        `on_host`: runs are on a CPU, whose kernels decide how some weights are stored. `link`: between several GPUs.
        """
        self._facts = facts
        self._backend = backend
        self._evaluates = evaluates
        self._whole = whole
        self._loop = loop
        self._link = link
        self._device = CPU if on_host else CUDA
        self._cache: dict[Any, Any] = {}

    def settled(self, asked: Resolved[EstimateT]) -> Resolved[EstimateT]:
        """Return the settings of a run with the defaults that the model and the adapter decide.

        Raises:
            ModelError: a setting contradicts the checkpoint, has no effect on it, or is too long for it.
        """
        name, stored = self._facts.name, self._prequantized()
        if stored is not None:
            check_settings(stored, asked.given("quantization"), name)
        facts = [
            *([] if stored is None else stored_facts(stored, f"{CONFIG} of {name}")),
            *self._facts.settings,
        ]
        loaded = settle(asked, facts)
        check_effect(asked, loaded, name)
        positions = num_positions(self.shapes(loaded.settings, Dtype.BF16).config)
        settled = settle(asked, [*limit_length(asked.settings, positions), *facts])
        self._check_length(settled.settings)
        return settled

    def _check_length(self, settings: EstimateSettings) -> None:
        config = self.shapes(settings, Dtype.BF16).config
        check_length(config, settings.data.max_length, settings.model.rope_scaling)

    def _prequantized(self) -> Prequantized | None:
        return self._cached("prequantized", lambda: read_prequantized(self._facts.content, self._facts.name))

    def estimate(self, settings: EstimateSettings, gpu: Gpu) -> Estimate:
        """Return the estimate of the run on `gpu`.

        Raises:
            ModelError: the model can't be run with these settings.
            HardwareError: the GPU can't compute with them.
        """
        method_of(settings.quantization.method).check_trainable(settings.quantization)
        traced = self.traced(settings, gpu)
        return estimate_of(
            self.peaks(settings, gpu),
            gpu,
            dtype=self.dtype_on(settings, gpu).value,
            backends=traced.backends,
            checkpointing=checkpointing_of(settings).value,
            paged_bytes=traced.paged_bytes,
            pinned_host_bytes=traced.pinned_host_bytes,
            time=self.step_time(settings, gpu),
        )

    def step_time(self, settings: EstimateSettings, gpu: Gpu) -> StepTime | None:
        """Return the time of an optimizer step on `gpu`; None if its speed, or that in the dtype, is not known.

        Raises:
            ModelError: the model can't be run with these settings.
            HardwareError: the GPU can't compute with them.
        """
        dtype, known = self.dtype_on(settings, gpu), rates_on(gpu)
        if gpu.is_host and known is not None and known.dtype != dtype:
            return None
        traced, micro_batches = self.traced(settings, gpu), micro_batches_of(settings)
        return step_time(
            traced.micro_batch,
            traced.update,
            gpu,
            num_micro_batches=micro_batches["gradient_accumulation_steps"],
            num_tokens=micro_batches["batch_size"] * micro_batches["length"],
            gradient_bytes=traced.files.adapter_bytes,
            num_processes=settings.training.num_gpus,
            received_bytes=0 if traced.sharded is None else traced.sharded.received_bytes,
            copied_bytes=0 if traced.sharded is None else traced.sharded.copied_bytes,
            link=self._link,
            pinned_host_bytes=traced.pinned_host_bytes,
            kind=kind_of_step(settings, dtype),
        )

    def dtype_on(self, settings: EstimateSettings, gpu: Gpu) -> Dtype:
        """Return the compute dtype on `gpu`."""
        if gpu.is_host:
            return choose_compute_dtype(settings.model.dtype, CPU, self.model_type).name
        native = gpu.capability >= AMPERE
        reason = f"{gpu.name} {'has' if native else 'has no'} bf16 tensor cores"
        return settle_compute_dtype(settings.model.dtype, "cuda", self.model_type, native, reason).name

    @property
    def model_type(self) -> str:
        """The type of the model, as its config names it."""
        return str(self._facts.content.get("model_type", ""))

    def shapes(self, settings: EstimateSettings, dtype: Dtype) -> PreTrainedModel:
        """Return the model on the meta device, with nothing quantized."""
        model = settings.model
        key = ("shapes", dtype, model.rope_scaling, model.trust_remote_code)
        return self._cached(key, lambda: self._build(settings, dtype))

    def _build(self, settings: EstimateSettings, dtype: Dtype) -> PreTrainedModel:
        model = settings.model
        config = deepcopy(self._config(model.trust_remote_code).config)
        apply_rope_scaling(config, model.rope_scaling)
        shapes = build_on_meta(config, TORCH_DTYPES[dtype], trust_remote_code=model.trust_remote_code)
        num_rows = self._num_rows(shapes, model.trust_remote_code)
        return with_rows(shapes, config, num_rows, TORCH_DTYPES[dtype], trust_remote_code=model.trust_remote_code)

    def _num_rows(self, shapes: PreTrainedModel, trust_remote_code: bool) -> int:
        """Return the number of embedding rows that an adapter to train further needs; 0 for the model's own."""
        outline, base = self._facts.adapter, self._config(trust_remote_code)
        if outline is None:
            return 0
        return self._cached(
            "rows", lambda: max(outline.num_rows, num_vocabulary_rows(without_values(outline), shapes, base))
        )

    def _adapter(self, settings: EstimateSettings, dtype: Dtype) -> Adapter | None:
        """Return the adapter to train further, with its shapes; None for a new one."""
        outline, base = self._facts.adapter, self._config(settings.model.trust_remote_code)
        if outline is None:
            return None
        return self._cached(("adapter", dtype), lambda: fit_outline(outline, self._build(settings, dtype), base))

    def layout(self, settings: EstimateSettings, dtype: Dtype) -> StoragePlan:
        """Return the plan by which the weights are stored."""
        quantization = settings.quantization
        # Without the scaling of positions, which changes no weight.
        key = ("layout", dtype, quantization.model_dump_json())

        def plan() -> StoragePlan:
            stored, shapes = self._prequantized(), self.shapes(settings, dtype)
            if stored is not None:  # suggestions ask for other settings than those of the run
                check_settings(stored, dict(quantization), self._facts.name)
            return plan_layout(shapes, quantization, TORCH_DTYPES[dtype], stored, device=self._device)

        return self._cached(key, plan)

    def peaks(self, settings: EstimateSettings, gpu: Gpu) -> Peaks:
        """Return the peaks of the run on `gpu`, without the CUDA context."""
        events = self.traced(settings, gpu).events
        deterministic = settings.training.full_determinism
        workspace_bytes = cublas_workspace_bytes(gpu.capability, deterministic=deterministic)
        # An id suffices, since the cache keeps the events. The GPU's memory is left out: a replay has no limit.
        return self._cached((id(events), workspace_bytes), lambda: Replay(workspace_bytes).peaks(events))

    def resident_bytes(self, settings: EstimateSettings, gpu: Gpu) -> int:
        """Return what the weights of the base and the CUDA context take of the memory of `gpu`.

        If several share the base, it is a little less: the constants of quantization are not shared.
        """
        dtype = self.dtype_on(settings, gpu)
        on_host = set(self._on_host(settings, dtype))
        entries = self.layout(settings, dtype).inventory.entries
        held = [entry for entry in entries if entry.name not in on_host]
        constants = sum(entry.constant_bytes for entry in held)
        if _keeps_shards_on_host(settings, gpu):
            return gpu.context_bytes + constants
        stored, training = constants + sum(entry.weight_bytes for entry in held), settings.training
        return gpu.context_bytes + stored // (training.num_gpus if training.shards_base else 1)

    def host_memory(self, settings: EstimateSettings, gpu: Gpu, *, num_rows: int) -> HostMemory:
        """Return what the run takes from the host's memory, with `num_rows` rows of data."""
        shapes, traced = self.shapes(settings, self.dtype_on(settings, gpu)), self.traced(settings, gpu)
        sizes = [weight.numel() * weight.element_size() for weight in shapes.parameters()]
        embedding, ends = embedding_of(shapes).weight, 0
        if traced.sharded is not None:  # what is in no layer is read to the host before it is sharded
            names = [name for name, shard in traced.sharded.shards.items() if shard.is_of_end]
            ends = sum(shapes.get_parameter(name).nbytes for name in names)
        return host_memory(
            largest_weight_bytes=max(*sizes, ends),
            embedding_bytes=embedding.nbytes if settings.model.offload_embedding else 0,
            shard_bytes=0 if traced.sharded is None else traced.sharded.host_bytes,
            pinned_bytes=traced.pinned_host_bytes,
            paged_bytes=traced.paged_bytes,
            files=traced.files,
            num_rows=num_rows,
            num_processes=settings.training.num_gpus,
        )

    @staticmethod
    def num_micro_batches(settings: EstimateSettings) -> int:
        """Return the micro-batches of a step on one GPU."""
        number: int = micro_batches_of(settings)["gradient_accumulation_steps"]
        return number

    def balances_experts(self, settings: EstimateSettings) -> bool:
        """Return whether the loss has a part that balances experts, which is a mean over a micro-batch."""
        return balances_experts(self.shapes(settings, Dtype.BF16).config)

    def weights_bytes(self, settings: EstimateSettings, dtype: Dtype) -> int:
        """Return about the size of the model's weight files."""
        inventory, stored = self.layout(settings, dtype).inventory, self._prequantized()
        quantized_bytes = None if stored is None else inventory.total_bytes
        return weights_bytes(self._facts.content, inventory.num_parameters, quantized_bytes)

    def recomputed_products(self, settings: EstimateSettings, gpu: Gpu) -> Sequence[Product]:
        """Return the products of the base that a run computes twice; its whole layers are recomputed.

        Raises:
            ModelError: the model can't be run with these settings.
            HardwareError: the GPU can't compute with them.
        """
        dtype, micro_batch = self.dtype_on(settings, gpu), micro_batches_of(settings)
        return recomputed_products(
            self.shapes(settings, dtype),
            self.traced(settings, gpu).micro_batch,
            num_tokens=micro_batch["batch_size"] * micro_batch["length"],
            itemsize=TORCH_DTYPES[dtype].itemsize,
        )

    def traced(self, settings: EstimateSettings, gpu: Gpu) -> TracedRun:
        """Return the allocations and operations of the run on a GPU with the kernels of `gpu`."""
        dtype = self.dtype_on(settings, gpu)
        own, shapes = gpu.capability, self.shapes(settings, dtype)
        key = ("capability", own, id(shapes))
        capability = self._cached(key, lambda: representative_capability(own, shapes))
        step = self._step(settings, dtype, capability, gpu)
        training = settings.training
        # Of weight decay and LoRA+ only whether they are used: how much changes values, not sizes.
        optimizer = (training.optimizer, training.loraplus_lr_ratio is None, training.weight_decay > 0)
        # Exactly what decides the allocations. Full determinism changes only workspaces, whose size the replay sets.
        run = ("traced", self._meta_model_key(settings, dtype), step, optimizer, settings.model.offload_embedding)
        return self._cached(run, lambda: self._trace(settings, dtype, step))

    def _trace(self, settings: EstimateSettings, dtype: Dtype, step: StepSettings) -> TracedRun:
        layout = self.layout(settings, dtype)
        meta_model, passes, traced = self._trace_step(settings, dtype, step)
        trained = trained_parameters(meta_model.model, meta_model.stack, meta_model.chosen)
        sharded = self._sharded(settings, dtype, meta_model, is_on_host=step.shards_on_host)
        resident = load_weights(
            layout,
            num_experts=self._num_experts(settings, dtype),
            on_host=self._on_host(settings, dtype),
            sharded=sharded,
        )
        adapter = self._adapter(settings, dtype)
        load_adapter(resident, trained, [] if adapter is None else _copied_bytes(adapter, TORCH_DTYPES[dtype]))
        training = settings.training
        optimized = optimizer_steps(
            training.optimizer,
            parameter_groups(meta_model.model, trained, loraplus=training.loraplus_lr_ratio is not None),
            decays=training.weight_decay > 0,
            embeddings=embedding_ids(meta_model.model),
        )
        num_trained, switched = sum(each.numel() for each in trained), switched_parameters_in(meta_model.model)
        # Each layer offloads the same amount, and only the chosen ones were traced.
        ratio = len(meta_model.stack.kinds) / len(meta_model.chosen) if meta_model.stack else 1
        return TracedRun(
            events=RunEvents(
                resident=resident,
                step=passes,
                optimizer=optimized.passes,
                num_micro_batches=step.gradient_accumulation_steps,
                evaluates=runs_evaluation(settings, self._evaluates),
            ),
            micro_batch=extended(traced.operations, meta_model.stack, meta_model.chosen),
            update=update_operations(training.optimizer, trained),
            backends=traced.backends,
            paged_bytes=optimized.paged_bytes,
            pinned_host_bytes=round(traced.pinned_host_bytes * ratio),
            num_trained=num_trained,
            files=FileSizes.of(
                num_trained=num_trained,
                frozen_bytes=0 if switched is None else switched.frozen_bytes,
                state_bytes=optimized.state_bytes,
            ),
            sharded=sharded,
            notes=meta_model.notes,
        )

    def _sharded(
        self, settings: EstimateSettings, dtype: Dtype, meta_model: MetaModel, *, is_on_host: bool
    ) -> ShardedBase | None:
        if not settings.training.shards_base:
            return None
        entries = {entry.name: entry for entry in self.layout(settings, dtype).inventory.entries}
        adapted = meta_model.model.get_base_model()
        return sharded_base(
            self.shapes(settings, dtype),
            adapted,
            entries,
            settings.training.num_gpus,
            is_on_host=is_on_host,
            num_forward=settings.training.objective.num_forward_passes,
        )

    def _trace_step(
        self, settings: EstimateSettings, dtype: Dtype, step: StepSettings
    ) -> tuple[MetaModel, Passes, TracedStep]:
        """Trace a step through a few layers and extend it to all; where that is uneven, trace it through all."""
        meta_model = self._meta_model(settings, dtype, whole=self._whole)
        traced = self._run_step(meta_model, step)
        if meta_model.stack is None:
            return meta_model, passes_of(traced.trace), traced
        try:
            return meta_model, extend(traced.trace, meta_model.stack, meta_model.chosen), traced
        except UnevenError:
            meta_model = self._meta_model(settings, dtype, whole=True)
            traced = self._run_step(meta_model, step)
            return meta_model, passes_of(traced.trace), traced

    def _run_step(self, meta_model: MetaModel, step: StepSettings) -> TracedStep:
        try:
            return trace_step(meta_model, step, self._loop or loop_of(step))
        except RuntimeError as error:
            if isinstance(error, QloraError):
                raise
            raise ModelError(
                f"{self._facts.name} can't be run on tensors without data: {str(error).strip().splitlines()[0]}",
                hint="Its code reads values, or fails with this adapter. Measure its memory with train --max-steps.",
            ) from error

    def _meta_model(self, settings: EstimateSettings, dtype: Dtype, *, whole: bool) -> MetaModel:
        compute = settings.quantization.compute_dtype
        compute_dtype = TORCH_DTYPES[dtype if compute == Dtype.AUTO else compute]

        def build() -> MetaModel:
            num_new = len(settings.model.new_tokens or ())
            last = embedding_of(self.shapes(settings, dtype)).num_embeddings
            return build_meta_model(
                self._build(settings, dtype),  # not the shared shapes: it is reduced and changed
                self.layout(settings, dtype),
                settings.lora,
                compute_dtype=compute_dtype,
                new_token_ids=tuple(range(last - num_new, last)),
                adapter=self._adapter(settings, dtype),
                whole=whole,
            )

        return self._cached(("meta_model", whole, self._meta_model_key(settings, dtype)), build)

    def _meta_model_key(self, settings: EstimateSettings, dtype: Dtype) -> tuple[Any, ...]:
        """Return everything that the meta model depends on."""
        model = settings.model
        return (
            dtype,
            settings.quantization.model_dump_json(),
            settings.lora.model_dump_json(),
            model.rope_scaling,
            model.new_tokens,
        )

    def _step(self, settings: EstimateSettings, dtype: Dtype, capability: tuple[int, int], gpu: Gpu) -> StepSettings:
        self._check_length(settings)
        training = settings.training
        return StepSettings(
            **micro_batches_of(settings),
            checkpointing=checkpointing_of(settings),
            kept_products=training.kept_products,
            attention=self._attention(settings, dtype, gpu.capability),
            backend=self._backend,
            capability=capability,
            dtype=TORCH_DTYPES[dtype],
            is_autocast=dtype != Dtype.FP32,
            objective=training.objective,
            fuses_lora=training.fused_lora,
            trains_dft=training.loss == TrainingLoss.DFT,
            adds_noise=training.neftune_noise_alpha is not None,
            evaluates=runs_evaluation(settings, self._evaluates),
            num_shards=training.num_gpus if training.shards_base else 1,
            shards_on_host=_keeps_shards_on_host(settings, gpu),
        )

    def _attention(self, settings: EstimateSettings, dtype: Dtype, capability: tuple[int, int]) -> str:
        """Return transformers' name of the attention; the package that it needs is required only for the run."""
        asked, of, shapes = settings.model.attention, TORCH_DTYPES[dtype], self.shapes(settings, dtype)
        key = ("attention", asked, capability, id(shapes))
        return self._cached(
            key, lambda: choose_attention(asked, shapes, dtype=of, capability=capability)
        ).implementation

    def _num_experts(self, settings: EstimateSettings, dtype: Dtype) -> int:
        shapes = [shape for _, shape in fused_experts(self.shapes(settings, dtype))]
        return max((shape[0] for shape in shapes if len(shape) == 3), default=1)

    def _on_host(self, settings: EstimateSettings, dtype: Dtype) -> tuple[str, ...]:
        if not settings.model.offload_embedding:
            return ()
        shapes = self.shapes(settings, dtype)
        if is_tied(shapes):
            raise ModelError(
                "can't be used: the output head shares the weight, and needs it on the GPU",
                hint="Leave it out.",
                setting="model.offload_embedding",
            )
        embedding = embedding_of(shapes)
        return tuple(f"{name}.weight" for name, module in shapes.named_modules() if module is embedding)

    def _config(self, trust_remote_code: bool) -> ModelConfig:
        """Return the config of the model, which several of its parts are fitted to; nothing may change it."""
        return self._cached(("config", trust_remote_code), lambda: self._read_config(trust_remote_code))

    def _read_config(self, trust_remote_code: bool) -> ModelConfig:
        content: Mapping[str, Any] = self._facts.content
        if trust_remote_code and "auto_map" in content and self._facts.path is not None:
            name, path = self._facts.name, self._facts.path
            source = ModelSource(name=name, path=path, base_name=name, tokenizer_path=path)
            return read_config(source, trust_remote_code=True)
        return config_from(self._facts.name, content)

    def _cached(self, key: Any, make: Callable[[], Value]) -> Value:
        if key not in self._cache:
            self._cache[key] = make()
        value: Value = self._cache[key]
        return value


def _keeps_shards_on_host(settings: EstimateSettings, gpu: Gpu) -> bool:
    """Return whether the shards of the base are elsewhere than where the run computes."""
    return settings.training.offload_base and not gpu.is_host


def _copied_bytes(adapter: Adapter, dtype: torch.dtype) -> list[int]:
    """Return the size of each untrained base parameter of which the adapter's file has a copy."""
    copies = {id(value): value for name, value in adapter.base_parameters.items() if name not in adapter.trained}
    return [value.numel() * dtype.itemsize for value in copies.values()]
