"""Write a merged model as GGUF, for llama.cpp and tools built on it, and check the result."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from qlora_cli.errors import ExportError
from qlora_cli.events import Noted, PhaseStarted, Reporter
from qlora_cli.merging.exports.export_format import Export, Format
from qlora_cli.merging.exports.llama_cpp.converter import UPDATE, Converter, convert, find_converter
from qlora_cli.merging.exports.llama_cpp.quantizer import CONVERTED, Quantizer, find_quantizer, has_library, quantize
from qlora_cli.merging.exports.llama_cpp.run_gguf import run_gguf
from qlora_cli.merging.exports.template_turns import writes_bos
from qlora_cli.merging.merge_result import Divergence
from qlora_cli.merging.planning.inputs import Inputs
from qlora_cli.model_files.checkpoint import read_json
from qlora_cli.model_files.given_model import CONFIG
from qlora_cli.model_files.model_config import read_config
from qlora_cli.model_files.source import find_model
from qlora_cli.quantization.memory_check import free_bytes
from qlora_cli.quantization.storage_plan import build_on_meta
from qlora_cli.settings.choices import ExportFormat, GgufType
from qlora_cli.settings.models import MergeCommandSettings, ModelSettings
from qlora_cli.tokenizing.tokenizer import load_tokenizer
from qlora_cli.units import format_bytes, format_count
from qlora_cli.writing import copy_file

SUFFIX = ".gguf"
UNQUANTIZED = frozenset({GgufType.AUTO, GgufType.F32, GgufType.F16, GgufType.BF16})
BLOCK_WEIGHTS = 256  # of the types that the quantizer writes; a row is made of whole blocks
Q8_0_SHARE = 8.5 / 16
MOST_KL = 0.1  # nats a token, of a file in 16 bit or more; a layer or a head in the wrong place is whole nats
NO_LIBRARY = (
    "where llama-cpp-python is installed, its divergence from the merged model is measured "
    "(pip install 'qlora-cli[llama-cpp]')"
)


class GgufFormat(Format):
    """A file for llama.cpp, written by its own converter."""

    name = ExportFormat.GGUF
    library = "gguf"

    @staticmethod
    def serving(path: Path) -> Sequence[str]:
        """Return the command that serves it."""
        return ("llama-server", "--jinja", "-m", str(min(path.glob("*.gguf"), default=path)))

    def __init__(self, request: MergeCommandSettings) -> None:
        """Find the converter and, for a type that it does not write, the quantizer.

        Raises:
            MissingDependencyError: one of them, or a package that they need, is missing.
        """
        super().__init__(request)
        merge = request.merge
        self._writer = GgufWriter(
            converter=find_converter(merge.llama_cpp),
            quantizer=find_quantizer(merge.llama_cpp, merge.gguf_type),
            outtype=merge.gguf_type,
        )

    @property
    def share(self) -> float:
        """The file; before it is quantized, also that of the converter, and Q8_0 for rows that don't fit its type."""
        if self._writer.quantizer is not None:
            return 1.0 + Q8_0_SHARE
        return 2.0 if self.request.merge.gguf_type == GgufType.F32 else 1.0

    @property
    def quantized_to(self) -> str | None:
        """The requested type, unless it has 16 or 32 bits."""
        outtype = self.request.merge.gguf_type
        return None if outtype in UNQUANTIZED else outtype.value.upper()

    @property
    def files(self) -> tuple[str, ...]:
        """The pattern of the GGUF file."""
        return (f"*{SUFFIX}",)

    def check(self, inputs: Inputs, reporter: Reporter) -> None:
        """Fetch the converter if necessary, and try it on the vocabulary."""
        self._writer.converter.prepare(reporter)
        check_gguf(inputs.source.path, inputs.tokenizer.tokenizer, self._writer.converter, reporter)

    def write(self, export: Export) -> Divergence | None:
        """Convert the model, and read the file back."""
        file = gguf_file(export.target, export.name)
        file.parent.mkdir(exist_ok=True)
        trust = self.request.model.trust_remote_code
        done = export_gguf(export.model, file, self._writer, export.reporter, trust_remote_code=trust)
        size = f"{format_bytes(done.num_bytes)}, {done.bits_per_weight:.2f} bits a weight"
        held = f"{done.architecture}, {format_count(done.num_parameters)} parameters, {size}"
        export.reporter.report(Noted(message=f"{file.name} was opened and holds {held}"))
        return self._divergence(file, export)

    def _divergence(self, file: Path, export: Export) -> Divergence | None:
        """Return the divergence of the file from the merged model, if it can be run and is to be verified.

        Raises:
            ExportError: it does not run, or is another model.
        """
        if export.comparer is None or not self.request.merge.verify:
            return None
        if (reason := why_not_run(file)) is not None:
            export.reporter.report(Noted(message=f"{file.name} was not run: {reason}"))
            return None
        merged = export.comparer.stored(export.model)
        export.reporter.report(PhaseStarted(title=f"Running {file.name} with llama.cpp"))
        logits = run_gguf(file, export.comparer.texts.rows)
        divergence = export.comparer.compare(merged, logits[:, : merged.shape[1]])
        if self.quantized_to is None:
            check_divergence(file, divergence)
        return divergence


