"""Read the inputs of a merge: find the base and the adapters, read their headers, and check them."""

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from qlora_cli.adapters.reader import StoredAdapter, num_vocabulary_rows, open_adapter
from qlora_cli.errors import ModelError
from qlora_cli.events import Noted, PhaseStarted, Reporter
from qlora_cli.hardware.device import TORCH_DTYPES
from qlora_cli.loading.model_outline import ModelOutline, read_model_outline, settle_base
from qlora_cli.loading.weight_reader import check_shapes
from qlora_cli.merging.planning.adapter_changes import AdapterChanges, read_changes
from qlora_cli.merging.planning.base_weights import Base, BaseModel, base_reader
from qlora_cli.merging.planning.conversions import read_conversions
from qlora_cli.merging.planning.merge_plan import Changes
from qlora_cli.merging.planning.stored_tensors import StoredTensors
from qlora_cli.merging.planning.weight_changes import WeightedChange
from qlora_cli.model_files.adapter_files import notes_on_ignored_keys
from qlora_cli.model_files.checkpoint import Checkpoint, read_checkpoint
from qlora_cli.model_files.digest import base_digest
from qlora_cli.model_files.model_config import ModelConfig
from qlora_cli.model_files.pickles import check_pickle
from qlora_cli.model_files.source import ModelSource, fetch_weights, find_model
from qlora_cli.model_files.unexpected_weights import note_on_prediction
from qlora_cli.quantization.embedding import embedding_of, vocabulary_weights
from qlora_cli.quantization.storage_plan import build_on_meta, plan_layout, with_rows
from qlora_cli.runs.record import RunRecord
from qlora_cli.settings.choices import BaseWeights, Dtype
from qlora_cli.settings.models import UNQUANTIZED, LoadSettings, MergeCommandSettings, ModelSettings
from qlora_cli.settings.settle import by_path, loading_settings, resolved_in_code
from qlora_cli.tokenizing.positions import apply_rope_scaling
from qlora_cli.tokenizing.tokenizer import LoadedTokenizer, load_tokenizer
from qlora_cli.tokenizing.tokenizer_files import notes_on_unused_templates
from qlora_cli.writing import escapes_directory, resolve_links

# Files of the base that are copied: image processors of models with towers, and licences.
COPIED_FILES = ("*processor_config.json", "LICEN[CS]E*", "NOTICE*", "USE_POLICY*")
SET_BY_BUILDING = ("dtype", "torch_dtype")  # keys of a config that building a model sets


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """The inputs of a merge.

    Attributes:
        source: The base, and the first adapter.
        sources: The base and the adapter, for every adapter.
        config: The config of the base, with the changes of training: rotary positions, the size of the vocabulary.
        config_changes: These changes, by the key of the config.
        record: The record of the run, if the first adapter belongs to one.
        is_recorded: Whether it is known how training stored the base.
        changes: The changes of all adapters, by the name of the parameter.
    """

    request: MergeCommandSettings
    source: ModelSource
    sources: tuple[ModelSource, ...]
    config: ModelConfig
    config_changes: Mapping[str, Any]
    tokenizer: LoadedTokenizer
    record: RunRecord | None
    is_recorded: bool
    base: BaseModel
    adapters: tuple[AdapterChanges, ...]
    changes: Changes

    @property
    def was_quantized(self) -> bool:
        """Whether training quantized weights."""
        return bool(self.base.quantized)


def read_inputs(request: MergeCommandSettings, reporter: Reporter) -> Inputs:
    """Find the base and the adapters, and read everything but the weights.

    Raises:
        ModelNotFoundError: one of them does not exist.
        ModelError: they can't be read, or do not belong together.
    """
    transformers_logging.disable_progress_bar()
    reporter.report(PhaseStarted(title=f"Finding {request.merge.adapters[0]} and its base"))
    sources = find_sources(request, reporter)
    source = sources[0]
    record = source.record
    outline = read_model_outline(source, trust_remote_code=request.model.trust_remote_code)
    _check_trained_alike(request, [replace(outline, source=one) for one in sources])
    settings, config = _trained_as(request, outline).model, outline.base
    config_before = config.config.to_dict()
    apply_rope_scaling(config.config, settings.rope_scaling)
    tokenizer = load_tokenizer(source, settings)
    fetch_weights(source, reporter)
    checkpoint = read_checkpoint(source.path, allow_pickle=request.model.allow_pickle)
    for file in checkpoint.files if checkpoint.is_pickle else ():
        check_pickle(file)
    for one in sources:
        _check_digest(one, request, reporter)
    opened = [
        open_adapter(one.adapter, allow_pickle=request.model.allow_pickle)
        for one in sources
        if one.adapter is not None
    ]
    base = read_base(outline, checkpoint, tokenizer, record, request, opened)
    config_after = config.config.to_dict()
    for note in (
        *notes_on_ignored_keys(one.adapter for one in sources),
        *tokenizer.notes,
        *notes_on_unused_templates(source, sources[1:], tokenizer.tokenizer.chat_template),
        *_notes_on_rows(base, config_before.get("vocab_size")),
        *_notes_on_links(source),
    ):
        reporter.report(Noted(message=note))
    read = base_reader(base, Base(base, BaseWeights.ORIGINAL))
    adapters = tuple(read_changes(_on_meta(config, base, request), config, one, read) for one in opened)
    return Inputs(
        request=request,
        source=source,
        sources=tuple(sources),
        config=config,
        config_changes={
            key: value
            for key, value in config_after.items()
            if config_before.get(key) != value and key not in SET_BY_BUILDING
        },
        tokenizer=tokenizer,
        record=record,
        is_recorded=record is not None or base.layout.prequantized is not None,
        base=base,
        adapters=adapters,
        changes=_combine(adapters, request.merge.weights),
    )


