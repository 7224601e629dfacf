"""Read a model's weights into the planned layout, and refuse a checkpoint unless every weight matches."""

import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from qlora_cli.errors import ModelError, OutOfMemoryError
from qlora_cli.events import BytesDone, Noted, Reporter
from qlora_cli.model_files.checkpoint import Checkpoint, TensorHeader, how_to_restore
from qlora_cli.model_files.construction import is_ours
from qlora_cli.model_files.finite import is_finite, not_finite
from qlora_cli.model_files.given_model import CONFIG
from qlora_cli.model_files.model_config import ModelConfig
from qlora_cli.model_files.source import ModelSource
from qlora_cli.model_files.unexpected_weights import (
    header_by_name,
    hint_on_unexpected,
    may_be_ignored,
    prediction_layers,
)
from qlora_cli.quantization.calibrated_weights import CalibratedWeights
from qlora_cli.quantization.inventory import unique_parameters
from qlora_cli.quantization.kept_shards import KeptShards
from qlora_cli.quantization.methods import stored_weight
from qlora_cli.quantization.refused_weights import OTHER_VERSION
from qlora_cli.quantization.residuals import QuantizationResiduals
from qlora_cli.quantization.storage_plan import StoragePlan

NO_THREADS = "HF_DEACTIVATE_ASYNC_LOAD"  # for transformers
LOADING_BAR = "Loading weights"  # transformers' description of its progress bar
LOAD_REPORT = "LOAD REPORT"  # its table of mismatched weights, which we report ourselves
MOST_NAMED = 3
FLOATS = {"F64", "F32", "F16", "BF16"}  # safetensors' names of the dtypes that a weight may be stored in
EXPERT_NUMBER = re.compile(r"\.experts\.\d+\.")
SHORTAGE = re.compile(r"OutOfMemoryError: (.*)")
FAULT = "CUDA error"
OF_WEIGHTS = re.compile(r"Error\(s\) in loading state_dict|automatic conversion of the weights")
FAILED_CONVERSION = re.compile(r"(.*)\nError: .* on tensors destined for (\S+)\. Ckpt contains")


def quantization_config(
    layout: StoragePlan,
    compute_dtype: torch.dtype,
    *,
    measure_error: bool = False,
    residuals: QuantizationResiduals | None = None,
    shards: KeptShards | None = None,
    calibrated: CalibratedWeights | None = None,
) -> QuantizationConfigMixin | None:
    """Return the quantization config for `from_pretrained`; None to load as stored, or unquantized and whole."""
    if layout.prequantized is not None:
        return None
    return layout.method.config(
        layout.settings,
        unquantized=sorted(layout.unquantized),
        experts=layout.experts,
        compute_dtype=compute_dtype,
        measure_error=measure_error,
        residuals=residuals,
        shards=shards,
        calibrated=calibrated,
    )


def check_shapes(source: ModelSource, checkpoint: Checkpoint, model: PreTrainedModel, layout: StoragePlan) -> None:
    """Check that stored tensors have the shapes of `model`, which is on the meta device, for names in both.

    Packed weights are checked for their packed sizes and their constants. Experts that are stored one by
    one are compared with each other.

    Raises:
        ModelError: one does not; names file and tensor.
    """
    packed = layout.inventory.entries if layout.prequantized is not None else ()
    sizes = {entry.name: entry.weight_bytes for entry in packed if entry.is_quantized}
    for name, parameter in model.named_parameters():
        header = checkpoint.tensors.get(name)
        if header is None:
            continue
        if name not in sizes and parameter.is_floating_point() and header.dtype not in FLOATS:
            raise ModelError(
                f"{source.path / header.file}: {name} is stored as {header.dtype}, which can't be a weight",
                hint="It was quantized by a method that its config.json does not name; give the 16-bit model.",
            )
        if name in sizes:
            _check_packed(source, checkpoint, header, sizes[name], layout.method.constant_names(name))
        elif header.shape != tuple(parameter.shape):
            raise _contradiction(source, header, f"config.json says {tuple(parameter.shape)}")
    siblings: dict[str, TensorHeader] = {}
    for header in checkpoint.tensors.values():
        first = siblings.setdefault(EXPERT_NUMBER.sub(".experts.*.", header.name), header)
        if header.shape != first.shape:
            raise _contradiction(source, header, f"{first.name} has {first.shape}", header.file)


