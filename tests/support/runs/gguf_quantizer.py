"""A stand-in for llama-quantize, with the same arguments: writes all matrices in Q8_0, which gguf can quantize to."""

import sys
from pathlib import Path

import gguf
import numpy as np


def quantize(source: Path, target: Path) -> None:
    """Copy the file `source`, quantized."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, "llama")
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            kind, *element = field.types
            writer.add_key_value(key, field.contents(), kind, sub_type=element[-1] if element else None)
    for tensor in reader.tensors:
        values = tensor.data.astype(np.float32)
        is_matrix = values.ndim > 1
        if is_matrix:
            values = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor(tensor.name, values, raw_dtype=gguf.GGMLQuantizationType.Q8_0 if is_matrix else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    quantize(Path(sys.argv[1]), Path(sys.argv[2]))