def _notes_on_links(source: ModelSource) -> Iterator[str]:
    """Yield notes on files of the base that are not copied, since they are links out of its directory."""
    for path in sorted({path for pattern in COPIED_FILES for path in source.path.glob(pattern)}):
        if escapes_directory(path):
            end = resolve_links(path) or "itself"
            yield f"{path} is a link out of its directory, to {end}: it is not copied"


def _notes_on_rows(base: BaseModel, before: int | None) -> Iterator[str]:
    """Yield notes on additional rows of the merged model, and on MTP layers, which are copied."""
    if base.num_rows is not None:
        yield f"the merged model's embedding has {base.num_rows:,} rows, the base's {before or 0:,}"
    fate = "copied as stored, nothing was trained there"
    if (note := note_on_prediction(base.model.config, base.tensors.headers, fate)) is not None:
        yield note


def _trained_as(request: MergeCommandSettings, outline: ModelOutline) -> LoadSettings:
    """Return the settings that training loaded the base with, as far as the run and the checkpoint tell."""
    settings = LoadSettings(model=_model_settings(request, outline.source.name))
    return settle_base(resolved_in_code(settings), outline).settings


def _model_settings(request: MergeCommandSettings, name: str) -> ModelSettings:
    return ModelSettings(
        name=name,
        revision=request.merge.revision if name == request.merge.adapters[0] else None,
        base_model=request.model.base_model,
        allow_pickle=request.model.allow_pickle,
        trust_remote_code=request.model.trust_remote_code,
    )


def find_sources(request: MergeCommandSettings, reporter: Reporter) -> list[ModelSource]:
    """Return where each adapter and its base are, in the order of the request.

    Raises:
        ModelNotFoundError: one of them does not exist.
        ModelError: one is no adapter, or they belong to different bases.
    """
    sources = [find_model(_model_settings(request, name), reporter) for name in request.merge.adapters]
    first = request.merge.adapters[0]
    for name, source in zip(request.merge.adapters, sources, strict=True):
        if source.adapter is None:
            raise ModelError(
                f"{name} is a model, not an adapter: there is nothing to merge into it",
                hint="Name a run directory, or an adapter; it names its base.",
            )
        if source.path.resolve() != sources[0].path.resolve():
            raise ModelError(
                f"{name} belongs to the base {source.base_name}, and {first} to {sources[0].base_name}",
                hint="Adapters of one base can be merged together; name it with --base-model if they are the same.",
            )
    return sources


def _check_trained_alike(request: MergeCommandSettings, outlines: Sequence[ModelOutline]) -> None:
    """Check that the runs of several adapters loaded their base with the same effective settings."""
    first = outlines[0].source
    one = _in_effect(_trained_as(request, outlines[0]))
    for model in outlines[1:]:
        other = model.source
        if first.run_model is None or other.run_model is None:  # an adapter without a run
            continue
        two = _in_effect(_trained_as(request, model))
        # A setting with an effect in only one depends on another setting that both have.
        differing = [path for path in one if path in two and one[path] != two[path]]
        if differing:
            raise ModelError(
                f"{other.name} and {first.name} were trained on bases that differ in {', '.join(differing)}",
                hint="Merge adapters that were trained on the same base, stored the same way.",
            )


def _in_effect(settings: LoadSettings) -> dict[str, object]:
    """Return, by `section.key`, the settings with an effect on how a run loaded its base."""
    return {
        **by_path("model", loading_settings("model", settings.model.in_effect())),
        **by_path("quantization", loading_settings("quantization", settings.quantization.in_effect())),
    }


