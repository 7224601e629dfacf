"""Settle everything about a model before a weight is read: files, config, tokenizer, layout, device, dtype."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import ValidationError
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging
from transformers.utils.import_utils import is_flash_attn_2_available

from qlora_cli.errors import HardwareError, MissingDependencyError, ModelError
from qlora_cli.events import Noted, PhaseStarted, Reporter
from qlora_cli.loading.checkpoint import Checkpoint, read_checkpoint
from qlora_cli.loading.config import ModelConfig, read_config
from qlora_cli.loading.device import ComputeDtype, choose_compute_dtype, choose_device
from qlora_cli.loading.embedding import check_offload, embedding_of
from qlora_cli.loading.fit import check_fit, free_bytes
from qlora_cli.loading.layout import Layout, build_on_meta, plan_layout
from qlora_cli.loading.positions import apply_rope_scaling, check_length
from qlora_cli.loading.prequantized import Prequantized, check_settings, read_prequantized, stored_settings
from qlora_cli.loading.source import ModelSource, find_model
from qlora_cli.loading.tokenizer import LoadedTokenizer, check_vocabulary, load_tokenizer
from qlora_cli.loading.weights import check_shapes
from qlora_cli.settings.models import (
    Attention,
    LoadSettings,
    ModelSettings,
    Quantization,
    QuantizationSettings,
    Section,
)
from qlora_cli.settings.resolve import EFFECTIVE_WITH

SectionT = TypeVar("SectionT", bound=Section)
# Of a run's model settings, those that made the base that its adapter fits. New tokens and chat template come with the
# adapter's tokenizer; device and kernel are those of this machine; code of others is trusted anew each time.
TAKEN_FROM_RUN = ("dtype", "rope_scaling", "resize_vocab")


@dataclass(frozen=True, kw_only=True)
class Blueprint:
    """All that is settled before a weight is read. `shapes` is the model on the meta device."""

    settings: LoadSettings
    source: ModelSource
    checkpoint: Checkpoint
    base: ModelConfig
    shapes: PreTrainedModel
    layout: Layout
    tokenizer: LoadedTokenizer
    device: torch.device
    dtype: ComputeDtype
    attention: str
    free_bytes: int
    notes: tuple[str, ...]

    def describe_storage(self) -> str:
        """Return in a few words how the model is stored: `NF4, double quantization`."""
        settings = self.layout.settings
        if settings.method == Quantization.NONE:
            return "not quantized"
        stored = ", as stored" if self.layout.prequantized is not None else ""
        if settings.method == Quantization.INT8:
            return f"LLM.int8(){stored}"
        return (
            f"{settings.method.value.upper()}, {'double' if settings.double_quant else 'single'} quantization{stored}"
        )


def plan_load(settings: LoadSettings, reporter: Reporter, *, max_length: int | None = None) -> Blueprint:
    """Settle everything that can be known before a weight is read; downloads what is not here yet.

    `max_length`, in tokens, is checked against the positions that the model has.

    Raises:
        ModelNotFoundError: no such model.
        ModelError: the files are no causal language model that can be loaded as asked.
        HardwareError: the device or dtype asked for is not there.
        MissingDependencyError: the attention kernel asked for is not installed.
        OutOfMemoryError: the model does not fit on the device.
    """
    transformers_logging.disable_progress_bar()  # bytes are reported by us, and stdout is for the result
    device = choose_device(settings.model.device)
    _check_cpu_offload(settings.quantization, device)
    reporter.report(PhaseStarted(title=f"Finding {settings.model.name}"))
    source = find_model(settings.model, reporter)
    settings = settings.model_copy(update={"model": effective_model(settings.model, source)})
    trust = settings.model.trust_remote_code
    base = read_config(source, trust_remote_code=trust)
    dtype = choose_compute_dtype(settings.model.dtype, device, base.config.model_type)
    checkpoint = read_checkpoint(source.path, allow_pickle=settings.model.allow_pickle)
    tokenizer = load_tokenizer(source, settings.model)
    if max_length is not None:
        check_length(base.config, max_length, settings.model.rope_scaling)
    stretched = apply_rope_scaling(base.config, settings.model.rope_scaling)
    prequantized = read_prequantized(_read_json(source.path / "config.json"), source.name)
    settings = settings.model_copy(
        update={"quantization": effective_quantization(settings.quantization, source, prequantized)}
    )
    shapes = build_on_meta(base.config, dtype.torch_dtype, trust_remote_code=trust)
    if settings.model.offload_embedding:
        check_offload(shapes, device)
    _check_new_rows(shapes, tokenizer, source, settings.model)
    attention = choose_attention(settings.model.attention, device, shapes)
    layout = plan_layout(shapes, settings.quantization, dtype.torch_dtype, prequantized, device=device)
    check_shapes(source, checkpoint, shapes, layout)
    free = free_bytes(device)
    offloads = settings.model.offload_embedding
    if not settings.quantization.int8_cpu_offload:
        check_fit(settings.model.name, shapes, layout, device, free, offload_embedding=offloads)
    notes = (*base.notes, *((stretched,) if stretched else ()), *tokenizer.notes)
    for note in notes:
        reporter.report(Noted(message=note))
    return Blueprint(
        settings=settings,
        source=source,
        checkpoint=checkpoint,
        base=base,
        shapes=shapes,
        layout=layout,
        tokenizer=tokenizer,
        device=device,
        dtype=dtype,
        attention=attention,
        free_bytes=free,
        notes=notes,
    )


def effective_model(asked: ModelSettings, source: ModelSource) -> ModelSettings:
    """Return the model settings of a load: what was asked for, else as the run that was named was trained.

    Raises:
        ModelError: tokens are to be added to an adapter, whose rows are settled.
    """
    if source.adapter is not None and asked.new_tokens:
        raise ModelError(
            f"{source.name} is an adapter: the rows of --new-tokens {','.join(asked.new_tokens)} would not be trained",
            hint="Leave --new-tokens out, or name the base model.",
        )
    if source.run_model is None:
        return asked
    taken = {key: source.run_model[key] for key in TAKEN_FROM_RUN if key in source.run_model}
    return _over_run(asked, {**asked.model_dump(), **taken}, source)


def effective_quantization(
    asked: QuantizationSettings, source: ModelSource, prequantized: Prequantized | None
) -> QuantizationSettings:
    """Return how the model is stored: as its checkpoint is, else as its run was trained, else as asked.

    Raises:
        ModelError: what was asked for by name contradicts the checkpoint, or has no effect on it.
    """
    if prequantized is not None:
        check_settings(prequantized, asked, source.name)
        threshold = prequantized.config.get("llm_int8_threshold", asked.int8_threshold)
        effective = _over_run(asked, {"int8_threshold": threshold, **stored_settings(prequantized)}, source)
    elif source.run_quantization is not None:
        effective = _over_run(asked, source.run_quantization, source)
    else:
        return asked
    for key in sorted(asked.model_fields_set):
        if effective.method not in EFFECTIVE_WITH.get(f"quantization.{key}", Quantization):
            raise ModelError(
                f"quantization.{key} has no effect: {source.name} is stored in {effective.method.value}",
                hint="Leave it out.",
            )
    return effective


def _over_run(asked: SectionT, recorded: Mapping[str, Any], source: ModelSource) -> SectionT:
    """Return the settings that a run recorded, with those that were given by name in their place."""
    given = {key: getattr(asked, key) for key in asked.model_fields_set}
    try:
        return type(asked).model_validate({**recorded, **given})
    except ValidationError as error:
        raise ModelError(
            f"the settings in run.json of {source.name} can't be read: {error.errors()[0]['msg']}",
            hint="Was it written by a newer qlora?",
        ) from error


def choose_attention(wanted: Attention, device: torch.device, shapes: PreTrainedModel) -> str:
    """Return the attention implementation for the model `shapes`, by the name that transformers gives it.

    Raises:
        HardwareError: it needs a GPU, and there is none.
        MissingDependencyError: it needs a package that is not installed.
        ModelError: the model has no such implementation.
    """
    name = type(shapes).__name__
    if wanted == Attention.AUTO:
        return (Attention.SDPA if shapes._supports_sdpa else Attention.EAGER).value
    if wanted == Attention.SDPA and not shapes._supports_sdpa:
        raise ModelError(f"{name} does not compute attention by sdpa", hint="Use --attention eager.")
    if wanted == Attention.FLASH_ATTENTION_2:
        if device.type != "cuda":
            raise HardwareError("flash_attention_2 needs an NVIDIA GPU", hint="Use --attention sdpa.")
        if not is_flash_attn_2_available():
            raise MissingDependencyError(
                "flash_attention_2 needs the package flash-attn",
                hint="Run: pip install flash-attn, or use --attention sdpa.",
            )
        if not shapes._supports_flash_attn:
            raise ModelError(f"{name} does not compute attention by flash-attn", hint="Use --attention eager.")
    return wanted.value


def _check_cpu_offload(settings: QuantizationSettings, device: torch.device) -> None:
    if settings.int8_cpu_offload and device.type != "cuda":
        raise HardwareError(
            f"quantization.int8_cpu_offload has no effect: the model is on {device} as a whole", hint="Leave it out."
        )


def _check_new_rows(
    shapes: PreTrainedModel, tokenizer: LoadedTokenizer, source: ModelSource, settings: ModelSettings
) -> None:
    num_rows = embedding_of(shapes).num_embeddings
    beyond = {number for number in tokenizer.tokenizer.get_vocab().values() if number >= num_rows}
    # New tokens bring their rows along, and an adapter's own tokenizer says how far its base was grown.
    if source.adapter is None and not beyond <= set(tokenizer.new_token_ids):
        check_vocabulary(tokenizer.tokenizer, num_rows, settings)


def _read_json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content
