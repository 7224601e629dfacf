"""The requested formats of a merged model: check them, write them, and choose their directories.

All are made from the 16-bit model in transformers' format. A single format is written into the output itself,
several into one directory each.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qlora_cli.errors import ModelError
from qlora_cli.events import Reporter
from qlora_cli.merging.exports.all_formats import FORMATS
from qlora_cli.merging.exports.export_format import ABOUT, Export, Format
from qlora_cli.merging.merge_result import Requantized
from qlora_cli.merging.planning.inputs import Inputs
from qlora_cli.merging.verifying.comparison import ModelComparer
from qlora_cli.settings.choices import ExportFormat
from qlora_cli.settings.models import MergeCommandSettings

MODEL = "model"  # the 16-bit model, if no requested format includes it


def directories_of(formats: Sequence[ExportFormat], output: Path) -> Mapping[ExportFormat, Path]:
    """Return the directory of each format in `output`: a single one is written into the output itself."""
    return {name: output if len(formats) == 1 else output / name.value for name in formats}


@dataclass(frozen=True, kw_only=True)
class RequestedFormats:
    """The formats of a request, in the order in which they are written."""

    asked: tuple[ExportFormat, ...]
    by_name: Mapping[ExportFormat, Format]

    @classmethod
    def of(cls, request: MergeCommandSettings) -> "RequestedFormats":
        """Return the formats of `request`.

        Raises:
            MissingDependencyError: the converter of a format is missing.
            ModelError: the first is to be pushed, and refers to files of another, which is not.
        """
        made = {name: kind(request) for name, kind in FORMATS.items() if name in request.merge.formats}
        first = request.merge.formats[0]
        if request.merge.push_to_hub is not None and (other := made[first].depends_on) is not None:
            raise ModelError(
                f"of several formats the first is pushed: {first}, whose files name those of {other}",
                hint=f"Give --format {other} before --format {first}, or leave one of them out.",
                setting="merge.push_to_hub",
            )
        return cls(asked=request.merge.formats, by_name=made)

    def check(self, inputs: Inputs, reporter: Reporter) -> None:
        """Check that the model can be written in all of them, and note differences.

        Raises:
            ModelError: it can't.
        """
        for one in self.by_name.values():
            one.check(inputs, reporter)

    def directories(self, output: Path) -> Mapping[ExportFormat, Path]:
        """Return the directory of each format in `output`."""
        return directories_of(self.asked, output)

    def model(self, output: Path) -> Path:
        """Return the directory of the 16-bit model: that of the first format that includes it, or its own."""
        holding = (self._directory(name, output) for name, one in self.by_name.items() if one.holds_model)
        return next(holding, output / MODEL)

    def pushed(self, output: Path) -> tuple[Path, tuple[str, ...]]:
        """Return the directory and the file patterns to push to the hub: those of the first requested format."""
        first = self.asked[0]
        return self._directory(first, output), (*self.by_name[first].files, *ABOUT)

    def disk_bytes(self, model_bytes: int) -> int:
        """Return the disk space that all formats need while they are written."""
        return model_bytes + sum(int(model_bytes * one.share) for one in self.by_name.values())

    def _directory(self, name: ExportFormat, output: Path) -> Path:
        return self.directories(output)[name]

    def write(
        self, output: Path, name: str, comparer: ModelComparer | None, reporter: Reporter
    ) -> Mapping[str, Requantized]:
        """Write all formats from the 16-bit model; return those that may differ from it, by name."""
        model, requantized = self.model(output), {}
        for kind, one in self.by_name.items():
            export = Export(
                model=model,
                target=self._directory(kind, output) if one.holds_model else self._working_directory(kind, output),
                name=name,
                directories=self.directories(output),
                comparer=comparer,
                reporter=reporter,
            )
            divergence = one.write(export)
            if one.quantized_to is not None or divergence is not None:
                requantized[kind.value] = Requantized(to=one.quantized_to, divergence=divergence)
        if model == output / MODEL:
            self._move_up(output, model)
        return requantized

    def _working_directory(self, name: ExportFormat, output: Path) -> Path:
        """Return the directory that a format is written to: a single one is first written next to the model."""
        directory = self._directory(name, output)
        return output / name.value if directory == output else directory

    def _move_up(self, output: Path, model: Path) -> None:
        """Remove the 16-bit model, which was not requested, and move a single format into the output itself."""
        shutil.rmtree(model)
        if len(self.asked) == 1:
            source = self._working_directory(self.asked[0], output)
            for path in sorted(source.iterdir()):
                path.rename(output / path.name)
            source.rmdir()