def _check_digest(source: ModelSource, request: MergeCommandSettings, reporter: Reporter) -> None:
    """Check that the base is the one that the run was trained on, by samples of its bytes."""
    recorded = None if source.record is None else source.record.base_model_digest
    if recorded is None or recorded == base_digest(source.path):
        return
    message = f"{source.path} is not the base that {source.name} was trained on: its weights differ"
    if request.model.base_model is None:
        raise ModelError(
            message, hint="Restore the original base, or name the right one with --base-model, at your own risk."
        )
    reporter.report(Noted(level="warning", message=f"{message}, or in other files"))


def read_base(
    outline: ModelOutline,
    checkpoint: Checkpoint,
    tokenizer: LoadedTokenizer,
    record: RunRecord | None,
    request: MergeCommandSettings,
    adapters: Sequence[StoredAdapter] = (),
) -> BaseModel:
    """Return the base on the meta device, with how training or its files stored it.

    Its vocabulary is extended for the tokenizer and for `adapters`, and its config is updated.

    Raises:
        ModelError: weights disagree with config.json.
    """
    source, config, prequantized = outline.source, outline.base, outline.prequantized
    dtype = _trained_in(config.config, record)
    trust = request.model.trust_remote_code
    model = build_on_meta(config.config, dtype, trust_remote_code=trust)
    settings = _trained_as(request, outline).quantization
    device = torch.device("cpu" if _trained_on_cpu(record) else "cuda")
    try:
        layout = plan_layout(model, settings, dtype, prequantized, device=device)
    except ModelError:
        if record is not None or prequantized is not None:
            raise
        # Trained by another tool on a base that our method can't quantize, so it was not quantized.
        layout = plan_layout(model, UNQUANTIZED, dtype, device=device)
    check_shapes(source, checkpoint, model, layout)
    tensors = StoredTensors(source.path, checkpoint)
    needed = max([tokenizer.num_rows, *(num_vocabulary_rows(one, model, config) for one in adapters)])
    is_extended = needed > embedding_of(model).num_embeddings
    model = with_rows(model, config.config, needed, dtype, trust_remote_code=trust)
    conversions = read_conversions(model, list(tensors.headers), config.key_mapping)
    quantized = frozenset(entry.name for entry in layout.inventory.entries if entry.is_quantized)
    return BaseModel(
        model=model,
        layout=layout,
        tensors=tensors,
        groups=conversions.groups,
        num_rows=needed if is_extended else None,
        extended=frozenset(vocabulary_weights(model)) if is_extended else frozenset(),
        quantized=quantized,
        packed=quantized if prequantized is not None else frozenset(),
    )


def _trained_in(config: PreTrainedConfig, record: RunRecord | None) -> torch.dtype:
    """Return the dtype of unquantized weights in training; without a run, that of the base."""
    if record is not None:
        sizes = {} if record.base_model is None else record.base_model.dtype_bytes
        held = {dtype: sizes.get(str(dtype).removeprefix("torch."), 0) for dtype in TORCH_DTYPES.values()}
        name = record.setting("model.dtype")
        if name in set(Dtype) - {Dtype.AUTO}:
            return TORCH_DTYPES[Dtype(name)]
        if any(held.values()):  # all but a few norms have the same
            return max(held, key=lambda dtype: held[dtype])
    stored = config.dtype
    return stored if isinstance(stored, torch.dtype) and stored in TORCH_DTYPES.values() else torch.bfloat16


def _trained_on_cpu(record: RunRecord | None) -> bool:
    device = None if record is None or record.base_model is None else record.base_model.device
    return device is not None and device.startswith("cpu")


def _on_meta(config: ModelConfig, base: BaseModel, request: MergeCommandSettings) -> PreTrainedModel:
    return build_on_meta(deepcopy(config.config), base.layout.dtype, trust_remote_code=request.model.trust_remote_code)


def _combine(adapters: Sequence[AdapterChanges], weights: Sequence[float]) -> Changes:
    """Return the weighted changes of all adapters, by parameter.

    Raises:
        ModelError: a change that is not an update is combined with others or weighted.
    """
    changes: dict[str, list[WeightedChange]] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        for name, change in adapter.changes.items():
            changes.setdefault(name, []).append(WeightedChange(change=change, weight=weight))
    for name, parameter_changes in changes.items():
        is_alone = len(parameter_changes) == 1 and parameter_changes[0].weight == 1
        if not is_alone and not all(one.is_update for one in parameter_changes):
            raise ModelError(
                f"{name} was trained whole, in rows, or with DoRA, which can't be weighed or added to another adapter",
                hint="Merge that adapter alone and without --weight.",
            )
    return changes
