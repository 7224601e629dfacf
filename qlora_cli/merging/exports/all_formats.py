"""All formats of a merged model, in the order in which they are written."""

from collections.abc import Mapping

from qlora_cli.merging.exports.export_format import Format
from qlora_cli.merging.exports.gguf import GgufFormat
from qlora_cli.merging.exports.gguf_lora import GgufLoraFormat
from qlora_cli.merging.exports.hf import HfFormat
from qlora_cli.merging.exports.nf4 import Nf4Format
from qlora_cli.merging.exports.ollama import OllamaFormat
from qlora_cli.settings.choices import ExportFormat

FORMATS: Mapping[ExportFormat, type[Format]] = {
    kind.name: kind
    for kind in (
        HfFormat,
        Nf4Format,
        GgufFormat,
        GgufLoraFormat,
        OllamaFormat,  # names the GGUF, if there is one
    )
}
