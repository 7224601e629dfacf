"""The merged model in transformers' format, which all other formats are made from: already written."""

from collections.abc import Sequence
from pathlib import Path

from qlora_cli.events import Reporter
from qlora_cli.merging.exports.export_format import Export, Format
from qlora_cli.merging.merge_result import Divergence
from qlora_cli.merging.planning.inputs import Inputs
from qlora_cli.settings.choices import ExportFormat


class HfFormat(Format):
    """Safetensors, configs and tokenizer."""

    name = ExportFormat.HF

    @staticmethod
    def serving(path: Path) -> Sequence[str]:
        """Return the command that serves it."""
        return ("vllm", "serve", str(path))

    @property
    def holds_model(self) -> bool:
        """Always: the format is the model."""
        return True

    def check(self, inputs: Inputs, reporter: Reporter) -> None:
        """Check nothing: every model that can be merged can be written in this format."""

    def write(self, export: Export) -> Divergence | None:
        """Write nothing: the model is already written."""
        del export
        return None
