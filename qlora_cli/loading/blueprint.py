"""Settle everything about a model before a weight is read: files, config, tokenizer, layout, device, dtype."""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from pydantic import ValidationError
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging
from transformers.utils.import_utils import is_flash_attn_2_available

from qlora_cli.adapters.initialization import why_not_on_quantized
from qlora_cli.adapters.reader import Adapter, StoredAdapter, fit, open_adapter, rows_of
from qlora_cli.device import ComputeDtype, choose_compute_dtype, choose_device
from qlora_cli.errors import HardwareError, MissingDependencyError, ModelError
from qlora_cli.events import Noted, PhaseStarted, Reporter
from qlora_cli.loading.positions import apply_rope_scaling, check_length
from qlora_cli.loading.tokenizer import LoadedTokenizer, check_vocabulary, load_tokenizer
from qlora_cli.model_files.checkpoint import read_json
from qlora_cli.model_files.config import ModelConfig, read_config
from qlora_cli.model_files.digest import base_digest
from qlora_cli.model_files.source import CONFIG, ModelSource, find_model
from qlora_cli.quantization.embedding import check_offload, embedding_of
from qlora_cli.quantization.fit import check_fit, free_bytes
from qlora_cli.quantization.layout import Layout, build_on_meta, plan_layout, with_rows
from qlora_cli.quantization.methods import method_of
from qlora_cli.quantization.prequantized import Prequantized, check_settings, read_prequantized
from qlora_cli.runs.directory import RUN_FILE
from qlora_cli.settings.choices import Attention, Dtype
from qlora_cli.settings.conflicts import asks_for_nothing
from qlora_cli.settings.models import LoadSettings, ModelSettings, QuantizationSettings, Section
from qlora_cli.settings.settle import differences, given, of_run, over_recorded, with_sections

SectionT = TypeVar("SectionT", bound=Section)


@dataclass(frozen=True, kw_only=True)
class Blueprint:
    """All that is settled before a weight is read. `shapes` is the model on the meta device.

    `num_rows` are the rows of the embedding that tokenizer and adapter need; the base may have more.
    """

    settings: LoadSettings
    source: ModelSource
    base: ModelConfig
    shapes: PreTrainedModel
    layout: Layout
    tokenizer: LoadedTokenizer
    device: torch.device
    dtype: ComputeDtype
    attention: str
    free_bytes: int
    adapter: Adapter | None
    num_rows: int
    notes: tuple[str, ...]


