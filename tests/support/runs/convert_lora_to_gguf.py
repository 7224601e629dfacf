"""A stand-in for llama.cpp's converter of adapters: writes a real LoRA in GGUF of a Llama, with the same arguments.

`WRONG` in the environment names one thing to write wrongly.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import gguf
from safetensors.numpy import load_file

sys.path.insert(0, str(Path(__file__).parents[3]))

from tests.support.runs.gguf_converter import gguf_name, with_pairs_together


def write(adapter: Path, base: Path, target: Path, wrong: str | None) -> None:
    """Write `target` from the adapter and the config of its base."""
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    settings = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    writer = gguf.GGUFWriter(target, "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, settings["lora_alpha"] * (2 if wrong == "alpha" else 1))
    for key, values in load_file(adapter / "adapter_model.safetensors").items():
        name, _, kind = key.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
        if kind == "lora_B":
            values = with_pairs_together(f"{name}.weight", values, config)
        writer.add_tensor(f"{gguf_name(f'{name}.weight')}.{kind.lower()}", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("adapter", type=Path)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--outfile", type=Path, required=True)
    parser.add_argument("--outtype", choices=["f32"], required=True)
    given = parser.parse_args()
    write(given.adapter, given.base, given.outfile, os.environ.get("WRONG"))
