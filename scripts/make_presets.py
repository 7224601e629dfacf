"""Write qlora_cli/presets/: a settings file for each model and card below, with the longest rows that fit.

python scripts/make_presets.py                # takes minutes; a test predicts some of them again
"""

import gc
import json
import os
from pathlib import Path
from typing import Any

# Nothing is compiled here, and PyTorch's compiler takes a second to import.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

from qlora_cli.errors import ModelError
from qlora_cli.memory.catalogue import CatalogueModel, find_in_catalogue
from qlora_cli.memory.estimator import Estimator
from qlora_cli.memory.fitting.suggestions import judge_fit
from qlora_cli.memory.gpus import find_gpu
from qlora_cli.memory.model_facts import facts_of_catalogue
from qlora_cli.memory.prediction import GpuFit
from qlora_cli.settings.models import EstimateSettings

FOLDER = Path(__file__).resolve().parent.parent / "qlora_cli" / "presets"
LENGTHS = (8192, 4096, 2048, 1024, 512)  # of rows, in tokens, the longest first
SIZES_GB = {  # of the cards, by the hub id of the model to train
    "meta-llama/Llama-3.2-1B-Instruct": (8,),
    "meta-llama/Llama-3.2-3B-Instruct": (8, 12),
    "meta-llama/Llama-3.1-8B-Instruct": (12, 16, 24),
    "meta-llama/Llama-3.3-70B-Instruct": (80,),
    "Qwen/Qwen3-4B-Instruct-2507": (8, 12),
    "Qwen/Qwen3-8B": (12, 16, 24),
    "Qwen/Qwen3-14B": (16, 24),
    "Qwen/Qwen3-32B": (24, 48),
    "Qwen/Qwen3-30B-A3B-Instruct-2507": (24, 48),
    "google/gemma-3-4b-it": (8, 12),
    "google/gemma-3-12b-it": (16, 24),
    "google/gemma-3-27b-it": (24, 48),
    "mistralai/Mistral-7B-Instruct-v0.3": (12, 16),
    "mistralai/Mistral-Small-24B-Instruct-2501": (24, 48),
    "mistralai/Ministral-3-3B-Instruct-2512-BF16": (8,),
    "mistralai/Ministral-3-8B-Instruct-2512-BF16": (12, 16),
    "mistralai/Ministral-3-14B-Instruct-2512-BF16": (16, 24),
    "microsoft/phi-4": (16, 24),
    "allenai/Olmo-3-7B-Instruct": (12, 16),
    "HuggingFaceTB/SmolLM3-3B": (8,),
    "zai-org/GLM-4-9B-0414": (16, 24),
    "unsloth/gpt-oss-20b-BF16": (24, 48),  # openai/gpt-oss-20b is stored in MXFP4, which can't be quantized again
}
TEXT = """\
# {hub_id} on one GPU with {size} GB, whichever that is:
#     qlora train --preset {name} --dataset train.jsonl --output runs/{short}
model:
  name: {hub_id}{gated}
quantization:
  method: nf4
lora:
  rank: 16
  alpha: 32
data:
  max_length: {length} # tokens of a row
training:
  micro_batch_size: 1
  gradient_accumulation_steps: 16 # rows of an optimizer step
"""
GATED = " # gated: request access on its page, then `hf auth login`"


def preset_name(model: CatalogueModel, size: int) -> str:
    """Return the name of the preset of a model on a card."""
    return f"{model.name}-{size}gb"


def fit_of(estimator: Estimator, model: CatalogueModel, length: int, size: int) -> GpuFit:
    """Return whether a run with rows of `length` tokens fits on every card that is sold with `size` GB."""
    values = {
        "model": {"name": model.name},
        "lora": {"rank": 16, "alpha": 32},
        "data": {"max_length": length},
        "training": {"micro_batch_size": 1, "gradient_accumulation_steps": 16},
    }
    gpu = find_gpu(f"{size}GB")
    gc.collect()
    gc.disable()  # releases must not depend on when the collector runs
    try:
        return judge_fit(estimator.estimate(EstimateSettings.model_validate(values), gpu), gpu)
    finally:
        gc.enable()


def longest(estimator: Estimator, model: CatalogueModel, size: int) -> tuple[int, GpuFit] | None:
    """Return the longest rows that fit, with their prediction; None if even the shortest do not."""
    for length in LENGTHS:
        try:
            fit = fit_of(estimator, model, length, size)
        except ModelError:  # fewer positions
            continue
        if fit.fits == "yes":
            return length, fit
    return None


def make() -> list[dict[str, Any]]:
    """Write the settings files, and return a line of the table for each."""
    table = []
    for hub_id, sizes in SIZES_GB.items():
        model = find_in_catalogue(hub_id)
        assert model is not None, hub_id
        estimator = Estimator(facts_of_catalogue(model))
        for size in sizes:
            if (found := longest(estimator, model, size)) is None:
                print(f"{hub_id} does not fit in {size} GB")
                continue
            length, fit = found
            name = preset_name(model, size)
            entry = {"name": name, "model": hub_id, "card_gb": size, "max_length_tokens": length}
            entry |= {"predicted_bytes": fit.process_high_bytes, "usable_bytes": fit.usable_bytes}
            table.append(entry)
            gated = GATED if model.is_gated else ""
            text = TEXT.format(hub_id=hub_id, size=size, name=name, short=model.name, gated=gated, length=length)
            (FOLDER / f"{name}.yaml").write_text(text, encoding="utf-8")
            print(name, length, fit.process_high_bytes >> 20, fit.usable_bytes >> 20, flush=True)
    return table


if __name__ == "__main__":
    lines = ",\n ".join(json.dumps(entry) for entry in make())
    (FOLDER / "predicted.json").write_text(f"[\n {lines}\n]\n", encoding="utf-8")
