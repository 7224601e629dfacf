"""Run a GGUF file with llama.cpp, by the library of llama-cpp-python in a process of its own."""

import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from qlora_cli.errors import ExportError
from qlora_cli.merging.exports.llama_cpp.child_process import described_failure, run_to_end
from qlora_cli.merging.exports.llama_cpp.quantizer import library_command


def run_gguf(file: Path, rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """Return the logits of `file` at each token of `rows`, one row after the other, `(tokens, vocabulary)` in fp32.

    It runs as llama.cpp does by itself, on the CPU: products in the types of its own, keys and values in fp16.

    Raises:
        ExportError: llama.cpp can't load or run it.
    """
    with TemporaryDirectory() as name:
        tokens, logits = Path(name) / "tokens.json", Path(name) / "logits.npy"
        tokens.write_text(json.dumps([list(row) for row in rows]), encoding="utf-8")
        code, lines = run_to_end([*library_command("logits"), str(file.resolve()), str(tokens), str(logits)])
        if code != 0:
            raise ExportError(
                described_failure(f"llama.cpp, running {file.name},", code, lines),
                hint="The installed library may be older than the converter (pip install --upgrade llama-cpp-python). "
                "With --no-verify the file is written without running it.",
            )
        return torch.from_numpy(np.load(logits))
