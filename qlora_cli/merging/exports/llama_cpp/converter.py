"""Find llama.cpp's converter before anything is merged, and run it as a separate process.

It is a script, in a checkout or in the pinned source archive; it runs in our Python, since it needs torch and
transformers.
"""

import os
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from qlora_cli.errors import ExportError, MissingDependencyError
from qlora_cli.events import Reporter
from qlora_cli.merging.exports.llama_cpp.child_process import described_failure, run_to_end
from qlora_cli.merging.exports.llama_cpp.source_archive import CLONE, PINNED, SUFFIX
from qlora_cli.settings.choices import GgufType

SCRIPT = "convert_hf_to_gguf.py"
ADAPTER_SCRIPT = "convert_lora_to_gguf.py"  # next to it
VARIABLE = "LLAMA_CPP_DIR"
PACKAGES = ("gguf", "sentencepiece")  # the second is imported for every Llama, even one with a tokenizer.json
WITHOUT_A_NAME = f"Name a checkout of llama.cpp ({CLONE}), or name none: then its converter is downloaded."
UPDATE = f"Update llama.cpp (git pull in a checkout; without one, {CLONE}, and give --llama-cpp llama.cpp)"


@dataclass(frozen=True, kw_only=True)
class Converter:
    """The conversion script of llama.cpp.

    Attributes:
        script: The script; if `is_pinned`, that of the pinned archive, which exists once it is prepared.
        archive: The file to unpack it from; None to download it.
    """

    script: Path
    is_pinned: bool = False
    archive: Path | None = None

    def prepare(self, reporter: Reporter) -> None:
        """Fetch the script if it is that of the pinned archive, and not in the cache.

        Raises:
            MissingDependencyError: it can't be had.
        """
        if self.is_pinned:
            PINNED.unpack(self.archive, reporter)

    def command(self, model: Path, target_file: Path, outtype: GgufType) -> list[str]:
        """Return the command that converts `model` to `target_file`.

        Without a model name the converter would use that of the directory, which may be a temporary one.
        """
        files = [str(model.resolve()), "--outfile", str(target_file.resolve())]
        options = ["--outtype", outtype.value, "--model-name", target_file.stem]
        return [sys.executable, str(self.script), *files, *options]


def find_converter(llama_cpp: Path | None) -> Converter:
    """Return the converter at `llama_cpp`, which is a checkout, the script, or the file of the pinned archive.

    Without it: where the environment says, else on the PATH, else out of that archive.

    Raises:
        MissingDependencyError: it does not exist and can't be downloaded, or a package that it needs is not installed.
    """
    found = _find(llama_cpp)
    missing = [package for package in PACKAGES if find_spec(package) is None]
    if missing:
        raise MissingDependencyError(
            f"gguf needs the package {' and '.join(missing)}",
            hint='Run: pip install "qlora-cli[gguf]".',
            setting="merge.formats",
        )
    return found


def _find(llama_cpp: Path | None) -> Converter:
    if llama_cpp is not None:
        return _at(llama_cpp, setting="merge.llama_cpp")
    if directory := os.environ.get(VARIABLE):
        return _at(Path(directory), named_by=f"{VARIABLE} ")
    if path := shutil.which(SCRIPT):
        return Converter(script=Path(path).resolve())  # it imports files next to its real path, not next to a link
    PINNED.check_available()
    return Converter(script=PINNED.checkout / SCRIPT, is_pinned=True)


def _at(path: Path, *, named_by: str = "", setting: str | None = None) -> Converter:
    path = path.expanduser()
    if path.is_file() and path.name.endswith(SUFFIX):
        return Converter(script=PINNED.checkout / SCRIPT, is_pinned=True, archive=path)
    script = path / SCRIPT if path.is_dir() else path
    if script.is_file() and script.suffix == ".py":
        return Converter(script=script.resolve())
    what = f"holds no {SCRIPT}" if path.is_dir() else f"is not {SCRIPT}" if path.exists() else "does not exist"
    raise MissingDependencyError(f"{named_by}{path} {what}", hint=WITHOUT_A_NAME, setting=setting)


def convert_adapter(converter: Converter, adapter: Path, base: Path, target_file: Path) -> None:
    """Convert the LoRA in `adapter` to `target_file`, in fp32; `base` holds the config of its base.

    Raises:
        MissingDependencyError: the script for adapters is not next to the other.
        ExportError: it failed; the message has its last lines.
    """
    script = converter.script.with_name(ADAPTER_SCRIPT)
    if not script.is_file():
        raise MissingDependencyError(
            f"{script.parent} holds no {ADAPTER_SCRIPT}", hint=WITHOUT_A_NAME, setting="merge.formats"
        )
    files = [str(adapter), "--base", str(base), "--outfile", str(target_file.resolve())]
    _run([sys.executable, str(script), *files, "--outtype", "f32"], target_file)


def convert(
    converter: Converter, model: Path, target_file: Path, outtype: GgufType, *, vocabulary_only: bool = False
) -> None:
    """Convert `model` to `target_file`; on any exception no process and no partial file is left.

    Raises:
        ExportError: it failed; the message has its last lines.
    """
    _run(converter.command(model, target_file, outtype) + ["--vocab-only"] * vocabulary_only, target_file)


def _run(command: Sequence[str], target_file: Path) -> None:
    try:
        code, lines = run_to_end(command)
        if code == 0 and not target_file.is_file():
            raise ExportError(f"llama.cpp's converter wrote no {target_file.name}", hint=_how_to_debug(command))
        if code != 0:
            raise ExportError(described_failure("llama.cpp's converter", code, lines), hint=_hint(lines, command))
    except BaseException:
        target_file.unlink(missing_ok=True)
        raise


def _hint(lines: Sequence[str], command: Sequence[str]) -> str:
    text = "\n".join(lines)
    if "pre-tokenizer was not recognized" in text:
        return (
            "llama.cpp recognises tokenizers by how they split a sample text, and does not know this one: it would "
            "tokenize differently from training. " + UPDATE + ". If the tokenizer is your own, "
            "register it in llama.cpp first: see convert_hf_to_gguf_update.py there."
        )
    if missing := re.search(r"No module named '([\w.]+)'", text):
        return f"Run: pip install {missing[1].split('.')[0]}"
    if re.search(r"(Missing|not found:) \S*tokenizer\.model", text):
        return "For this architecture the converter needs tokenizer.model: copy it from the base to the weights."
    if re.search(r"Model \S+ is not supported", text):
        return f"This llama.cpp does not support the architecture. {UPDATE}, or use another --format."
    return _how_to_debug(command)


def _how_to_debug(command: Sequence[str]) -> str:
    return f"{UPDATE}, or run the command yourself: {shlex.join(command)}"
