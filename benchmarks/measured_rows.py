"""Compare predictions with public measurements of QLoRA steps on a T4; print the errors, their mean and the worst.

    python benchmarks/measured_rows.py [FILE] [--json]

The rows come from a plain loop around PEFT's own preparation (`plain_loop.py`), in fp16, with AdamW, attention pinned
to the memory-efficient kernel unless it is eager. Source: the open measurements of fitcheck-llm 0.3.1 (MIT).
"""

import json
import statistics
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.plain_loop import predict_plain_loop
from qlora_cli.memory.gpus import find_gpu
from qlora_cli.memory.prediction import Estimate
from qlora_cli.settings.choices import SdpaBackend
from qlora_cli.settings.models import EstimateSettings
from qlora_cli.units import MIB

ROWS = Path(__file__).parent / "data" / "measured_vram_t4.json"
FAMILIES = {"qwen": "qwen2", "mistral": "mistral", "zephyr": "mistral", "gemma-2": "gemma2", "gemma": "gemma"}
EVERY = ("allocated", "reserved")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One row: what was predicted and what was measured, in MiB."""

    label: str
    predicted: Mapping[str, float]
    measured: Mapping[str, float]

    def error(self, figure: str) -> float:
        """Return the error of a figure in percent."""
        return 100 * (self.predicted[figure] / self.measured[figure] - 1)


def content_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the config.json of a row's model says about its shapes."""
    name = config["name"].lower()
    family = next((model_type for part, model_type in FAMILIES.items() if part in name), "llama")
    return {
        "model_type": family,
        "hidden_size": config["hidden_size"],
        "intermediate_size": config["intermediate_size"],
        "num_hidden_layers": config["num_layers"],
        "num_attention_heads": config["num_attention_heads"],
        "num_key_value_heads": config["num_kv_heads"],
        "vocab_size": config["vocab_size"],
        "tie_word_embeddings": config["tie_word_embeddings"],
        "max_position_embeddings": 32768,
        **({} if family == "qwen2" else {"head_dim": config["head_dim"]}),
        **({"sliding_window": None} if family == "mistral" else {}),
    }


def settings_of(row: Mapping[str, Any]) -> EstimateSettings:
    """Return the settings of a row as `qlora inspect-memory` takes them."""
    run = row["run"]
    quantization: dict[str, Any] = {"method": run["quantization"]}
    if run["quantization"] == "nf4":
        quantization["double_quant"] = run["double_quant"]
    return EstimateSettings.model_validate(
        {
            "model": {
                "name": row["config"]["name"],
                "dtype": run["precision"],
                "attention": "eager" if run["kernel"] == "eager" else "sdpa",
            },
            "quantization": quantization,
            "lora": {"rank": run["lora_rank"], "alpha": 2 * run["lora_rank"], "target_modules": run["lora_targets"]},
            "data": {"max_length": run["seq_len"]},
            "training": {
                "micro_batch_size": run["batch_size"],
                "gradient_accumulation_steps": 1,
                "gradient_checkpointing": run["grad_checkpoint"],
                "optimizer": {"adamw": "adamw_torch", "adam8bit": "adamw_8bit"}[run["optimizer"]],
            },
        }
    )


def predict(row: Mapping[str, Any]) -> Estimate:
    """Return the prediction for a row."""
    backend = SdpaBackend.AUTO if row["run"]["kernel"] == "eager" else SdpaBackend.EFFICIENT
    return predict_plain_loop(content_of(row["config"]), settings_of(row), find_gpu("T4"), backend)


def compare(row: Mapping[str, Any]) -> Comparison:
    """Return the predicted and the measured figures of a row."""
    estimate, measured, run = predict(row), row["measured"], row["run"]
    phases = {phase.name: phase.allocated_bytes / MIB for phase in estimate.phases}
    return Comparison(
        label=f"{row['config']['name']:28.28} {run['quantization']:4} {run['kernel']:5} "
        f"{run['batch_size']:2} x {run['seq_len']:5}",
        predicted={
            "allocated": estimate.predicted.allocated_bytes / MIB,
            "reserved": estimate.predicted.reserved_bytes / MIB,
            **{name: phases[name] for name in ("forward", "backward", "optimizer")},
        },
        measured={
            "allocated": measured["peak_allocated_mib"],
            "reserved": measured["peak_reserved_mib"],
            **{name: measured[f"peak_{name}_mib"] for name in ("forward", "backward", "optimizer")},
        },
    )


def main(arguments: list[str]) -> None:
    """Compare every row of a file."""
    warnings.simplefilter("ignore", FutureWarning)
    files = [argument for argument in arguments if not argument.startswith("--")]
    rows = json.loads(Path(files[0] if files else ROWS).read_text(encoding="utf-8"))
    compared = []
    for row in rows:
        compared.append(comparison := compare(row))
        if "--json" not in arguments:
            figures = "  ".join(
                f"{name} {comparison.predicted[name]:8.1f} of {comparison.measured[name]:8.1f} MiB "
                f"({comparison.error(name):+.2f} %)"
                for name in EVERY
            )
            print(f"{comparison.label}  {figures}", flush=True)
    errors = {name: [abs(comparison.error(name)) for comparison in compared] for name in compared[0].predicted}
    summary = {
        name: {"mean_percent": round(statistics.mean(values), 3), "worst_percent": round(max(values), 3)}
        for name, values in errors.items()
    }
    print(json.dumps({"rows": len(compared), **summary}, indent=None if "--json" in arguments else 2))


if __name__ == "__main__":
    main(sys.argv[1:])
