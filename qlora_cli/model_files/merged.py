"""Find the model that was merged from a run, and check that it is up to date."""

from pathlib import Path

from qlora_cli.hardware.device import ComputeDtype
from qlora_cli.model_files.checkpoint import read_json
from qlora_cli.model_files.digest import adapter_digest
from qlora_cli.model_files.given_model import CONFIG
from qlora_cli.model_files.merge_record import MERGE_FILE, read_merge_record
from qlora_cli.model_files.model_config import quantization_config_of
from qlora_cli.model_files.source import ModelSource
from qlora_cli.runs.directory import RunDirectory
from qlora_cli.settings.choices import ExportFormat
from qlora_cli.settings.models import UNQUANTIZED, LoadSettings, ModelSettings, QuantizationSettings
from qlora_cli.settings.settle import with_values


def staleness_problem(merged: Path, source: ModelSource) -> str | None:
    """Return in words that `merged` was not made from the adapter of `source`; None if that is not known."""
    record = None if source.adapter is None else read_merge_record(merged)
    if source.adapter is None or record is None:
        return None
    known = [one.sha256 for one in record.adapters]
    if not any(known) or adapter_digest(source.adapter) in known:
        return None
    return f"{merged} was merged from another adapter than {source.name} has now: merge it again"


def merged_model_of(source: ModelSource) -> Path | None:
    """Return the directory that the run of `source` was merged to, in transformers' format; None if there is none.

    It is merged from the run's adapter, not from a checkpoint; of several formats, one that is not requantized wins.
    """
    run = None if source.run is None else RunDirectory(source.run)
    if run is None or source.adapter != run.adapter:
        return None
    candidates = (run.merged, *(run.merged / name.value for name in ExportFormat))
    return min((path for path in candidates if (path / CONFIG).is_file()), key=_is_quantized, default=None)


def settings_of_merged(path: Path, model: ModelSettings, dtype: ComputeDtype) -> LoadSettings:
    """Return the settings to load a merged model with: in `dtype`, and unquantized unless it is stored quantized.

    Scaled positions and added tokens are already in its own config; it has no revision.
    """
    settings = with_values(
        model,
        name=str(path.absolute()),
        revision=None,
        base_model=None,
        dtype=dtype.name,
        offload_embedding=False,
        rope_scaling=None,
        new_tokens=None,
    )
    quantization = QuantizationSettings() if _is_quantized(path) else UNQUANTIZED
    return LoadSettings(model=settings, quantization=quantization)


def requantization_note(model: Path) -> str | None:
    """Return in words that `model`, which is loaded quantized, was merged to 16 bit; None if it was not."""
    if not (model / MERGE_FILE).is_file() or _is_quantized(model):
        return None
    return f"{model} is quantized again, and so answers differently than it was merged: --quant none loads it as it is"


def _is_quantized(model: Path) -> bool:
    return quantization_config_of(read_json(model / CONFIG)) is not None
