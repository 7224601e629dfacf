"""llama.cpp's converter, where the user has it: found before anything is merged, run as a program of its own.

It is a script of a checkout, in no package; it runs on the Python that runs us, whose torch and transformers it needs.
"""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from qlora_cli.errors import ExportError, MissingDependencyError
from qlora_cli.settings.choices import GgufType

SCRIPT = "convert_hf_to_gguf.py"
VARIABLE = "LLAMA_CPP_DIR"
PACKAGES = ("gguf", "sentencepiece")  # the second is imported for every Llama, even one with a tokenizer.json
HOW_TO_GET_IT = (
    "Run: git clone --depth 1 https://github.com/ggml-org/llama.cpp, and give --llama-cpp llama.cpp "
    f"(or set {VARIABLE}); nothing of it has to be compiled."
)
LAST_LINES = 12
KILL_SECONDS = 5


@dataclass(frozen=True, kw_only=True)
class Converter:
    """The conversion script of llama.cpp."""

    script: Path

    def command(self, model: Path, target_file: Path, outtype: GgufType) -> list[str]:
        """Return the command that writes `model` to `target_file`.

        The name in the file would be that of the directory, which may be one that is soon renamed.
        """
        files = [str(model.resolve()), "--outfile", str(target_file.resolve())]
        options = ["--outtype", outtype.value, "--model-name", target_file.stem]
        return [sys.executable, str(self.script), *files, *options]


def find_converter(llama_cpp: Path | None) -> Converter:
    """Return the converter: where `llama_cpp` says, a checkout or the script; else the environment, else the PATH.

    Raises:
        MissingDependencyError: it is not there, or a package is not installed that it and its check need.
    """
    script = _find_script(llama_cpp)
    missing = [package for package in PACKAGES if find_spec(package) is None]
    if missing:
        raise MissingDependencyError(
            f"gguf needs the package {' and '.join(missing)}",
            hint='Run: pip install "qlora-cli[gguf]".',
            setting="merge.formats",
        )
    return Converter(script=script.resolve())  # files next to it are found by its real path, not a link's


def _find_script(llama_cpp: Path | None) -> Path:
    if llama_cpp is not None:
        return _script_at(llama_cpp, setting="merge.llama_cpp")
    if directory := os.environ.get(VARIABLE):
        return _script_at(Path(directory), named_by=f"{VARIABLE} ")
    if found := shutil.which(SCRIPT):
        return Path(found)
    raise MissingDependencyError(
        f"gguf needs {SCRIPT} of llama.cpp, which is neither on the PATH nor named",
        hint=HOW_TO_GET_IT,
        setting="merge.formats",
    )


def _script_at(place: Path, *, named_by: str = "", setting: str | None = None) -> Path:
    place = place.expanduser()
    script = place / SCRIPT if place.is_dir() else place
    if script.is_file() and script.suffix == ".py":
        return script
    what = f"holds no {SCRIPT}" if place.is_dir() else f"is no {SCRIPT}" if place.exists() else "is not there"
    raise MissingDependencyError(f"{named_by}{place} {what}", hint=HOW_TO_GET_IT, setting=setting)


def convert(
    converter: Converter, model: Path, target_file: Path, outtype: GgufType, *, vocabulary_only: bool = False
) -> None:
    """Let `converter` write `model` to `target_file`; whatever is raised, no process and no part of a file is left.

    Raises:
        ExportError: it failed; its last lines are told.
    """
    command = converter.command(model, target_file, outtype) + ["--vocab-only"] * vocabulary_only
    try:
        code, lines = _run(command)
        if code == 0 and not target_file.is_file():
            raise ExportError(f"llama.cpp's converter wrote no {target_file.name}", hint=_again(command))
        if code != 0:
            raise _failure(code, lines, command)
    except BaseException:
        target_file.unlink(missing_ok=True)
        raise


def _run(command: Sequence[str]) -> tuple[int, list[str]]:
    """Run `command` to its end; returns its exit code and the last lines that it wrote."""
    process = subprocess.Popen(  # noqa: S603 - a list of arguments, no shell
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**os.environ, "HF_HUB_OFFLINE": "1"},  # all it needs is in the directory
        start_new_session=True,  # Ctrl-C comes to us alone, and all that it started ends with it
    )
    assert process.stdout is not None, "asked for"
    try:
        lines = deque((line.rstrip() for line in process.stdout if line.strip()), maxlen=LAST_LINES)
        return process.wait(), list(lines)
    finally:
        process.stdout.close()
        _end(process)


def _end(process: subprocess.Popen[str]) -> None:
    """End `process` and what it started, if it still runs: kindly first."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None:
            return
        with suppress(ProcessLookupError):  # it ended just now
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=KILL_SECONDS)


def _failure(code: int, lines: Sequence[str], command: Sequence[str]) -> ExportError:
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"
    told = "\n".join(f"  | {line}" for line in lines) or "  | (it wrote nothing)"
    return ExportError(f"llama.cpp's converter {how}; its last lines:\n{told}", hint=_hint(lines, command))


def _hint(lines: Sequence[str], command: Sequence[str]) -> str:
    text = "\n".join(lines)
    if "pre-tokenizer was not recognized" in text:
        return (
            "llama.cpp knows tokenizers by what they make of a sample text, and not this one: it would cut text into "
            "other tokens than those that were trained. Update llama.cpp (git pull). If the tokenizer is your own, "
            "llama.cpp has to learn how it splits text first: see convert_hf_to_gguf_update.py there."
        )
    if missing := re.search(r"No module named '([\w.]+)'", text):
        return f"Run: pip install {missing[1].split('.')[0]}"
    if re.search(r"(Missing|not found:) \S*tokenizer\.model", text):
        return "Of this architecture the converter reads tokenizer.model: copy it from the base to the weights."
    if re.search(r"Model \S+ is not supported", text):
        return "This llama.cpp knows no such architecture: update it (git pull), or use another --format."
    return _again(command)


def _again(command: Sequence[str]) -> str:
    return f"Update llama.cpp (git pull), or look at it closer: {shlex.join(command)}"
