"""Where each format of a merged model is written, and what is checked and written for it.

All of them are made from the 16-bit model in the format of transformers. One format is written into the output itself,
several into a directory each.
"""

import shutil
from collections.abc import Mapping
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

MODEL = "model"  # the 16-bit model, where it is part of none of the formats that were asked for


@dataclass(frozen=True, kw_only=True)
class Formats:
    """The formats of a request, in the order that they are written in."""

    asked: tuple[ExportFormat, ...]
    by_name: Mapping[ExportFormat, Format]

    @classmethod
    def of(cls, request: MergeCommandSettings) -> "Formats":
        """Return the formats that were asked for.

        Raises:
            MissingDependencyError: what converts to one of them is not here.
            ModelError: the first is to be pushed, and names files of another, which are not.
        """
        made = {name: kind(request) for name, kind in FORMATS.items() if name in request.merge.formats}
        first = request.merge.formats[0]
        if request.merge.push_to_hub is not None and (other := made[first].named) is not None:
            raise ModelError(
                f"of several formats the first is pushed: {first}, whose files name those of {other}",
                hint=f"Give --format {other} before --format {first}, or leave one of them out.",
                setting="merge.push_to_hub",
            )
        return cls(asked=request.merge.formats, by_name=made)

    def check(self, inputs: Inputs, reporter: Reporter) -> None:
        """Check that the model can be written in them, and note what will be different.

        Raises:
            ModelError: it can't.
        """
        for one in self.by_name.values():
            one.check(inputs, reporter)

    def places(self, output: Path) -> Mapping[ExportFormat, Path]:
        """Return where each format is in `output`."""
        return {name: self._place(name, output) for name in self.asked}

    def model(self, output: Path) -> Path:
        """Return where the 16-bit model is written: the place of the first format that holds it, or its own."""
        holding = (self._place(name, output) for name, one in self.by_name.items() if one.holds_model)
        return next(holding, output / MODEL)

    def pushed(self, output: Path) -> tuple[Path, tuple[str, ...]]:
        """Return what is pushed to the hub: where the first format is that was asked for, and the files of it."""
        first = self.asked[0]
        return self._place(first, output), (*self.by_name[first].files, *ABOUT)

    def disk_bytes(self, model_bytes: int) -> int:
        """Return the disk space that all formats take while they are written."""
        return model_bytes + sum(int(model_bytes * one.share) for one in self.by_name.values())

    def _place(self, name: ExportFormat, output: Path) -> Path:
        return output if len(self.asked) == 1 else output / name.value

    def write(
        self, output: Path, name: str, comparer: ModelComparer | None, reporter: Reporter
    ) -> Mapping[str, Requantized]:
        """Write all formats, given the 16-bit model; return how far those that are quantized are from it, by name."""
        model, found = self.model(output), {}
        for kind, one in self.by_name.items():
            export = Export(
                model=model,
                target=self._place(kind, output) if one.holds_model else self._aside(kind, output),
                name=name,
                places=self.places(output),
                comparer=comparer,
                reporter=reporter,
            )
            divergence = one.write(export)
            if one.quantized_to is not None:
                found[kind.value] = Requantized(to=one.quantized_to, divergence=divergence)
        if model == output / MODEL:
            self._move_up(output, model)
        return found

    def _aside(self, name: ExportFormat, output: Path) -> Path:
        """Return where a format is written: if it is the only one, next to the model that it is made from."""
        place = self._place(name, output)
        return output / name.value if place == output else place

    def _move_up(self, output: Path, model: Path) -> None:
        """Remove the 16-bit model, which was not asked for, and put a single format where it was asked for."""
        shutil.rmtree(model)
        if len(self.asked) == 1:
            aside = self._aside(self.asked[0], output)
            for path in sorted(aside.iterdir()):
                path.rename(output / path.name)
            aside.rmdir()
