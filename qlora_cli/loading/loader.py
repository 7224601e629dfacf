"""Load a base model: find its files, quantize its linear layers on the way in, count what came of it."""

import time
from dataclasses import dataclass
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging
from transformers.utils.import_utils import is_flash_attn_2_available

from qlora_cli.errors import HardwareError, MissingDependencyError, ModelError, OutOfMemoryError
from qlora_cli.events import Noted, PhaseStarted, Reporter, SilentReporter
from qlora_cli.loading.device import ComputeDtype, choose_compute_dtype, choose_device
from qlora_cli.loading.inventory import Inventory, take_inventory
from qlora_cli.loading.report import LoadReport
from qlora_cli.loading.source import ModelSource, find_model
from qlora_cli.loading.tokenizer import load_tokenizer
from qlora_cli.memory.measure import (
    peak_device_allocated_bytes,
    peak_host_bytes,
    reset_device_peak,
)
from qlora_cli.settings.models import (
    Attention,
    LoadSettings,
    ModelSettings,
    Quantization,
    QuantizationSettings,
)

_SILENT = SilentReporter()


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A base model, ready for an adapter, with all that is known of how it was loaded."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: ModelSource
    settings: LoadSettings
    device: torch.device
    dtype: ComputeDtype
    attention: str
    inventory: Inventory
    load_seconds: float
    peak_host_bytes: int
    peak_device_bytes: int | None
    notes: tuple[str, ...]

    def report(self) -> LoadReport:
        """Return the same in plain numbers."""
        inventory = self.inventory
        return LoadReport(
            model=self.source.name,
            revision=self.source.revision,
            commit=self.source.commit,
            architecture=type(self.model).__name__,
            device=str(self.device),
            quantization=self.settings.quantization.method.value,
            double_quant=_is_double(self.settings.quantization),
            num_parameters=inventory.num_parameters,
            num_quantized_parameters=inventory.num_quantized_parameters,
            total_bytes=inventory.total_bytes,
            quantized_weight_bytes=inventory.quantized_weight_bytes,
            quantization_constant_bytes=inventory.quantization_constant_bytes,
            unquantized_bytes=inventory.unquantized_bytes,
            float32_bytes=inventory.float32_bytes,
            float16_bytes=inventory.float16_bytes,
            compute_dtype=self.dtype.name.value,
            compute_dtype_reason=self.dtype.reason,
            load_seconds=self.load_seconds,
            peak_host_bytes=self.peak_host_bytes,
            peak_device_bytes=self.peak_device_bytes,
            notes=self.notes,
        )


def load_model(settings: LoadSettings, reporter: Reporter = _SILENT) -> LoadedModel:
    """Load `settings.model`, quantized as `settings.quantization` says, frozen, with its tokenizer.

    Raises:
        ModelNotFoundError: no such model.
        ModelError: the files are no causal language model that can be loaded without running its own code.
        HardwareError: the device or dtype asked for is not there.
        MissingDependencyError: the attention kernel asked for is not installed.
        OutOfMemoryError: the quantized model does not fit on the device.
    """
    start = time.monotonic()
    transformers_logging.disable_progress_bar()  # ours tells the phase; theirs would break `--json` logs
    device = choose_device(settings.model.device)
    dtype = choose_compute_dtype(settings.model.dtype, device)
    attention = choose_attention(settings.model.attention, device)
    reporter.report(PhaseStarted(title=f"Finding {settings.model.name}"))
    source = find_model(settings.model)
    tokenizer, notes = load_tokenizer(source)
    for note in notes:
        reporter.report(Noted(message=note))
    reporter.report(PhaseStarted(title=f"Loading {settings.model.name} ({_describe(settings.quantization)})"))
    reset_device_peak(device)
    model = _load_weights(settings, source, device, dtype, attention)
    _check_vocabulary(model, tokenizer, settings.model)
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        source=source,
        settings=settings,
        device=device,
        dtype=dtype,
        attention=attention,
        inventory=take_inventory(model),
        load_seconds=time.monotonic() - start,
        peak_host_bytes=peak_host_bytes(),
        peak_device_bytes=peak_device_allocated_bytes(device),
        notes=tuple(notes),
    )


