"""Load a model once, in this process, and print time and memory as one JSON object.

Each load has its own process, so that nothing left by another one counts. The host's figure is *anonymous* memory,
which a process can't give back: pages of the checkpoint in the page cache do not count. It starts at zero after the
imports.
"""

import argparse
import json
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SAMPLE_SECONDS = 0.002
STATUS = Path("/proc/self/status")


def anonymous_bytes() -> int:
    """Return the resident anonymous memory of this process; Linux only."""
    for line in STATUS.read_text(encoding="ascii").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{STATUS} has no RssAnon")


class AnonymousPeak:
    """The peak of anonymous memory above that at the start, sampled every few milliseconds."""

    def __init__(self) -> None:
        self.start_bytes = anonymous_bytes()
        self.peak_bytes = 0
        self.num_samples = 0
        self._stop = threading.Event()

    def _watch(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            self.peak_bytes = max(self.peak_bytes, anonymous_bytes() - self.start_bytes)
            self.num_samples += 1

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Sample while the block runs."""
        thread = threading.Thread(target=self._watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join()


def load_with_qlora(
    model: Path, options: Mapping[str, Any], save: Path | None = None, num_shards: int = 1
) -> dict[str, Any]:
    """Load by `load_model` with settings by their full names, and save if asked to.

    With `num_shards`, load what the first of as many processes keeps of a sharded base; `shard_bytes` are its bytes.
    `model_bytes` are counted and `predicted_bytes` predicted; `device_model_bytes` exclude an embedding in host
    memory, and `needed_bytes` include the predicted transient memory.
    """
    from qlora_cli.events import SilentReporter
    from qlora_cli.loading.loader import load_model
    from qlora_cli.loading.save import save_quantized
    from qlora_cli.quantization.memory_check import needed_bytes
    from qlora_cli.settings.models import LoadSettings
    from qlora_cli.settings.resolve import Sources, resolve

    values = {"model.name": str(model), **options}
    settings = resolve(Sources(flags={path: (path, value) for path, value in values.items()}), LoadSettings).settings
    watcher, start = AnonymousPeak(), time.monotonic()
    with watcher.watching():
        loaded = load_model(settings) if num_shards == 1 else _load_shard(settings, num_shards)
        seconds = time.monotonic() - start
    layout = loaded.layout
    needed = needed_bytes(layout, offload_embedding=loaded.settings.model.offload_embedding)
    figures = {
        **_figures(watcher, seconds, loaded.peak_device_bytes),
        "model_bytes": loaded.inventory.total_bytes,
        "predicted_bytes": layout.inventory.total_bytes,
        "device_model_bytes": needed - layout.transient_bytes,
        "needed_bytes": needed,
        "one_tensor_bytes": 2 * layout.inventory.largest_parameters,
        "num_parameters": loaded.inventory.num_parameters,
        "compute_dtype": loaded.dtype.name.value,
        "shard_bytes": None if loaded.shards is None else loaded.shards.num_bytes,
    }
    if save is not None:
        watcher, start = AnonymousPeak(), time.monotonic()
        with watcher.watching():
            saved_bytes = save_quantized(loaded, save, SilentReporter())
        figures |= {
            "saved_bytes": saved_bytes,
            "save_seconds": time.monotonic() - start,
            "save_peak_host_bytes": watcher.peak_bytes,
        }
    return figures


def _load_shard(settings: Any, num_shards: int) -> Any:
    from transformers.modeling_layers import GradientCheckpointingLayer

    from qlora_cli.events import SilentReporter
    from qlora_cli.loading.load_plan import plan_load
    from qlora_cli.loading.loader import load_planned
    from qlora_cli.quantization.kept_shards import KeptShards, layer_names
    from qlora_cli.settings.settle import resolved_in_code

    plan = plan_load(resolved_in_code(settings), SilentReporter())
    layers = tuple(layer_names(plan.shapes, GradientCheckpointingLayer))
    shards = KeptShards(rank=0, size=num_shards, device=plan.device, layers=layers)
    return load_planned(plan, SilentReporter(), shards=shards)


def load_with_transformers(model: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """Load by `AutoModelForCausalLM.from_pretrained` with `BitsAndBytesConfig`, NF4 with double quantization."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
    from transformers.utils import logging as transformers_logging

    device = torch.device("cuda" if torch.cuda.is_available() and options.get("model.device") != "cpu" else "cpu")
    dtype = torch.float32 if options.get("model.dtype") == "fp32" else torch.bfloat16
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    transformers_logging.disable_progress_bar()
    watcher, start = AnonymousPeak(), time.monotonic()
    with watcher.watching():
        AutoTokenizer.from_pretrained(model, trust_remote_code=False)
        loaded = AutoModelForCausalLM.from_pretrained(
            model,
            quantization_config=quantization,
            dtype=dtype,
            device_map={"": device},
            trust_remote_code=False,
        )
        seconds = time.monotonic() - start
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return {**_figures(watcher, seconds, peak), "model_bytes": loaded.get_memory_footprint()}


def _figures(watcher: AnonymousPeak, seconds: float, peak_device_bytes: int | None) -> dict[str, Any]:
    return {
        "load_seconds": seconds,
        "imports_host_bytes": watcher.start_bytes,
        "peak_host_bytes": watcher.peak_bytes,
        "num_samples": watcher.num_samples,
        "peak_device_bytes": peak_device_bytes,
    }


def main() -> None:
    """Load according to the arguments and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", choices=("qlora", "transformers"))
    parser.add_argument("model", type=Path)
    parser.add_argument("--options", default="{}", help="settings by their full names, as JSON")
    parser.add_argument("--shards", type=int, default=1, help="load one shard of as many (qlora only)")
    parser.add_argument("--save", type=Path, help="save the quantized model here, and measure that too (qlora only)")
    arguments = parser.parse_args()
    options = json.loads(arguments.options)
    if arguments.program == "qlora":
        figures = load_with_qlora(arguments.model, options, arguments.save, arguments.shards)
    else:
        figures = load_with_transformers(arguments.model, options)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