def _contradiction(source: ModelSource, header: TensorHeader, other: str, file: str = CONFIG) -> ModelError:
    return ModelError(
        f"{source.path / header.file}: {header.name} has the shape {header.shape}, and {other}",
        hint=f"The two are of different models, or of two versions of one. {how_to_restore(source.path, file)}",
    )


def _check_packed(
    source: ModelSource, checkpoint: Checkpoint, header: TensorHeader, num_bytes: int, constants: Sequence[str]
) -> None:
    name = header.name
    if header.num_bytes != num_bytes:
        raise ModelError(
            f"{source.path / header.file}: {name} is {header.dtype} of {header.num_bytes} bytes, but quantized as "
            f"config.json says it has {num_bytes}",
            hint="If it is the 16-bit model, remove quantization_config from its config.json.",
        )
    if absent := [constant for constant in constants if constant not in checkpoint.tensors]:
        raise ModelError(
            f"{source.path / header.file}: {name} is quantized, but its constants {absent[0]} are missing",
            hint="The model was not saved as a whole; quantize the 16-bit model again.",
        )


def load_weights(
    source: ModelSource,
    checkpoint: Checkpoint,
    base: ModelConfig,
    layout: StoragePlan,
    *,
    device_map: Mapping[str, Any] | str,
    quantization: QuantizationConfigMixin | None,
    attention: str,
    trust_remote_code: bool,
    reporter: Reporter,
    shards: KeptShards | None = None,
) -> PreTrainedModel:
    """Return the model with its weights, frozen; with `shards`, with placeholders for those that these keep.

    Raises:
        ModelError: weights are missing, unexpected, or of another shape; names them.
        OutOfMemoryError: the device ran out of memory nevertheless.
    """
    kind: Any = "load" if quantization is None else "quantize"
    one_by_one = nullcontext() if shards is None else _read_one_by_one()
    with _report_bytes(checkpoint, kind, reporter), _collect_warnings() as warned, one_by_one:
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source.path,
                config=_config_to_load(base, layout, shards),
                quantization_config=quantization,
                dtype=layout.dtype,
                device_map=device_map,
                attn_implementation=attention,
                use_safetensors=not checkpoint.is_pickle,
                trust_remote_code=trust_remote_code,
                key_mapping=dict(base.key_mapping) if base.key_mapping else None,
                ignore_mismatched_sizes=True,  # they are refused below, by name
                output_loading_info=True,
            )
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            refused = {} if quantization is None else layout.method.refused_weights(quantization)
            raise _failure(error, warned, refused, source.base_name, _files(checkpoint, base)) from error
    for warning in warned:
        if LOAD_REPORT not in warning:
            reporter.report(Noted(message=warning))
    model: PreTrainedModel = loaded[0]
    _check_complete(source, checkpoint, base, model, loaded[1])
    check_finite(source, checkpoint, base, model)
    layout.method.finalize(model)
    if source.commit is not None:
        # The adapter refers to its base by this name: a hub id is valid elsewhere, a path in the cache is not.
        model.name_or_path = model.config.name_or_path = source.base_name
    model.requires_grad_(False)
    return model


