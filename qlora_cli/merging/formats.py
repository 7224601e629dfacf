"""Where each format of a merged model is written, and what is checked and written for it.

All of them are made from the 16-bit model in the format of transformers. One format is written into the output itself,
several into a directory each.
"""

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from qlora_cli.events import Noted, Reporter
from qlora_cli.merging.exports.converter import Converter, find_converter
from qlora_cli.merging.exports.gguf import check_gguf, export_gguf
from qlora_cli.merging.exports.nf4 import check_nf4, export_nf4
from qlora_cli.merging.exports.ollama import check_ollama, write_modelfile
from qlora_cli.merging.inputs import Inputs
from qlora_cli.merging.laboratory import Laboratory
from qlora_cli.merging.request import MergeRequest
from qlora_cli.merging.result import Divergence
from qlora_cli.settings.choices import ExportFormat
from qlora_cli.units import format_bytes, format_count

MODEL = "model"  # the 16-bit model, where it is none of the formats that were asked for
NF4_SHARE, GGUF_SHARE = 0.4, 1.0  # of the 16-bit weights, at most


@dataclass(frozen=True, kw_only=True)
class Formats:
    """The formats of a request. `converter` is llama.cpp's, if it is needed."""

    request: MergeRequest
    converter: Converter | None

    @classmethod
    def of(cls, request: MergeRequest) -> "Formats":
        """Return the formats that were asked for.

        Raises:
            MissingDependencyError: what converts to one of them is not here.
        """
        needs_it = ExportFormat.GGUF in request.formats
        return cls(request=request, converter=find_converter(request.llama_cpp) if needs_it else None)

    def check(self, inputs: Inputs, reporter: Reporter) -> None:
        """Check that the model can be written in them, and note what will be different.

        Raises:
            ModelError: it can't.
        """
        trust = self.request.trust_remote_code
        if ExportFormat.NF4 in self.request.formats:
            notes = check_nf4(inputs.source.path, trust_remote_code=trust, device=self.request.device)
            for note in notes:
                reporter.report(Noted(message=note))
        if self.converter is not None:
            check_gguf(inputs.source.path, inputs.tokenizer.tokenizer, self.converter, reporter)
        if ExportFormat.OLLAMA in self.request.formats:
            check_ollama(inputs.tokenizer.tokenizer)

    def places(self, output: Path) -> Mapping[str, Path]:
        """Return where each format is in `output`."""
        return {one.value: self._place(one, output) for one in self.request.formats}

    def model(self, output: Path) -> Path:
        """Return where the 16-bit model is written: the place of a format that is it, else one of its own."""
        for one in (ExportFormat.HF, ExportFormat.OLLAMA):
            if one in self.request.formats and not (one == ExportFormat.OLLAMA and self._has_gguf):
                return self._place(one, output)
        return output / MODEL

    def pushed(self, output: Path) -> Path:
        """Return what is pushed to the hub: the first format that was asked for."""
        return self._place(self.request.formats[0], output)

    def disk_bytes(self, model_bytes: int) -> int:
        """Return the room that all formats take while they are written."""
        shares = {ExportFormat.NF4: NF4_SHARE, ExportFormat.GGUF: GGUF_SHARE}
        return model_bytes + sum(int(model_bytes * shares.get(one, 0)) for one in self.request.formats)

    @property
    def _has_gguf(self) -> bool:
        return ExportFormat.GGUF in self.request.formats

    def _place(self, one: ExportFormat, output: Path) -> Path:
        return output if len(self.request.formats) == 1 else output / one.value

    def write(self, output: Path, name: str, laboratory: Laboratory | None, reporter: Reporter) -> Divergence | None:
        """Write all formats but the 16-bit model, which is there; return how far NF4 is from it, if it is compared."""
        model, nf4 = self.model(output), None
        trust, device = self.request.trust_remote_code, self.request.device
        if ExportFormat.NF4 in self.request.formats:
            place = self._aside(ExportFormat.NF4, output)
            written = export_nf4(model, place, trust_remote_code=trust, device=device, reporter=reporter)
            reporter.report(Noted(message=f"in NF4 the weights take {written.times_smaller:.2f} times less"))
            if laboratory is not None:
                nf4 = laboratory.compare(laboratory.stored(model), laboratory.quantized(place))
        if self.converter is not None:
            file = self._aside(ExportFormat.GGUF, output) / f"{name}.gguf"
            file.parent.mkdir(exist_ok=True)
            made = export_gguf(model, file, self.converter, self.request.gguf_type, reporter, trust_remote_code=trust)
            told = (
                f"{made.architecture}, {format_count(made.num_parameters)} parameters, {format_bytes(made.num_bytes)}"
            )
            reporter.report(Noted(message=f"{file.name} was opened and holds {told}"))
        if ExportFormat.OLLAMA in self.request.formats:
            place = self._place(ExportFormat.OLLAMA, output)
            place.mkdir(exist_ok=True)
            source = self._source(output, name)
            write_modelfile(model, place / "Modelfile", source=source, trust_remote_code=trust, reporter=reporter)
        if model == output / MODEL:
            self._move_up(output, model)
        return nf4

    def _aside(self, one: ExportFormat, output: Path) -> Path:
        """Return where a format is written: if it is the only one, beside the model that it is made from."""
        place = self._place(one, output)
        return output / one.value if place == output else place

    def _source(self, output: Path, name: str) -> str:
        """Return what Ollama's file names as the model, seen from its place."""
        place = self._place(ExportFormat.OLLAMA, output)
        if self._has_gguf:
            return os.path.relpath(self._place(ExportFormat.GGUF, output) / f"{name}.gguf", place)
        return os.path.relpath(self.model(output), place)

    def _move_up(self, output: Path, model: Path) -> None:
        """Remove the 16-bit model, which was not asked for, and put a single format where it was asked for."""
        shutil.rmtree(model)
        if len(self.request.formats) == 1:
            aside = self._aside(self.request.formats[0], output)
            for path in sorted(aside.iterdir()):
                path.rename(output / path.name)
            aside.rmdir()
