"""Load a base model: find its files, plan the storage of each weight, check that it fits, read and count the weights.

Every command loads models with this module.
"""

import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.quantization_config import QuantizationConfigMixin

from qlora_cli.adapters.adapter import load_adapter
from qlora_cli.adapters.loftq import plan_residuals
from qlora_cli.adapters.reader import Adapter
from qlora_cli.errors import ModelError
from qlora_cli.events import Noted, PhaseStarted, Reporter, SilentReporter
from qlora_cli.hardware.counters import peak_device_allocated_bytes, peak_host_bytes, reset_device_peak
from qlora_cli.hardware.device import ComputeDtype
from qlora_cli.hub.repository import check_download
from qlora_cli.loading.load_plan import LoadPlan, plan_load
from qlora_cli.loading.weight_reader import (
    apply_compute_settings,
    check_materialized,
    check_shapes,
    load_weights,
    quantization_config,
)
from qlora_cli.model_files.checkpoint import Checkpoint, check_for_transformers, read_checkpoint
from qlora_cli.model_files.model_config import ModelConfig
from qlora_cli.model_files.pickles import check_pickle
from qlora_cli.model_files.source import ModelSource, fetch_weights
from qlora_cli.model_files.unexpected_weights import note_on_prediction
from qlora_cli.quantization.calibrated_weights import CalibratedWeights
from qlora_cli.quantization.embedding import (
    embedding_of,
    extend_vocabulary,
    keep_on_host,
    offload_device_map,
    undo_dispatch,
)
from qlora_cli.quantization.entries import Inventory
from qlora_cli.quantization.inventory import take_inventory
from qlora_cli.quantization.kept_shards import KeptShards
from qlora_cli.quantization.load_report import CalibrationReport, LoadReport, WeightError
from qlora_cli.quantization.memory_check import fits_unquantized
from qlora_cli.quantization.storage_plan import StoragePlan
from qlora_cli.settings.choices import Dtype
from qlora_cli.settings.models import LoadSettings, LoraSettings
from qlora_cli.settings.settle import resolved_in_code

