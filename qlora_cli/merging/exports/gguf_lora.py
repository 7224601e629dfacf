"""Write the adapter alone as GGUF, for llama.cpp to apply to a GGUF of its base, and check the result."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import save_file

from qlora_cli.adapters.targets import BASE
from qlora_cli.errors import ExportError, ModelError
from qlora_cli.events import Noted, PhaseStarted, Reporter
from qlora_cli.merging.exports.export_format import Export, Format
from qlora_cli.merging.exports.gguf import SUFFIX, write_config
from qlora_cli.merging.exports.llama_cpp.converter import UPDATE, convert_adapter, find_converter
from qlora_cli.merging.merge_result import Divergence
from qlora_cli.merging.planning.inputs import Inputs
from qlora_cli.merging.planning.merge_plan import Changes
from qlora_cli.merging.planning.weight_changes import (
    AddedVector,
    DoraChange,
    ExpertUpdate,
    LowRankUpdate,
    ReplacedParameter,
    RowUpdate,
    WeightChange,
    WholeParameter,
)
from qlora_cli.model_files.adapter_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from qlora_cli.settings.choices import ExportFormat
from qlora_cli.settings.models import MergeCommandSettings
from qlora_cli.units import counted, format_bytes

WEIGHT = ".weight"
# What llama.cpp has no place for in a LoRA, in words.
UNSUPPORTED: Mapping[type[WeightChange], str] = {
    DoraChange: "DoRA",
    ExpertUpdate: "an adapter on experts",
    AddedVector: "a trained bias",
    RowUpdate: "trained rows of tokens",
    WholeParameter: "modules that are trained whole",
    ReplacedParameter: "a base whose weights the adapter replaces",
}


class GgufLoraFormat(Format):
    """A LoRA for llama.cpp, written by its own script."""

    name = ExportFormat.GGUF_LORA
    library = "gguf"
    content = "the adapter alone, for llama.cpp to apply to a GGUF of its base in 16 bit"

    @staticmethod
    def serving(path: Path) -> Sequence[str]:
        """Return the command that serves it."""
        return ("llama-server", "-m", "BASE.gguf", "--lora", str(min(path.glob(f"*{SUFFIX}"), default=path)))

    def __init__(self, request: MergeCommandSettings) -> None:
        """Find the converter.

        Raises:
            MissingDependencyError: the converter or a package that it needs is missing.
        """
        super().__init__(request)
        self._converter = find_converter(request.merge.llama_cpp)
        self._inputs: Inputs | None = None

    @property
    def files(self) -> tuple[str, ...]:
        """The pattern of the GGUF file."""
        return (f"*{SUFFIX}",)

    def check(self, inputs: Inputs, reporter: Reporter) -> None:
        """Convert the adapter once, before anything is merged: it takes neither the base's weights nor long."""
        pairs = low_rank_pairs(inputs.changes)
        self._inputs = inputs
        self._converter.prepare(reporter)
        reporter.report(PhaseStarted(title="Trying llama.cpp's converter on the adapter"))
        with TemporaryDirectory() as name:
            self._convert(inputs, pairs, Path(name) / f"adapter{SUFFIX}")
        if inputs.was_quantized:
            message = (
                f"{self.name.value} is for a GGUF of the base in 16 bit: near the model that was trained on the "
                f"quantized base, not it; how near is the divergence of a merge into the original base"
            )
            reporter.report(Noted(message=message))

    def write(self, export: Export) -> Divergence | None:
        """Convert the adapter, and read the file back."""
        assert self._inputs is not None, "it was checked"
        file = export.target / f"{export.name}-lora{SUFFIX}"
        file.parent.mkdir(exist_ok=True)
        export.reporter.report(PhaseStarted(title="Converting the adapter to GGUF with llama.cpp"))
        pairs = low_rank_pairs(self._inputs.changes)
        self._convert(self._inputs, pairs, file)
        held = f"{counted(len(pairs), 'module')}, {format_bytes(file.stat().st_size)}"
        export.reporter.report(Noted(message=f"{file.name} was opened and holds the adapter of {held}"))
        return None

    def _convert(self, inputs: Inputs, pairs: Mapping[str, LowRankUpdate], target_file: Path) -> None:
        from qlora_cli.merging.exports.llama_cpp.lora_file import lora_mismatches  # needs an optional package

        with TemporaryDirectory() as name:
            base, adapter = Path(name) / "base", Path(name) / target_file.stem
            base.mkdir()
            write_config(inputs.source.path, inputs.tokenizer.tokenizer, base)
            factors = write_adapter(pairs, adapter)
            convert_adapter(self._converter, adapter, base, target_file)
        wrong = lora_mismatches(target_file, factors)
        if wrong:
            target_file.unlink()
            raise ExportError(
                f"{target_file.name} is not the adapter: {'; '.join(wrong)}",
                hint=f"llama.cpp's script does not support this adapter. {UPDATE}, or merge it (--format gguf).",
            )


def low_rank_pairs(changes: Changes) -> Mapping[str, LowRankUpdate]:
    """Return the update of each adapted module, by its name in the base; the weight in the sum is in the scale.

    Raises:
        ModelError: the adapter does more than LoRA on linear layers, or there are several.
    """
    pairs = {}
    for parameter, weighted in changes.items():
        change = weighted[0].change
        reason = UNSUPPORTED.get(type(change))
        if len(weighted) > 1:
            reason = "several adapters at once"
        elif isinstance(change, LowRankUpdate) and (change.is_transposed or not parameter.endswith(WEIGHT)):
            reason = "an adapter on weights that are stored transposed, such as an embedding's"
        if reason is not None:
            raise ModelError(
                f"a LoRA in GGUF can't hold {reason} ({parameter})",
                hint="Merge it instead: --format gguf.",
                setting="merge.formats",
            )
        assert isinstance(change, LowRankUpdate), "all others are refused"
        scale = change.scale * weighted[0].weight
        pairs[parameter.removesuffix(WEIGHT)] = LowRankUpdate(left=change.left, right=change.right, scale=scale)
    return pairs


def write_adapter(
    pairs: Mapping[str, LowRankUpdate], directory: Path
) -> Mapping[str, tuple[torch.Tensor, torch.Tensor, float]]:
    """Write a plain LoRA of the updates into a new `directory`; return A, B and the scale of each, in fp32.

    llama.cpp scales all by one alpha, divided by the rank of each; B makes up for a pattern that scales otherwise.
    """
    first = next(iter(pairs.values()))
    alpha = first.scale * first.right.shape[0]
    factors: dict[str, tuple[torch.Tensor, torch.Tensor, float]] = {}
    tensors: dict[str, torch.Tensor] = {}
    for name, pair in pairs.items():
        scale = alpha / pair.right.shape[0]
        right, left = pair.right.float(), pair.left.float()
        if scale != pair.scale:
            left = left * (pair.scale / scale)
        factors[name] = (right, left, scale)
        tensors |= {f"{BASE}{name}.lora_A.weight": right, f"{BASE}{name}.lora_B.weight": left}
    directory.mkdir()
    save_file({key: value.contiguous() for key, value in tensors.items()}, directory / ADAPTER_WEIGHTS)
    config = {"peft_type": "LORA", "r": first.right.shape[0], "lora_alpha": alpha, "base_model_name_or_path": None}
    (directory / ADAPTER_CONFIG).write_text(json.dumps(config), encoding="utf-8")
    return factors
