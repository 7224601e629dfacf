"""Calls of llama.cpp's library by llama-cpp-python, for a process of their own: run as a script.

The library aborts the process on some errors, and runs for minutes without a chance to interrupt it. Imports nothing
of ours.
"""

import ctypes
import sys

import llama_cpp


def quantize(source: str, target: str, type_name: str) -> int:
    """Quantize the file `source` to the type that llama.cpp calls `type_name`; return 0 on success."""
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{type_name}")
    code: int = llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(parameters))
    return code


CALLS = {"quantize": quantize}

if __name__ == "__main__":
    sys.exit(CALLS[sys.argv[1]](*sys.argv[2:]))
