"""The merged model in the format of transformers, which all others are made from: it is there already."""

from qlora_cli.events import Reporter
from qlora_cli.merging.exports.export_format import Export, Format
from qlora_cli.merging.merge_result import Divergence
from qlora_cli.merging.planning.inputs import Inputs
from qlora_cli.settings.choices import ExportFormat


class HfFormat(Format):
    """Safetensors, configs and tokenizer."""

    name = ExportFormat.HF

    @property
    def holds_model(self) -> bool:
        """It is the model."""
        return True

    def check(self, inputs: Inputs, reporter: Reporter) -> None:
        """Every model that can be merged can be written so."""

    def write(self, export: Export) -> Divergence | None:
        """There is nothing more to write."""
        del export
        return None