def _failure(
    error: Exception, warned: list[str], refused: Mapping[str, ModelError], name: str, files: Mapping[str, str]
) -> Exception:
    """Return the user's error for `error`, raised while the model `name` was read; `error` itself if it is a bug.

    transformers catches errors in the conversion of a weight, and reports it as mismatched: `refused` are those
    that the quantizer itself refused, by full name.
    """
    report = "\n".join([f"{type(error).__name__}: {error}", *warned])
    if shortage := SHORTAGE.search(report):
        return OutOfMemoryError(
            f"{name} does not fit on the device while loading: {shortage[1]}",
            hint="Free the GPU (nvidia-smi shows who uses it), or use a smaller model.",
        )
    if refused:
        first = next(iter(refused.values()))
        alike = [f"{one}{_in_file(one, files)}" for one, why in refused.items() if why.message == first.message]
        return ModelError(f"{name} can't be loaded: {_counted(alike)}: {first.message}", hint=first.hint)
    if is_ours(error) or (isinstance(error, RuntimeError) and not OF_WEIGHTS.search(report)) or FAULT in report:
        error.add_note("\n".join(warned))
        return error
    details = _failed_conversions(warned, files) or "\n".join([str(error), *warned])
    return ModelError(f"{name} can't be loaded: {details}", hint=OTHER_VERSION)


def _failed_conversions(warned: list[str], files: Mapping[str, str]) -> str:
    """Return the weights that could not be converted and why, from transformers' table; else an empty string."""
    failures = [match for warning in warned for match in FAILED_CONVERSION.findall(warning)]
    return "; ".join(f"{name}{_in_file(name, files)}: {reason}" for reason, name in failures[:MOST_NAMED])


def _files(checkpoint: Checkpoint, base: ModelConfig) -> dict[str, str]:
    """Return the file of each weight that is stored unconverted, by its name in the model."""
    return {base.renamed(name): header.file for name, header in checkpoint.tensors.items()}


def _in_file(name: str, files: Mapping[str, str]) -> str:
    return f" (in {files[name]})" if name in files else ""


def check_finite(source: ModelSource, checkpoint: Checkpoint, base: ModelConfig, model: PreTrainedModel) -> None:
    """Check that unquantized weights are finite; quantized ones are checked while they are quantized.

    For quantized weights the constants are checked: codes may be stored in a dtype in which they are not finite.

    Raises:
        ModelError: one is not; names tensor and file.
    """
    for name, module, parameter in unique_parameters(model):
        stored = stored_weight(module, name.rpartition(".")[2], parameter)
        values = stored.constants if stored.why_not is None else (parameter,)
        held = [value for value in values if value.is_floating_point() and value.device.type != "meta"]
        if all(is_finite(value) for value in held):
            continue
        where = _in_file(name, _files(checkpoint, base))
        raise not_finite(f"{source.base_name}: {name}{where} holds ", parameter.dtype)


@contextmanager
def _read_one_by_one() -> Iterator[None]:
    """Read weights when they are converted, not ahead in other threads, where all of them would be in memory."""
    before = os.environ.get(NO_THREADS)
    os.environ[NO_THREADS] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[NO_THREADS]
        else:
            os.environ[NO_THREADS] = before


def _config_to_load(base: ModelConfig, layout: StoragePlan, shards: KeptShards | None) -> PreTrainedConfig:
    """Return a copy of the config; a quantized checkpoint is read by our quantizers."""
    config = deepcopy(base.config)
    if layout.prequantized is not None:
        stored = {
            key: value for key, value in layout.prequantized.config.items() if not key.startswith(("_", "load_"))
        }
        of_process = {} if shards is None else {"shards": shards}
        config.quantization_config = {**stored, **of_process, "quant_method": layout.method.loader}
    return config


def apply_compute_settings(model: PreTrainedModel, layout: StoragePlan, compute_dtype: torch.dtype) -> None:
    """Apply the compute settings to a model that was loaded from a quantized checkpoint."""
    planned = {entry.name: entry.dtype for entry in layout.inventory.entries if not entry.is_quantized}
    for name, parameter in model.named_parameters():
        if name in planned:  # transformers keeps the stored dtype
            parameter.data = parameter.data.to(getattr(torch, planned[name]))
    layout.method.apply_compute_settings(model, layout.settings, layout.dtype, compute_dtype)