def choose_attention(wanted: Attention, device: torch.device) -> str:
    """Return the attention implementation by the name that transformers gives it."""
    if wanted == Attention.AUTO:
        return Attention.SDPA.value
    if wanted == Attention.FLASH_ATTENTION_2:
        if device.type != "cuda":
            raise HardwareError("flash_attention_2 needs an NVIDIA GPU", hint="Use --attention sdpa.")
        if not is_flash_attn_2_available():
            raise MissingDependencyError(
                "flash_attention_2 needs the package flash-attn",
                hint="Run: pip install flash-attn, or use --attention sdpa.",
            )
    return wanted.value


def quantization_config(settings: QuantizationSettings, dtype: ComputeDtype) -> BitsAndBytesConfig | None:
    """Return the settings as bitsandbytes takes them; None to load unquantized.

    Every field is set: the defaults of `BitsAndBytesConfig` are FP4 without double quantization, in fp32.
    """
    if settings.method == Quantization.NONE:
        return None
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=settings.method.value,
        bnb_4bit_use_double_quant=settings.double_quant,
        bnb_4bit_compute_dtype=dtype.torch_dtype,
        bnb_4bit_quant_storage=torch.uint8,
    )


def _load_weights(
    settings: LoadSettings, source: ModelSource, device: torch.device, dtype: ComputeDtype, attention: str
) -> PreTrainedModel:
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source.path,
            quantization_config=quantization_config(settings.quantization, dtype),
            dtype=dtype.torch_dtype,
            device_map={"": device},
            attn_implementation=attention,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except torch.OutOfMemoryError as error:
        raise OutOfMemoryError(
            f"{source.name} does not fit on {device} while loading: {error}",
            hint="Free the GPU (nvidia-smi shows who uses it), or take a smaller model.",
        ) from error
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"{source.name} can't be loaded: {error}", hint="Is it a causal language model?") from error
    model: PreTrainedModel = loaded[0]
    info: dict[str, Any] = loaded[1]
    lost = {kind: sorted(info[kind]) for kind in ("missing_keys", "mismatched_keys") if info.get(kind)}
    if lost:
        kind, keys = next(iter(lost.items()))
        raise ModelError(
            f"the weights of {source.name} do not match its config.json: {len(keys)} {kind.replace('_', ' ')}, "
            f"such as {keys[0]}",
            hint="These tensors would be random. Check that the directory holds the whole model.",
        )
    _keep_stored_bytes(model)
    if source.commit is not None:
        # The adapter names its base by this: a hub id means the same elsewhere, a path in our cache does not.
        model.name_or_path = model.config.name_or_path = source.name
    model.requires_grad_(False)
    return model


def _keep_stored_bytes(model: PreTrainedModel) -> None:
    # On CPUs with AVX512-BF16, bitsandbytes repacks the weights at the first evaluation and then computes
    # with bf16 scales: another model than the one that trains, and other bytes than the ones loaded.
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def _check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: ModelSettings) -> None:
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, nn.Embedding)
    num_rows = embedding.num_embeddings
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest >= num_rows:
        raise ModelError(
            f"the tokenizer of {settings.name} has ids up to {largest}, but the embedding only {num_rows} rows",
            hint="The tokenizer belongs to another model, or tokens were added without resizing the model.",
        )


def _is_double(settings: QuantizationSettings) -> bool:
    return settings.method != Quantization.NONE and settings.double_quant


def _describe(settings: QuantizationSettings) -> str:
    if settings.method == Quantization.NONE:
        return "not quantized"
    return f"{settings.method.value.upper()}, {'double' if settings.double_quant else 'single'} quantization"