_SILENT = SilentReporter()


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A base model, ready for an adapter, with how it was loaded.

    `model` has an adapter attached if the source was an adapter or a run.
    """

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    new_token_ids: tuple[int, ...]
    source: ModelSource
    adapter: Adapter | None
    config: ModelConfig
    settings: LoadSettings
    device: torch.device
    dtype: ComputeDtype
    attention: str
    layout: StoragePlan
    inventory: Inventory
    errors: dict[str, float] | None
    shards: KeptShards | None
    calibration: CalibrationReport | None
    unquantized_fits: bool
    load_seconds: float
    peak_host_bytes: int
    peak_device_bytes: int | None
    notes: tuple[str, ...]

    @property
    def base(self) -> PreTrainedModel:
        """The model without its adapter, if it has one."""
        if isinstance(self.model, PeftModel):
            base: PreTrainedModel = self.model.get_base_model()
            return base
        return self.model

    @property
    def compute_dtype(self) -> ComputeDtype:
        """The dtype that quantized layers multiply in: that of the model, unless set otherwise."""
        asked = self.settings.quantization.compute_dtype
        return self.dtype if asked == Dtype.AUTO else ComputeDtype(name=asked, reason="as asked")

    def report(self) -> LoadReport:
        """Return the load in plain numbers."""
        inventory, quantization = self.inventory, self.settings.quantization
        errors = (
            None if self.errors is None else tuple(WeightError(name=n, relative_rms=e) for n, e in self.errors.items())
        )
        return LoadReport(
            model=self.source.name,
            base_model=self.source.base_name,
            revision=self.source.revision,
            commit=self.source.commit,
            adapter=self.source.adapter,
            adapter_step=self.source.adapter_step,
            run_is_done=self.source.run_is_done,
            architecture=type(self.base).__name__,
            device=str(self.device),
            quantization=quantization.method.value,
            quantization_settings={key: value for key, value in quantization.in_effect().items() if key != "method"},
            storage=self.layout.describe(),
            prequantized=self.layout.prequantized is not None,
            num_parameters=inventory.num_parameters,
            num_quantized_parameters=inventory.num_quantized_parameters,
            bits_per_quantized_parameter=inventory.bits_per_quantized_parameter,
            total_bytes=inventory.total_bytes,
            quantized_weight_bytes=inventory.quantized_weight_bytes,
            quantization_constant_bytes=inventory.quantization_constant_bytes,
            unquantized_bytes=inventory.unquantized_bytes,
            float32_bytes=inventory.float32_bytes,
            float16_bytes=inventory.float16_bytes,
            unquantized_fits=self.unquantized_fits,
            unquantized_model_bytes=inventory.num_parameters * self.dtype.torch_dtype.itemsize,
            kinds=inventory.kinds(),
            dtype_bytes=inventory.bytes_by_dtype(),
            errors=errors,
            calibration=self.calibration,
            compute_dtype=self.compute_dtype.name.value,
            compute_dtype_reason=self.compute_dtype.reason,
            load_seconds=self.load_seconds,
            peak_host_bytes=self.peak_host_bytes,
            peak_device_bytes=self.peak_device_bytes,
            saved=None,
            saved_bytes=None,
            notes=self.notes,
        )


def load_model(settings: LoadSettings, reporter: Reporter = _SILENT, *, measure_error: bool = False) -> LoadedModel:
    """Load `settings.model` with its tokenizer, frozen, and quantized by `settings.quantization`.

    With `measure_error` the quantization error of each weight is measured.

    Raises:
        QloraError: what `plan_load` and `load_planned` raise.
    """
    start = time.monotonic()
    return load_planned(
        plan_load(resolved_in_code(settings), reporter), reporter, measure_error=measure_error, started=start
    )


def load_planned(
    load_plan: LoadPlan,
    reporter: Reporter,
    *,
    measure_error: bool = False,
    trains_adapter: bool = False,
    lora: LoraSettings | None = None,
    shards: KeptShards | None = None,
    calibrated: CalibratedWeights | None = None,
    started: float | None = None,
) -> LoadedModel:
    """Read the weights of `load_plan`.

    With `trains_adapter` the named adapter will be trained further. `lora` describes the new adapter that will be
    attached, which may be initialized from quantization residuals. With `shards`, the model has placeholders for the
    weights that these keep, and all others are in host memory; `calibrated` codes are stored in place of the nearest
    ones. `started` is the monotonic time from which `load_seconds` counts; by default now.

    Raises:
        ModelError: weights are damaged, missing or unexpected, or the adapter can't be initialized.
        OutOfMemoryError: the device ran out of memory nevertheless.
    """
    start = time.monotonic() if started is None else started
    if measure_error:
        _check_measurable(load_plan.layout)
    residuals = None if lora is None else plan_residuals(load_plan.shapes, load_plan.layout, lora)
    settings, device = load_plan.settings, load_plan.device
    checkpoint = read_headers(load_plan, reporter)
    reporter.report(PhaseStarted(title=f"Loading {settings.model.name} ({load_plan.layout.describe()})"))
    reset_device_peak(device)
    quantization = quantization_config(
        load_plan.layout,
        load_plan.compute_torch_dtype,
        measure_error=measure_error,
        residuals=residuals,
        shards=shards,
        calibrated=calibrated,
    )
    model = _load(load_plan, checkpoint, reporter, quantization, shards)
    notes = _fit_to_tokenizer(model, load_plan, checkpoint, reporter)
    inventory = take_inventory(model, load_plan.layout.unquantized)
    return LoadedModel(
        model=_with_adapter(model, load_plan, trainable=trains_adapter),
        tokenizer=load_plan.tokenizer.tokenizer,
        new_token_ids=load_plan.tokenizer.new_token_ids,
        source=load_plan.source,
        adapter=load_plan.adapter,
        config=load_plan.base,
        settings=settings,
        device=device,
        dtype=load_plan.dtype,
        attention=load_plan.attention.name.value,
        layout=load_plan.layout,
        inventory=inventory,
        errors=load_plan.layout.method.measured_errors(model) if measure_error else None,
        shards=shards,
        calibration=None if calibrated is None else calibrated.report,
        unquantized_fits=fits_unquantized(load_plan.layout, load_plan.free_bytes),
        load_seconds=time.monotonic() - start,
        peak_host_bytes=peak_host_bytes(),
        peak_device_bytes=peak_device_allocated_bytes(device),
        notes=(*load_plan.notes, *notes),
    )


def _fit_to_tokenizer(
    model: PreTrainedModel, load_plan: LoadPlan, checkpoint: Checkpoint, reporter: Reporter
) -> list[str]:
    """Give the model the rows and the end tokens of its tokenizer; return notes on it, which are reported."""
    notes = _extend_vocabulary(model, load_plan)
    _align_end_tokens(model, load_plan.tokenizer.tokenizer)
    if note := note_on_prediction(model.config, checkpoint.tensors, "not loaded, and not trained"):
        notes.append(note)
    for note in notes:
        reporter.report(Noted(message=note))
    return notes


def _with_adapter(model: PreTrainedModel, load_plan: LoadPlan, *, trainable: bool) -> PreTrainedModel | PeftModel:
    if load_plan.adapter is None:
        return model
    return load_adapter(model, load_plan.adapter, trainable=trainable, num_rows=load_plan.num_own_rows)


def _load(
    load_plan: LoadPlan,
    checkpoint: Checkpoint,
    reporter: Reporter,
    quantization: QuantizationConfigMixin | None,
    shards: KeptShards | None,
) -> PreTrainedModel:
    settings, device = load_plan.settings, load_plan.device
    model = load_weights(
        load_plan.source,
        checkpoint,
        load_plan.base,
        load_plan.layout,
        device_map=_device_map(load_plan) if shards is None else {"": "cpu"},
        quantization=quantization,
        attention=load_plan.attention.implementation,
        trust_remote_code=settings.model.trust_remote_code,
        reporter=reporter,
        shards=shards,
    )
    if load_plan.layout.prequantized is not None:
        apply_compute_settings(model, load_plan.layout, load_plan.compute_torch_dtype)
    if settings.model.offload_embedding:
        undo_dispatch(model)
        if load_plan.layout.settings.method.is_quantized:
            # accelerate refuses to train quantized models on two devices, and moves an unquantized one that is on one.
            setattr(model, "hf_device_map", {"": device})  # noqa: B010 - an attribute that transformers adds
        keep_on_host(embedding_of(model), device)
    check_materialized(load_plan.source, model)
    return model


def read_headers(load_plan: LoadPlan, reporter: Reporter) -> Checkpoint:
    """Download the weights, and check that they are complete and have the planned shapes.

    Raises:
        ModelError: they are not.
        ModelNotFoundError: they are on the hub, which can't be reached or denies access.
    """
    fetch_weights(load_plan.source, reporter)
    return _read_checkpoint(load_plan)


def check_weights(load_plan: LoadPlan, reporter: Reporter) -> None:
    """Check the weights as far as possible without reading or downloading them.

    Raises:
        ModelError: they are incomplete, or their shapes differ from the model's.
        ModelNotFoundError: they are on the hub, which can't be reached or denies access.
        DiskSpaceError: they have to be downloaded, and do not fit on the disk.
    """
    pending = load_plan.source.pending
    if pending is None or not check_download(pending.repository, pending.names, reporter):
        _read_checkpoint(load_plan)


def _read_checkpoint(load_plan: LoadPlan) -> Checkpoint:
    checkpoint = read_checkpoint(load_plan.source.path, allow_pickle=load_plan.settings.model.allow_pickle)
    check_for_transformers(load_plan.source.path, allow_pickle=load_plan.settings.model.allow_pickle)
    if checkpoint.is_pickle:
        tensors = [check_pickle(file) for file in checkpoint.files]
        checkpoint = replace(checkpoint, tensors={name: one for part in tensors for name, one in part.items()})
    check_shapes(load_plan.source, checkpoint, load_plan.shapes, load_plan.layout)
    return checkpoint


def _device_map(load_plan: LoadPlan) -> dict[str, Any] | str:
    if load_plan.layout.method.offloads_to_cpu(load_plan.layout.settings):
        return "auto"
    if load_plan.settings.model.offload_embedding:
        return offload_device_map(load_plan.shapes, load_plan.device)
    return {"": load_plan.device}


def _align_end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Set the end and pad tokens of generation to the tokenizer's, which a chat template may have changed."""
    for config in (model.generation_config, model.config):
        known = getattr(config, "eos_token_id", None)
        ends = known if isinstance(known, list) else [] if known is None else [known]
        if tokenizer.eos_token_id not in ends:
            config.eos_token_id = [tokenizer.eos_token_id, *ends]
        config.pad_token_id = tokenizer.pad_token_id


def _extend_vocabulary(model: PreTrainedModel, load_plan: LoadPlan) -> list[str]:
    before = load_plan.num_own_rows
    if before is None:
        return []
    needed = load_plan.num_rows
    extend_vocabulary(model, needed)
    note = f"the embedding was extended from {before:,} to {needed:,} rows"
    return [note if load_plan.adapter is None else f"{note}; without the adapter, no new token is predicted"]


def _check_measurable(layout: StoragePlan) -> None:
    if layout.prequantized is not None or not layout.settings.method.traits.measures_error:
        what = "is already quantized" if layout.prequantized is not None else "is not quantized to 4 bit"
        raise ModelError(f"the model {what}, so there is no 4-bit error to measure", hint="Leave --error out.")