def why_not_run(file: Path) -> str | None:
    """Return why a file can't be run here; None if it can. Each row would read it from the disk if it did not fit."""
    if not has_library():
        return NO_LIBRARY
    size, free = file.stat().st_size, free_bytes(torch.device("cpu"))
    if size > free:
        return f"it takes {format_bytes(size)} of host memory, and {format_bytes(free)} are free"
    return None


def check_divergence(file: Path, divergence: Divergence) -> None:
    """Check that a file in 16 bit or more runs as the merged model does, but for rounding.

    Raises:
        ExportError: it is another model.
    """
    if not divergence.mean_kl <= MOST_KL:  # nor is it if that is NaN
        raise ExportError(
            f"{file.name} is not the model that was merged: run by llama.cpp, its KL divergence from that is "
            f"{divergence.mean_kl:.2g} nats a token, and rounding explains {MOST_KL:g} at most",
            hint=f"Its converter does not fully support this model. {UPDATE}. --no-verify skips the comparison.",
        )


def gguf_file(directory: Path, name: str) -> Path:
    """Return the path of the GGUF file in `directory`."""
    return directory / f"{name}{SUFFIX}"


@dataclass(frozen=True, kw_only=True)
class GgufWriter:
    """The programs that write the requested type; `quantizer` is None if the converter does."""

    converter: Converter
    quantizer: Quantizer | None
    outtype: GgufType

    def write(self, model: Path, target_file: Path, reporter: Reporter) -> None:
        """Convert the model in the directory `model`, and quantize the file.

        Raises:
            ExportError: one of them failed; no file is left.
        """
        if self.quantizer is None:
            reporter.report(PhaseStarted(title=f"Converting to GGUF ({self.outtype.value}) with llama.cpp"))
            convert(self.converter, model, target_file, self.outtype)
            return
        with TemporaryDirectory(dir=target_file.parent) as name:
            unquantized = Path(name) / target_file.name  # the file's name is also the model's
            reporter.report(PhaseStarted(title="Converting to GGUF (16 bit) with llama.cpp"))
            convert(self.converter, model, unquantized, GgufType.AUTO)
            reporter.report(PhaseStarted(title=f"Quantizing to {self.outtype.value} with llama.cpp"))
            quantize(self.quantizer, unquantized, target_file, self.outtype)


@dataclass(frozen=True, kw_only=True)
class GgufExport:
    """A GGUF file that was written and checked. `outtype` is the requested type."""

    file: Path
    num_bytes: int
    outtype: str
    architecture: str
    num_tensors: int
    num_parameters: int
    bits_per_weight: float
    vocabulary_size: int


