"""Save a quantized checkpoint, about a quarter of its 16-bit base, complete or not at all.

Plain transformers loads it to the same logits. One with quantized experts needs qlora, as its `quant_method` says:
transformers can't read them.
"""

import json
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import save_torch_state_dict
from transformers import GenerationConfig

from qlora_cli import __version__
from qlora_cli.errors import ModelError
from qlora_cli.events import PhaseStarted, Reporter
from qlora_cli.files import as_json, check_disk_space
from qlora_cli.loading.load_plan import LoadPlan
from qlora_cli.loading.loader import LoadedModel
from qlora_cli.model_files.digest import base_digest
from qlora_cli.model_files.generation import GENERATION_CONFIG
from qlora_cli.writing import fill_directory

NOTE = "qlora.json"
SHARD_SIZE = "1GB"  # copied from a GPU to host memory at a time; from a CPU nothing is copied
OTHER_FILES_BYTES = 64 * 1024**2  # tokenizer, configs, index, headers


def check_savable(planned: LoadPlan | LoadedModel, directory: Path) -> None:
    """Check that there is a quantized base to save, and disk space for it at `directory`.

    Raises:
        ModelError: nothing is quantized, or an adapter is attached.
        DiskSpaceError: it does not fit on the disk.
    """
    layout, source = planned.layout, planned.source
    layout.method.check_savable(layout.settings)
    if source.adapter is not None:
        raise ModelError(
            f"a base model is to be saved, and {source.name} is an adapter",
            hint="Name the base to save it.",
            setting="load.save",
        )
    needed = layout.inventory.total_bytes + OTHER_FILES_BYTES
    check_disk_space(directory, needed, hint="Free disk space, or choose another directory for --save.")


def save_quantized(
    loaded: LoadedModel, directory: Path, reporter: Reporter, *, also: Callable[[Path], None] | None = None
) -> int:
    """Write `loaded` with its tokenizer to `directory`, which must be empty or absent; return the bytes written.

    Next to the model is `qlora.json`: source, commit, settings, versions; and what `also` writes into the directory.

    Raises:
        ModelError: there is nothing to save.
        DiskSpaceError: it does not fit on the disk.
    """
    check_savable(loaded, directory)
    reporter.report(PhaseStarted(title=f"Writing {directory}"))

    def fill(path: Path) -> None:
        _save_model(loaded, path)
        if also is not None:
            also(path)
        loaded.tokenizer.save_pretrained(path)
        for weights in path.glob("*.safetensors"):
            weights.chmod((path / "config.json").stat().st_mode)  # safetensors makes them private
        note = json.dumps(as_json(_note(loaded)), indent=2) + "\n"
        (path / NOTE).write_text(note, encoding="utf-8")

    fill_directory(directory, fill)
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())


def _save_model(loaded: LoadedModel, path: Path) -> None:
    # `save_pretrained` would split fused experts, and does not support packed ones.
    model = loaded.base
    state = model.state_dict()
    for name, tensor in loaded.layout.method.extra_state(model).items():
        state.setdefault(name, tensor)
    tied = set(model.all_tied_weights_keys or {})
    save_torch_state_dict(
        {name: tensor.contiguous() for name, tensor in state.items() if name not in tied},
        path,
        max_shard_size=SHARD_SIZE,
        metadata={"format": "pt"},
    )
    config = model.config
    config.architectures = [type(model).__name__]
    config.save_pretrained(path)
    if isinstance(generation := model.generation_config, GenerationConfig):
        # `save_pretrained` refuses flags without effect, which many published models have.
        generation.to_json_file(path / GENERATION_CONFIG, keys_to_pop=["compile_config"])


def _note(loaded: LoadedModel) -> dict[str, Any]:
    return {
        "written_by": f"qlora {__version__}",
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "source": loaded.source.name,
        "revision": loaded.source.revision,
        "commit": loaded.source.commit,
        "source_digest": base_digest(loaded.source.path),
        "dtype": loaded.dtype.name,
        "quantization": loaded.settings.quantization.model_dump(mode="json"),
        "calibration": loaded.calibration,
        "kept_in_16_bit": sorted(loaded.layout.unquantized),
        "quantized_experts": list(loaded.layout.experts),
        "versions": {name: version(name) for name in ("bitsandbytes", "torch", "transformers")},
    }
