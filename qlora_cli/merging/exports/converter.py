"""Find llama.cpp's converter before anything is merged, and run it as a separate process.

It is a script in a checkout, not a package; it runs in our Python, since it needs torch and transformers.
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
    f"(or set {VARIABLE}); nothing has to be compiled."
)
LAST_LINES = 12
KILL_SECONDS = 5


@dataclass(frozen=True, kw_only=True)
class Converter:
    """The conversion script of llama.cpp."""

    script: Path

    def command(self, model: Path, target_file: Path, outtype: GgufType) -> list[str]:
        """Return the command that converts `model` to `target_file`.

        Without a model name the converter would use that of the directory, which may be a temporary one.
        """
        files = [str(model.resolve()), "--outfile", str(target_file.resolve())]
        options = ["--outtype", outtype.value, "--model-name", target_file.stem]
        return [sys.executable, str(self.script), *files, *options]


def find_converter(llama_cpp: Path | None) -> Converter:
    """Return the converter: at `llama_cpp` (a checkout or the script), else by the environment, else on the PATH.

    Raises:
        MissingDependencyError: it does not exist, or a package that it or its check needs is not installed.
    """
    script = _find_script(llama_cpp)
    missing = [package for package in PACKAGES if find_spec(package) is None]
    if missing:
        raise MissingDependencyError(
            f"gguf needs the package {' and '.join(missing)}",
            hint='Run: pip install "qlora-cli[gguf]".',
            setting="merge.formats",
        )
    return Converter(script=script.resolve())  # it imports files next to its real path, not next to a link


def _find_script(llama_cpp: Path | None) -> Path:
    if llama_cpp is not None:
        return _script_at(llama_cpp, setting="merge.llama_cpp")
    if directory := os.environ.get(VARIABLE):
        return _script_at(Path(directory), named_by=f"{VARIABLE} ")
    if path := shutil.which(SCRIPT):
        return Path(path)
    raise MissingDependencyError(
        f"gguf needs {SCRIPT} of llama.cpp, which is neither on the PATH nor named",
        hint=HOW_TO_GET_IT,
        setting="merge.formats",
    )


def _script_at(path: Path, *, named_by: str = "", setting: str | None = None) -> Path:
    path = path.expanduser()
    script = path / SCRIPT if path.is_dir() else path
    if script.is_file() and script.suffix == ".py":
        return script
    what = f"holds no {SCRIPT}" if path.is_dir() else f"is not {SCRIPT}" if path.exists() else "does not exist"
    raise MissingDependencyError(f"{named_by}{path} {what}", hint=HOW_TO_GET_IT, setting=setting)


def convert(
    converter: Converter, model: Path, target_file: Path, outtype: GgufType, *, vocabulary_only: bool = False
) -> None:
    """Convert `model` to `target_file`; on any exception no process and no partial file is left.

    Raises:
        ExportError: it failed; the message has its last lines.
    """
    command = converter.command(model, target_file, outtype) + ["--vocab-only"] * vocabulary_only
    try:
        code, lines = _run(command)
        if code == 0 and not target_file.is_file():
            raise ExportError(f"llama.cpp's converter wrote no {target_file.name}", hint=_how_to_debug(command))
        if code != 0:
            raise _failure(code, lines, command)
    except BaseException:
        target_file.unlink(missing_ok=True)
        raise


def _run(command: Sequence[str]) -> tuple[int, list[str]]:
    """Run `command` to its end; return its exit code and its last lines of output."""
    process = subprocess.Popen(  # noqa: S603 - a list of arguments, no shell
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**os.environ, "HF_HUB_OFFLINE": "1"},  # everything it needs is in the directory
        start_new_session=True,  # Ctrl-C reaches only us, and its children can be ended with it
    )
    assert process.stdout is not None, "it is a pipe"
    try:
        lines = deque((line.rstrip() for line in process.stdout if line.strip()), maxlen=LAST_LINES)
        return process.wait(), list(lines)
    finally:
        process.stdout.close()
        _terminate(process)


def _terminate(process: subprocess.Popen[str]) -> None:
    """Terminate `process` and its children if it still runs; kill them if that does not help."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None:
            return
        with suppress(ProcessLookupError):  # it ended just now
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=KILL_SECONDS)


def _failure(code: int, lines: Sequence[str], command: Sequence[str]) -> ExportError:
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"
    output = "\n".join(f"  | {line}" for line in lines) or "  | (it wrote nothing)"
    return ExportError(f"llama.cpp's converter {how}; its last lines:\n{output}", hint=_hint(lines, command))


def _hint(lines: Sequence[str], command: Sequence[str]) -> str:
    text = "\n".join(lines)
    if "pre-tokenizer was not recognized" in text:
        return (
            "llama.cpp recognises tokenizers by how they split a sample text, and does not know this one: it would "
            "tokenize differently from training. Update llama.cpp (git pull). If the tokenizer is your own, "
            "register it in llama.cpp first: see convert_hf_to_gguf_update.py there."
        )
    if missing := re.search(r"No module named '([\w.]+)'", text):
        return f"Run: pip install {missing[1].split('.')[0]}"
    if re.search(r"(Missing|not found:) \S*tokenizer\.model", text):
        return "For this architecture the converter needs tokenizer.model: copy it from the base to the weights."
    if re.search(r"Model \S+ is not supported", text):
        return "This llama.cpp does not support the architecture: update it (git pull), or use another --format."
    return _how_to_debug(command)


def _how_to_debug(command: Sequence[str]) -> str:
    return f"Update llama.cpp (git pull), or run the command yourself: {shlex.join(command)}"
