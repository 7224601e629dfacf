"""Merge an adapter into its base once, in this process, and print time and memory as one JSON object.

Each merge has its own process. In addition to the seconds, the host's figures are the peak of *anonymous* memory,
which a process can't give back, above that after the imports, and the largest resident set, which includes mapped
files.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

from benchmarks.load_case import AnonymousPeak


def merge_with_qlora(adapter: Path, output: Path, base: str) -> dict[str, Any]:
    """Merge by the code of `qlora merge --no-verify`."""
    from qlora_cli.events import SilentReporter
    from qlora_cli.merging.merge_run import merge
    from qlora_cli.settings.choices import BaseWeights
    from qlora_cli.settings.models import MergeCommandSettings, MergeSettings

    settings = MergeCommandSettings(
        merge=MergeSettings(adapters=(str(adapter),), output=output, base=BaseWeights(base), verify=False)
    )
    watcher, start = AnonymousPeak(), time.monotonic()
    with watcher.watching():
        result = merge(settings, SilentReporter())
        seconds = time.monotonic() - start
    return {**_figures(watcher, seconds), "num_merged_tensors": result.num_merged_tensors}


def merge_with_peft(adapter: Path, output: Path) -> dict[str, Any]:
    """Merge as PEFT's documentation does: load the base and the adapter, `merge_and_unload`, `save_pretrained`."""
    import torch
    from peft import PeftConfig, PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    watcher, start = AnonymousPeak(), time.monotonic()
    with watcher.watching():
        base = PeftConfig.from_pretrained(adapter).base_model_name_or_path
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, trust_remote_code=False)
        merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
        merged.save_pretrained(output)
        AutoTokenizer.from_pretrained(base, trust_remote_code=False).save_pretrained(output)
        seconds = time.monotonic() - start
    return _figures(watcher, seconds)


def write_adapter(base: Path, adapter: Path) -> None:
    """Write a LoRA adapter of rank 16 with random weights for all linear layers of `base`."""
    import torch
    from peft import LoraConfig, get_peft_model
    from peft.utils import get_peft_model_state_dict
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        config = AutoConfig.from_pretrained(base, trust_remote_code=False)
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        adapter_config = LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        adapted = get_peft_model(model, adapter_config)
    chance = torch.Generator().manual_seed(0)
    state = {
        name: torch.randn(tensor.shape, generator=chance) * 0.01
        for name, tensor in get_peft_model_state_dict(adapted, save_embedding_layers=False).items()
    }
    adapter.mkdir(parents=True)
    adapter_config.base_model_name_or_path = str(base)
    adapter_config.save_pretrained(adapter)
    save_file(state, adapter / "adapter_model.safetensors", metadata={"format": "pt"})


def _figures(watcher: AnonymousPeak, seconds: float) -> dict[str, Any]:
    from qlora_cli.hardware.counters import peak_host_bytes

    return {
        "seconds": seconds,
        "imports_host_bytes": watcher.start_bytes,
        "anonymous_bytes": watcher.peak_bytes,
        "resident_bytes": peak_host_bytes(),
        "num_samples": watcher.num_samples,
    }


def main() -> None:
    """Merge according to the arguments and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", choices=("qlora", "peft", "adapter"), help="adapter: write a random one")
    parser.add_argument("adapter", type=Path)
    parser.add_argument("output", type=Path, help="of the merge; for adapter, the base")
    parser.add_argument("--base", default="original", help="which weights are merged into (qlora only)")
    arguments = parser.parse_args()
    if arguments.program == "adapter":
        write_adapter(arguments.output, arguments.adapter)
        return
    if arguments.program == "qlora":
        figures = merge_with_qlora(arguments.adapter, arguments.output, arguments.base)
    else:
        figures = merge_with_peft(arguments.adapter, arguments.output)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
