"""Find what quantizes a GGUF to the types that the converter does not write, and run it as a separate process.

It is `llama-quantize` of llama.cpp, or the same function in the library of llama-cpp-python.
"""

import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from qlora_cli.errors import ExportError, MissingDependencyError
from qlora_cli.merging.exports.llama_cpp.child_process import described_failure, run_to_end
from qlora_cli.merging.exports.llama_cpp.converter import VARIABLE
from qlora_cli.settings.choices import GgufType

CONVERTED = frozenset({GgufType.AUTO, GgufType.F32, GgufType.F16, GgufType.BF16, GgufType.Q8_0})
PROGRAM = "llama-quantize"
BUILT = ("", "bin", "build/bin", "build/bin/Release")  # where a checkout or an archive of programs has them
CHILD = Path(__file__).with_name("library_calls.py")
HOW_TO_GET_IT = (
    'Run: pip install "qlora-cli[llama-cpp]", which compiles llama.cpp (a compiler and some minutes); or have '
    f"{PROGRAM} on the PATH (brew install llama.cpp), or in the checkout of --llama-cpp."
)


@dataclass(frozen=True, kw_only=True)
class Quantizer:
    """What quantizes: the words of its command before the names of the files."""

    start: Sequence[str]

    def command(self, source: Path, target: Path, outtype: GgufType) -> list[str]:
        """Return the command that quantizes the file `source` into `target`."""
        return [*self.start, str(source.resolve()), str(target.resolve()), outtype.value.upper()]


def has_library() -> bool:
    """Return whether llama-cpp-python is installed, not another package of the name `llama_cpp`; import nothing."""
    found = find_spec("llama_cpp")
    places = [] if found is None else found.submodule_search_locations or []
    return any((Path(place) / "llama_cpp.py").is_file() for place in places)


def library_command(function: str) -> list[str]:
    """Return the words that call a function of `library_calls.py` in a process of its own."""
    return [sys.executable, "-P", str(CHILD), function]  # -P: modules next to it must not be found by their names


def find_quantizer(llama_cpp: Path | None, outtype: GgufType) -> Quantizer | None:
    """Return what quantizes to `outtype`; None for a type that the converter writes.

    A program in the checkout `llama_cpp`, or in that of the environment, goes before the library; the PATH is last.

    Raises:
        MissingDependencyError: there is none.
    """
    if outtype in CONVERTED:
        return None
    named = llama_cpp or (Path(directory) if (directory := os.environ.get(VARIABLE)) else None)
    if named is not None:
        checkout = named.expanduser() if named.is_dir() else named.expanduser().parent
        if program := shutil.which(PROGRAM, path=os.pathsep.join(str(checkout / place) for place in BUILT)):
            return Quantizer(start=[program])
    if has_library():
        return Quantizer(start=library_command("quantize"))
    if program := shutil.which(PROGRAM):
        return Quantizer(start=[program])
    raise MissingDependencyError(
        f"{outtype.value} needs llama.cpp's quantizer, which is not here",
        hint=HOW_TO_GET_IT,
        setting="merge.gguf_type",
    )


def quantize(quantizer: Quantizer, source: Path, target: Path, outtype: GgufType) -> None:
    """Quantize the file `source` into `target`; on any exception no process and no partial file is left.

    Raises:
        ExportError: it failed; the message has its last lines.
    """
    command = quantizer.command(source, target, outtype)
    try:
        code, lines = run_to_end(command)
        if code != 0 or not target.is_file():
            raise ExportError(
                described_failure("llama.cpp's quantizer", code, lines),
                hint="Is the disk full? Otherwise use another --gguf-type, or a newer llama.cpp.",
            )
    except BaseException:
        target.unlink(missing_ok=True)
        raise