def plan_load(settings: LoadSettings, reporter: Reporter, *, max_length: int | None = None) -> Blueprint:
    """Settle everything that can be known without the weights; downloads the small files that are not here yet.

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
    asked = settings.quantization
    offloads = settings.model.offload_embedding
    method_of(asked.method).check_placement(asked, device, offloads_embedding=offloads)
    reporter.report(PhaseStarted(title=f"Finding {settings.model.name}"))
    source = find_model(settings.model, reporter)
    for difference in (*_differences(settings, source), *_other_base(source)):
        reporter.report(Noted(level="warning", message=difference))
    settings = with_sections(settings, model=effective_model(settings.model, source))
    trust = settings.model.trust_remote_code
    base = read_config(source, trust_remote_code=trust)
    dtype = choose_compute_dtype(settings.model.dtype, device, base.config.model_type)
    tokenizer = load_tokenizer(source, settings.model)
    if max_length is not None:
        check_length(base.config, max_length, settings.model.rope_scaling)
    stretched = apply_rope_scaling(base.config, settings.model.rope_scaling)
    prequantized = read_prequantized(read_json(source.path / CONFIG), source.name)
    if prequantized is not None:
        prequantized = prequantized.renamed(base.renamed)
    quantization = effective_quantization(settings.quantization, source, prequantized)
    settings = with_sections(settings, quantization=quantization)
    compute = settings.quantization.compute_dtype
    if compute != Dtype.AUTO:  # may be another than that of the model, but no other rules hold for it
        choose_compute_dtype(compute, device, base.config.model_type)
    shapes = build_on_meta(base.config, dtype.torch_dtype, trust_remote_code=trust)
    if settings.model.offload_embedding:
        check_offload(shapes, device)
    stored = None if source.adapter is None else open_adapter(source.adapter, allow_pickle=settings.model.allow_pickle)
    num_rows = max(tokenizer.num_rows, 0 if stored is None else rows_of(stored, shapes, base))
    _check_new_rows(shapes, tokenizer, num_rows, source, settings.model)
    adapter = None if stored is None else _fitted(stored, base, dtype.torch_dtype, num_rows, settings.model)
    attention = choose_attention(settings.model.attention, device, shapes)
    layout = plan_layout(shapes, settings.quantization, dtype.torch_dtype, prequantized, device=device)
    if adapter is not None and layout.is_quantized and (refusal := why_not_on_quantized(adapter.lora)):
        raise refusal
    free = free_bytes(device)
    on_both = free + (free_bytes(torch.device("cpu")) if layout.method.spills_to_host(layout.settings) else 0)
    check_fit(
        settings.model.name,
        shapes,
        layout,
        device,
        on_both,
        offload_embedding=offloads,
        grows=num_rows > embedding_of(shapes).num_embeddings,
    )
    notes = (*base.notes, *((stretched,) if stretched else ()), *tokenizer.notes)
    for note in notes:
        reporter.report(Noted(message=note))
    return Blueprint(
        settings=settings,
        source=source,
        base=base,
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


def _differences(asked: LoadSettings, source: ModelSource) -> list[str]:
    """Return in words where what was asked for by name is not what the run that was named was trained with."""
    found = {
        **differences("model", asked.model, source.run_model),
        **differences("quantization", asked.quantization, source.run_quantization),
    }
    return [f"{path} is {now} as asked; {source.name} was trained with {then}" for path, (now, then) in found.items()]


def _other_base(source: ModelSource) -> list[str]:
    """Return in words that the base is not the one that the run was trained on, by samples of its bytes.

    One on the hub is asked for by its commit.
    """
    known = None if source.record is None or source.commit is not None else source.record.base_model_digest
    if known is None or known == base_digest(source.path):
        return []
    return [f"{source.path} is not the base that {source.name} was trained on: its weights are others"]


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
    return _over_run(asked, {**asked.model_dump(), **of_run("model", source.run_model)}, source)


def effective_quantization(
    asked: QuantizationSettings, source: ModelSource, prequantized: Prequantized | None
) -> QuantizationSettings:
    """Return how the model is stored: as its checkpoint is, else as its run was trained, else as asked.

    Raises:
        ModelError: what was asked for by name contradicts the checkpoint, or has no effect on it.
    """
    if prequantized is not None:
        check_settings(prequantized, asked, source.name)
        free = method_of(prequantized.method).free_settings(prequantized.config)
        stored = {**free, **(source.run_quantization or {}), **prequantized.settings}
        effective = _over_run(asked, stored, source)
    elif source.run_quantization is not None:
        effective = _over_run(asked, source.run_quantization, source)
    else:
        return asked
    for key in sorted(given(asked)):
        if not effective.takes(key) and not asks_for_nothing(asked, key):
            raise ModelError(
                f"quantization.{key} has no effect: {source.name} is stored in {effective.method.value}",
                hint="Leave it out.",
            )
    return effective


def _over_run(asked: SectionT, recorded: Mapping[str, Any], source: ModelSource) -> SectionT:
    """Return the settings that a run recorded, with those that were given by name in their place."""
    try:
        return over_recorded(asked, recorded)
    except ValidationError as error:
        raise ModelError(
            f"the settings in {RUN_FILE} of {source.name} can't be read: {error.errors()[0]['msg']}",
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


def _fitted(
    stored: StoredAdapter, base: ModelConfig, dtype: torch.dtype, num_rows: int, settings: ModelSettings
) -> Adapter:
    """Return the adapter as it goes on the base, whose vocabulary has at least `num_rows`."""
    config, trust = deepcopy(base.config), settings.trust_remote_code
    model = build_on_meta(config, dtype, trust_remote_code=trust)
    return fit(stored, with_rows(model, config, num_rows, dtype, trust_remote_code=trust), base).adapter


def _check_new_rows(
    shapes: PreTrainedModel, tokenizer: LoadedTokenizer, needed: int, source: ModelSource, settings: ModelSettings
) -> None:
    num_rows = embedding_of(shapes).num_embeddings
    beyond = {number for number in tokenizer.tokenizer.get_vocab().values() if number >= num_rows}
    # New tokens bring their rows along, and an adapter's own tokenizer says how far its base was grown.
    if source.adapter is None and not beyond <= set(tokenizer.new_token_ids):
        check_vocabulary(tokenizer.tokenizer, num_rows, settings)
    if needed > num_rows and settings.offload_embedding:
        raise ModelError(
            "an embedding in host memory can't be grown", hint="Leave --offload-embedding or the new tokens out."
        )