def check_gguf(base: Path, tokenizer: PreTrainedTokenizerBase, converter: Converter, reporter: Reporter) -> None:
    """Try the converter on the vocabulary before anything is merged: most unsupported models fail at that.

    Only config and vocabulary of the model in `base` are read, not its weights.

    Raises:
        ExportError: the converter does not support the architecture or the tokenizer, or a dependency is missing.
    """
    reporter.report(PhaseStarted(title="Trying llama.cpp's converter on the tokenizer"))
    with TemporaryDirectory() as name:
        directory = Path(name)
        tokenizer.save_pretrained(directory)
        for file in base.glob("*.model"):
            copy_file(file, directory / file.name)
        write_config(base, tokenizer, directory)
        convert(converter, directory, directory / "vocabulary.gguf", GgufType.F16, vocabulary_only=True)


def write_config(base: Path, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Write the config that the merged model will have into `directory`."""
    values = _as_merged(read_json(base / CONFIG), tokenizer)
    (directory / CONFIG).write_text(json.dumps(values), encoding="utf-8")


def _as_merged(config: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return the config that the merged model will have: not quantized, with a row for every token."""
    config.pop("quantization_config", None)
    largest = max(tokenizer.get_vocab().values())
    for part in (config, config.get("text_config")):
        if isinstance(part, dict) and isinstance(part.get("vocab_size"), int):
            part["vocab_size"] = max(part["vocab_size"], largest + 1)
    return config


def export_gguf(
    model: Path,
    target_file: Path,
    writer: GgufWriter,
    reporter: Reporter,
    *,
    trust_remote_code: bool = False,
) -> GgufExport:
    """Write the 16-bit model in the directory `model` to `target_file`, and check that it is the same model.

    Raises:
        ExportError: a program failed, or the file is not this model; it is deleted.
    """
    writer.write(model, target_file, reporter)
    try:
        return _check(model, target_file, writer.outtype, reporter, trust_remote_code=trust_remote_code)
    except BaseException:
        target_file.unlink(missing_ok=True)
        raise


def _check(
    model: Path, target_file: Path, outtype: GgufType, reporter: Reporter, *, trust_remote_code: bool
) -> GgufExport:
    from qlora_cli.merging.exports.llama_cpp.gguf_file import mismatches, read_gguf  # needs an optional package

    reporter.report(PhaseStarted(title=f"Checking {target_file.name}"))
    source = find_model(ModelSettings(name=str(model), trust_remote_code=trust_remote_code))
    tokenizer = load_tokenizer(source, ModelSettings(name=str(model), trust_remote_code=trust_remote_code)).tokenizer
    config = read_config(source, trust_remote_code=trust_remote_code).config
    facts = read_gguf(target_file)
    wrong = mismatches(facts, config, tokenizer, _num_parameters(config, trust_remote_code=trust_remote_code))
    if wrong:
        raise ExportError(
            f"{target_file.name} is not the model that was merged: it has {'; and '.join(wrong)}",
            hint=f"Its converter does not fully support this model. {UPDATE}.",
        )
    _warn_about_bos(facts.adds_bos, tokenizer, reporter)
    if outtype not in CONVERTED and (message := facts.in_other_types(BLOCK_WEIGHTS)):
        reporter.report(Noted(message=message))
    return GgufExport(
        file=target_file,
        num_bytes=target_file.stat().st_size,
        outtype=outtype.value,
        architecture=facts.architecture,
        num_tensors=facts.num_tensors,
        num_parameters=facts.num_parameters,
        bits_per_weight=facts.bits_per_weight,
        vocabulary_size=facts.vocabulary_size,
    )


def _num_parameters(config: PreTrainedConfig, *, trust_remote_code: bool) -> int:
    model = build_on_meta(config, torch.bfloat16, trust_remote_code=trust_remote_code)
    return sum(parameter.numel() for parameter in model.parameters())


def _warn_about_bos(adds_bos: bool | None, tokenizer: PreTrainedTokenizerBase, reporter: Reporter) -> None:
    if adds_bos is None or adds_bos == writes_bos(tokenizer):
        return
    message = (
        f"llama.cpp will {'begin' if adds_bos else 'not begin'} text with {tokenizer.bos_token or 'a begin token'}, "
        f"and the tokenizer that the model was trained with {'does not' if adds_bos else 'does'}"
    )
    reporter.report(Noted(level="warning", message=message))
