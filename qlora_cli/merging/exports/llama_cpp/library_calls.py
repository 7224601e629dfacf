"""Calls of llama.cpp's library by llama-cpp-python, for a process of their own: run as a script.

The library aborts the process on some errors, and runs for minutes without a chance to interrupt it. Imports nothing
of ours.
"""

import ctypes
import json
import sys
from pathlib import Path

import llama_cpp
import numpy as np


def quantize(source: str, target: str, type_name: str) -> int:
    """Quantize the file `source` to the type that llama.cpp calls `type_name`; return 0 on success."""
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{type_name}")
    code: int = llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(parameters))
    return code


def logits(model: str, tokens: str, target: str) -> int:
    """Run the file `model` on the CPU over the rows of ids in the JSON file `tokens`; return 0.

    The logits are written to the npy file `target`, one row after the other, `(tokens, vocabulary)` in fp32.
    """
    rows = json.loads(Path(tokens).read_text(encoding="utf-8"))
    longest = max(map(len, rows))
    llama = llama_cpp.Llama(model, n_gpu_layers=0, n_ctx=longest, n_batch=longest, logits_all=True)
    shape = (sum(map(len, rows)), llama.n_vocab())
    written = np.lib.format.open_memmap(target, mode="w+", dtype=np.float32, shape=shape)
    done = 0
    for row in rows:
        llama.reset()
        llama.eval(row)
        written[done : done + len(row)] = llama.scores[: len(row)]
        done += len(row)
    written.flush()
    return 0


CALLS = {"quantize": quantize, "logits": logits}

if __name__ == "__main__":
    sys.exit(CALLS[sys.argv[1]](*sys.argv[2:]))