def _check_complete(
    source: ModelSource, checkpoint: Checkpoint, base: ModelConfig, model: PreTrainedModel, info: Mapping[str, Any]
) -> None:
    missing = sorted(info.get("missing_keys") or ())
    mismatched = sorted(str(key) for key in info.get("mismatched_keys") or ())
    headers = checkpoint.tensors
    mtp_layers = prediction_layers(model.config, headers)
    unexpected = sorted(
        key
        for key in info.get("unexpected_keys") or ()
        if not may_be_ignored(model, base, key, header_by_name(headers, key), mtp_layers)
    )
    if missing or mismatched:
        what, keys = ("missing", missing) if missing else ("of another shape", mismatched)
        raise ModelError(
            f"the weights of {source.base_name} do not match its config.json: {_counted(keys)} {what}",
            hint="These tensors would be random. Check that the directory holds the whole model.",
        )
    if unexpected:
        where = {header.file for key in unexpected if (header := header_by_name(headers, key))}
        files = f" (in {', '.join(sorted(where))})" if where else ""
        raise ModelError(
            f"{source.base_name} holds weights that its config.json does not describe: {_counted(unexpected)}{files}",
            hint=hint_on_unexpected(model.config, unexpected),
        )


def _counted(keys: list[str]) -> str:
    more = f" and {len(keys) - MOST_NAMED} more" if len(keys) > MOST_NAMED else ""
    return f"{', '.join(keys[:MOST_NAMED])}{more}"


def check_materialized(source: ModelSource, model: nn.Module) -> None:
    """Check that every weight was read, except those that accelerate holds on the CPU behind a placeholder.

    Raises:
        ModelError: one was not; names it.
    """
    offloaded = (module for module in model.modules() if hasattr(module, "_hf_hook"))
    held_elsewhere = {id(parameter) for module in offloaded for parameter in module.parameters()}
    for name, parameter in model.named_parameters():
        if parameter.device.type == "meta" and id(parameter) not in held_elsewhere:
            raise ModelError(
                f"{source.base_name}: {name} was not read", hint="Download the model again; a file may be damaged."
            )


class _Collector(logging.Handler):
    """Collects log messages, each once."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Collect the message."""
        if (message := record.getMessage()) not in self.messages:
            self.messages.append(message)


@contextmanager
def _collect_warnings() -> Iterator[list[str]]:
    """Collect transformers' warnings, which would otherwise be printed into the display."""
    collector = _Collector()
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(min(verbosity, logging.WARNING))  # the user's may hide why a weight failed
    transformers_logging.disable_default_handler()
    transformers_logging.add_handler(collector)
    try:
        yield collector.messages
    finally:
        transformers_logging.set_verbosity(verbosity)
        transformers_logging.remove_handler(collector)
        transformers_logging.enable_default_handler()


@contextmanager
def _report_bytes(checkpoint: Checkpoint, kind: Any, reporter: Reporter) -> Iterator[None]:
    """Report the bytes of the checkpoint as transformers processes its weights."""

    def hook(factory: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if kwargs.get("desc") != LOADING_BAR:
            return factory(*args, **kwargs)
        return _counted_bytes(args[0], checkpoint, kind, reporter)

    previous = transformers_logging.set_tqdm_hook(hook)
    try:
        yield
    finally:
        transformers_logging.set_tqdm_hook(previous)


def _counted_bytes(items: Any, checkpoint: Checkpoint, kind: Any, reporter: Reporter) -> Iterator[Any]:
    """Yield (name, conversion) pairs, and report the bytes of each one's sources once it is done."""
    done = 0
    for name, conversion in items:
        yield name, conversion
        sources = {key for keys in conversion.layer_targets.values() for key in keys}
        done += sum(checkpoint.tensors[key].num_bytes for key in sources if key in checkpoint.tensors)
        if done < checkpoint.total_bytes:
            reporter.report(BytesDone(kind=kind, done_bytes=done, total_bytes=checkpoint.total_bytes))
    reporter.report(BytesDone(kind=kind, done_bytes=checkpoint.total_bytes, total_bytes=checkpoint.total_bytes))
