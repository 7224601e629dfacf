"""Plan a load before a weight is read: files, config, tokenizer, storage layout, device, dtype."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from importlib.util import find_spec

import torch
from transformers import PreTrainedModel
from transformers.utils.import_utils import is_flash_attn_2_available, is_flash_attn_3_available

from qlora_cli.adapters.initialization import quantized_base_problem
from qlora_cli.adapters.reader import Adapter, StoredAdapter, fit, num_vocabulary_rows, open_adapter
from qlora_cli.attention.choice import ChosenAttention, choose_attention
from qlora_cli.errors import MissingDependencyError, ModelError
from qlora_cli.events import Noted, Reporter
from qlora_cli.hardware.device import TORCH_DTYPES, ComputeDtype, choose_compute_dtype, choose_device
from qlora_cli.hardware.driver import unused_gpu
from qlora_cli.loading.model_outline import ModelOutline, find, settle_load
from qlora_cli.model_files.adapter_files import notes_on_ignored_keys
from qlora_cli.model_files.model_config import ModelConfig
from qlora_cli.model_files.source import ModelSource
from qlora_cli.quantization.embedding import check_offload, embedding_of
from qlora_cli.quantization.memory_check import WHOLE, Shards, check_fit, free_bytes
from qlora_cli.quantization.methods import method_of
from qlora_cli.quantization.storage_plan import StoragePlan, build_on_meta, plan_layout, with_rows
from qlora_cli.settings.choices import Attention, Device, Dtype
from qlora_cli.settings.models import LoadSettings, ModelSettings, TrainSettings
from qlora_cli.settings.resolve import Resolved
from qlora_cli.tokenizing.positions import apply_rope_scaling
from qlora_cli.tokenizing.tokenizer import LoadedTokenizer, check_vocabulary, load_tokenizer


@dataclass(frozen=True)
class _Package:
    """A package with a kernel of attention: whether it is installed, and how to install it."""

    is_installed: Callable[[], bool]
    how: str


# Without its package, transformers would download a kernel for flash attention from the hub, and run it.
PACKAGES = {
    Attention.FLEX_ATTENTION: _Package(lambda: find_spec("triton") is not None, "Run: pip install triton"),
    Attention.FLASH_ATTENTION_2: _Package(is_flash_attn_2_available, "Run: pip install flash-attn"),
    Attention.FLASH_ATTENTION_3: _Package(
        is_flash_attn_3_available, "Install it from the folder hopper of github.com/Dao-AILab/flash-attention"
    ),
}


@dataclass(frozen=True, kw_only=True)
class LoadPlan:
    """Everything that is decided before a weight is read. `shapes` is the model on the meta device.

    `num_rows` is the number of embedding rows that tokenizer and adapter need; the base may have more.
    """

    settings: LoadSettings
    source: ModelSource
    base: ModelConfig
    shapes: PreTrainedModel
    layout: StoragePlan
    tokenizer: LoadedTokenizer
    device: torch.device
    dtype: ComputeDtype
    attention: ChosenAttention
    free_bytes: int
    adapter: Adapter | None
    num_rows: int
    notes: tuple[str, ...]

    @property
    def compute_torch_dtype(self) -> torch.dtype:
        """The dtype that quantized layers multiply in: that of the model, unless set otherwise."""
        asked = self.settings.quantization.compute_dtype
        return self.dtype.torch_dtype if asked == Dtype.AUTO else TORCH_DTYPES[asked]

    @property
    def num_own_rows(self) -> int | None:
        """The rows of the base's own vocabulary, if it is to be extended."""
        rows = embedding_of(self.shapes).num_embeddings
        return rows if rows < self.num_rows else None


def plan_load(asked: Resolved[LoadSettings], reporter: Reporter) -> LoadPlan:
    """Decide everything that does not need the weights; download the small files that are not in the cache.

    Raises:
        ModelNotFoundError: no such model.
        ModelError: the files are not a causal language model that can be loaded with these settings.
        HardwareError: the requested device or dtype is not available.
        MissingDependencyError: the requested attention kernel is not installed.
        OutOfMemoryError: the model does not fit on the device.
    """
    check_placement(asked.settings)
    model = find(asked.settings.model, reporter)
    return plan_outlined(model, settle_load(asked, model, reporter).settings, reporter)


def check_placement(settings: LoadSettings) -> None:
    """Check the settings against this machine, before looking for files.

    Raises:
        HardwareError: the requested device does not exist, or can't hold weights that are stored so.
    """
    quantization, offloads = settings.quantization, settings.model.offload_embedding
    device = choose_device(settings.model.device)
    method_of(quantization.method).check_placement(quantization, device, offloads_embedding=offloads)


def plan_outlined(model: ModelOutline, settings: LoadSettings, reporter: Reporter) -> LoadPlan:
    """Plan the load of a model with settled settings. Raises what `plan_load` raises."""
    check_placement(settings)
    device = choose_device(settings.model.device)
    if settings.model.device == Device.AUTO and (unused := unused_gpu()) is not None:
        reporter.report(Noted(level="warning", message="it runs on the CPU, slowly: {}. {}".format(*unused)))
    dtype = _dtype_on(device, settings, model.base)
    tokenizer = load_tokenizer(model.source, settings.model)
    scaling_note = apply_rope_scaling(model.base.config, settings.model.rope_scaling)
    shapes = build_on_meta(model.base.config, dtype.torch_dtype, trust_remote_code=settings.model.trust_remote_code)
    if settings.model.offload_embedding:
        check_offload(shapes, device)
    adapter, num_rows = _adapter_for(model, shapes, tokenizer, dtype, settings.model)
    attention = attention_on(device, settings.model.attention, shapes, dtype.torch_dtype)
    layout = plan_layout(shapes, settings.quantization, dtype.torch_dtype, model.prequantized, device=device)
    if adapter is not None and layout.is_quantized and (refusal := quantized_base_problem(adapter.lora)):
        raise refusal
    free = free_bytes(device)
    _check_fit(settings, shapes, layout, device, free, num_rows)
    ignored = notes_on_ignored_keys([model.source.adapter])
    notes = (*model.base.notes, *ignored, *((scaling_note,) if scaling_note else ()), *tokenizer.notes)
    for note in notes:
        reporter.report(Noted(message=note))
    return LoadPlan(
        settings=settings,
        source=model.source,
        base=model.base,
        shapes=shapes,
        layout=layout,
        tokenizer=tokenizer,
        device=device,
        dtype=dtype,
        attention=attention,
        free_bytes=free,
        adapter=adapter,
        num_rows=num_rows,
        notes=notes,
    )


