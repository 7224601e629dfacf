"""Write a merged model in NF4: about a quarter of its 16-bit weights, for plain transformers.

It is requantized, so it is not exactly the trained model, even if the adapter was trained on an NF4 base.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from qlora_cli.errors import ModelError
from qlora_cli.events import Event, Noted, PhaseStarted, Reporter
from qlora_cli.files import size_of
from qlora_cli.hardware.device import choose_device
from qlora_cli.loading.loader import load_model
from qlora_cli.loading.save import NOTE, save_quantized
from qlora_cli.merging.exports.export_format import Export, Format
from qlora_cli.merging.merge_result import Divergence
from qlora_cli.merging.planning.inputs import Inputs
from qlora_cli.model_files.checkpoint import read_checkpoint, read_json
from qlora_cli.model_files.model_config import read_config
from qlora_cli.model_files.source import ModelSource
from qlora_cli.quantization.methods.skip_modules import HEAD
from qlora_cli.quantization.storage_plan import build_on_meta, plan_layout
from qlora_cli.settings.choices import Device, Dtype, ExportFormat, Quantization
from qlora_cli.settings.models import LoadSettings, ModelSettings, QuantizationSettings

NF4 = QuantizationSettings(method=Quantization.NF4, double_quant=True)
STORED_DTYPES = {"BF16": Dtype.BF16, "F16": Dtype.FP16, "F32": Dtype.FP32}
MOST_REASONS = 3


class Nf4Format(Format):
    """A requantized checkpoint."""

    name = ExportFormat.NF4
    share = 0.4

    @property
    def quantized_to(self) -> str:
        """NF4, whatever the adapter was trained on."""
        return "NF4 with double quantization"

    def check(self, inputs: Inputs, reporter: Reporter) -> None:
        """Check by the base's config that something can be quantized, and note what can't."""
        trust, device = self.request.model.trust_remote_code, self.request.model.device
        for note in check_nf4(inputs.source.path, trust_remote_code=trust, device=device):
            reporter.report(Noted(message=note))

    def write(self, export: Export) -> Divergence | None:
        """Write the checkpoint, and compare it with the 16-bit model."""
        trust, device = self.request.model.trust_remote_code, self.request.model.device
        done = export_nf4(
            export.model, export.target, trust_remote_code=trust, device=device, reporter=export.reporter
        )
        export.reporter.report(Noted(message=f"in NF4 the weights are {done.times_smaller:.2f} times smaller"))
        if export.comparer is None:
            return None
        merged = export.comparer.stored(export.model)
        return export.comparer.compare(merged, export.comparer.quantized(export.target))


@dataclass(frozen=True, kw_only=True)
class Nf4Export:
    """A quantized checkpoint that was written. `dtype` is that of the unquantized weights.

    `num_bytes` counts all files; the other bytes are of the weights of the merged and of the quantized model.
    """

    num_bytes: int
    merged_weight_bytes: int
    weight_bytes: int
    num_parameters: int
    num_quantized_parameters: int
    dtype: str

    @property
    def times_smaller(self) -> float:
        """The size of the merged weights divided by that of the quantized ones."""
        return self.merged_weight_bytes / self.weight_bytes


def check_nf4(base: Path, *, trust_remote_code: bool, device: Device) -> tuple[str, ...]:
    """Check by the config.json in `base`, before anything is merged, that such a model can be stored in NF4.

    Return notes on the result for the user: layers that stay in 16 bit, experts that need qlora to be loaded.

    Raises:
        ModelError: nothing can be quantized, or the config can't be read.
    """
    source = ModelSource(name=str(base), path=base, base_name=str(base), tokenizer_path=base)
    config = read_config(source, trust_remote_code=trust_remote_code).config
    shapes = build_on_meta(config, torch.bfloat16, trust_remote_code=trust_remote_code)
    try:
        layout = plan_layout(shapes, NF4, torch.bfloat16, device=choose_device(device))
    except ModelError as error:
        raise ModelError(error.message, hint="Leave nf4 out of --format.") from error
    notes = []
    if layout.experts:
        notes.append("the experts are quantized too, which transformers can't load: the NF4 checkpoint needs qlora")
    reasons = sorted({reason for reason in layout.unquantized.values() if reason != HEAD})
    if reasons:
        more = ", …" if len(reasons) > MOST_REASONS else ""
        notes.append(f"not all layers are quantized in NF4: {', '.join(reasons[:MOST_REASONS])}{more}")
    return tuple(notes)


def export_nf4(model: Path, target: Path, *, trust_remote_code: bool, device: Device, reporter: Reporter) -> Nf4Export:
    """Quantize the model in the directory `model` and write it to `target`, which is empty or absent.

    Raises:
        ModelError: nothing can be quantized.
        DiskSpaceError: it does not fit on the disk.
        OutOfMemoryError: it does not fit in memory.
    """
    reporter.report(PhaseStarted(title="Quantizing the merged model to NF4"))
    merged_bytes, stored = _weight_bytes(model)
    dtype, device = _unquantized_dtype(stored, device, reporter)
    settings = LoadSettings(
        model=ModelSettings(name=str(model), dtype=dtype, device=device, trust_remote_code=trust_remote_code),
        quantization=NF4,
    )
    quiet = _WithoutPhases(reporter)
    loaded = load_model(settings, quiet)
    save_quantized(loaded, target, quiet)
    _remove_source(target / NOTE)
    return Nf4Export(
        num_bytes=size_of(target),
        merged_weight_bytes=merged_bytes,
        weight_bytes=_weight_bytes(target)[0],
        num_parameters=loaded.inventory.num_parameters,
        num_quantized_parameters=loaded.inventory.num_quantized_parameters,
        dtype=dtype.value,
    )


class _WithoutPhases:
    """A reporter without the loader's phases, which would name a temporary directory."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter

    def report(self, event: Event) -> None:
        if not isinstance(event, PhaseStarted):
            self._reporter.report(event)


def _remove_source(note: Path) -> None:
    """Remove from the note where the model was read from: a temporary directory."""
    content = {key: value for key, value in read_json(note).items() if key not in {"source", "revision", "commit"}}
    note.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _weight_bytes(directory: Path) -> tuple[int, Dtype]:
    """Return the bytes of the weights in `directory`, and the floating-point dtype that most of them have."""
    tensors = read_checkpoint(directory, allow_pickle=False).tensors.values()
    by_dtype = {name: sum(tensor.num_bytes for tensor in tensors if tensor.dtype == name) for name in STORED_DTYPES}
    most = max(by_dtype, key=lambda name: by_dtype[name])
    return sum(tensor.num_bytes for tensor in tensors), STORED_DTYPES[most]


def _unquantized_dtype(stored: Dtype, device: Device, reporter: Reporter) -> tuple[Dtype, Device]:
    """Return the dtype for unquantized weights, that of the merged model, and a device that it can be loaded on.

    By itself the loader would choose the fastest dtype of the device; on most CPUs that is fp32, twice the size.
    """
    chosen = choose_device(device)
    if stored == Dtype.BF16 and chosen.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return stored, Device.CPU  # the loader refuses bf16 there, and nothing is computed here
    if stored == Dtype.FP16 and chosen.type == "cpu":
        message = "what is not quantized is written in bf16: the merged model is in fp16, which a CPU does not load"
        reporter.report(Noted(message=message))
        return Dtype.BF16, device
    return stored, device