def with_storage(plan: LoadPlan, model: ModelOutline, settings: LoadSettings) -> LoadPlan:
    """Return the plan of the same load with its weights stored as by other `settings`.

    Raises:
        HardwareError: weights can't be placed on the device so.
        ModelError: the model can't be stored so.
        OutOfMemoryError: it does not fit on the device.
    """
    check_placement(settings)
    dtype = plan.dtype.torch_dtype
    layout = plan_layout(plan.shapes, settings.quantization, dtype, model.prequantized, device=plan.device)
    _check_fit(settings, plan.shapes, layout, plan.device, plan.free_bytes, plan.num_rows)
    return replace(plan, settings=settings, layout=layout)


def _dtype_on(device: torch.device, settings: LoadSettings, base: ModelConfig) -> ComputeDtype:
    """Return the dtype of the model; that of quantized layers may differ, under the same rules."""
    compute = settings.quantization.compute_dtype
    if compute != Dtype.AUTO:
        choose_compute_dtype(compute, device, base.config.model_type)
    return choose_compute_dtype(settings.model.dtype, device, base.config.model_type)


def _adapter_for(
    model: ModelOutline,
    shapes: PreTrainedModel,
    tokenizer: LoadedTokenizer,
    dtype: ComputeDtype,
    settings: ModelSettings,
) -> tuple[Adapter | None, int]:
    """Return the adapter fitted to the base, if one was named, and the rows that the vocabulary needs."""
    source, base = model.source, model.base
    stored = None if source.adapter is None else open_adapter(source.adapter, allow_pickle=settings.allow_pickle)
    num_rows = max(tokenizer.num_rows, 0 if stored is None else num_vocabulary_rows(stored, shapes, base))
    _check_new_rows(shapes, tokenizer, num_rows, source, settings)
    adapter = None if stored is None else _fitted(stored, base, dtype.torch_dtype, num_rows, settings)
    return adapter, num_rows


def _check_fit(
    settings: LoadSettings,
    shapes: PreTrainedModel,
    layout: StoragePlan,
    device: torch.device,
    free: int,
    num_rows: int,
) -> None:
    on_both = free + (free_bytes(torch.device("cpu")) if layout.method.offloads_to_cpu(layout.settings) else 0)
    check_fit(
        settings.model.name,
        shapes,
        layout,
        device,
        on_both,
        offload_embedding=settings.model.offload_embedding,
        grows=num_rows > embedding_of(shapes).num_embeddings,
        shards=_shards(settings),
    )


def _shards(settings: LoadSettings) -> Shards:
    if not isinstance(settings, TrainSettings) or not settings.training.shards_base:
        return WHOLE
    return Shards(number=settings.training.num_gpus, on_host=settings.training.offload_base)


def attention_on(
    device: torch.device, asked: Attention, shapes: PreTrainedModel, dtype: torch.dtype
) -> ChosenAttention:
    """Return the attention on this machine.

    Raises:
        HardwareError: it does not run on the device.
        MissingDependencyError: it needs a package that is not installed.
        ModelError: the model does not compute attention so, or not in this dtype.
    """
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    chosen = choose_attention(asked, shapes, dtype=dtype, capability=capability)
    if chosen.name in PACKAGES and not PACKAGES[chosen.name].is_installed():
        raise MissingDependencyError(
            f"{chosen.name.value} needs the package {chosen.name.package}",
            hint=f"{PACKAGES[chosen.name].how}, or leave --attention out.",
        )
    return chosen


def _fitted(
    stored: StoredAdapter, base: ModelConfig, dtype: torch.dtype, num_rows: int, settings: ModelSettings
) -> Adapter:
    """Return the adapter fitted to the base, whose vocabulary has at least `num_rows`."""
    config, trust = deepcopy(base.config), settings.trust_remote_code
    model = build_on_meta(config, dtype, trust_remote_code=trust)
    return fit(stored, with_rows(model, config, num_rows, dtype, trust_remote_code=trust), base).adapter


def _check_new_rows(
    shapes: PreTrainedModel, tokenizer: LoadedTokenizer, needed: int, source: ModelSource, settings: ModelSettings
) -> None:
    num_rows = embedding_of(shapes).num_embeddings
    beyond = {number for number in tokenizer.tokenizer.get_vocab().values() if number >= num_rows}
    # New tokens add their rows, and an adapter's own tokenizer tells how far its base was extended.
    if source.adapter is None and not beyond <= set(tokenizer.new_token_ids):
        check_vocabulary(tokenizer.tokenizer, num_rows, settings)
    if needed > num_rows and settings.offload_embedding:
        raise ModelError(
            "an embedding in host memory can't be extended", hint="Leave --offload-embedding or the new tokens out."
        )
