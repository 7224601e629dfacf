"""What a format of the merged model is: what it refuses, what it takes, how it is written, told and pushed."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from qlora_cli.events import Reporter
from qlora_cli.merging.merge_result import Divergence
from qlora_cli.merging.planning.inputs import Inputs
from qlora_cli.merging.verifying.comparison import ModelComparer
from qlora_cli.model_files.merge_record import MERGE_FILE
from qlora_cli.settings.choices import ExportFormat
from qlora_cli.settings.models import MergeCommandSettings

# The files of a checkpoint for transformers; what it was made of may run code of its own.
CHECKPOINT = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken")
CODE = "*.py"
# Comes with every format: the card, the record of the merge, the licence of the base.
ABOUT = ("README.md", MERGE_FILE, "LICEN[CS]E*", "NOTICE*", "USE_POLICY*")


@dataclass(frozen=True, kw_only=True)
class Export:
    """What a format is written from, and where.

    Attributes:
        model: The merged 16-bit model in the format of transformers.
        target: The directory to write to, which may not be there yet.
        name: What the result is called.
        places: The directory of each format that was asked for.
        comparer: What compares models; None if nothing is to be compared.
    """

    model: Path
    target: Path
    name: str
    places: Mapping[ExportFormat, Path]
    comparer: ModelComparer | None
    reporter: Reporter


class Format(ABC):
    """A format, as one merge asks for it; making one checks that what it needs is installed.

    Attributes:
        name: What it is asked for by, and what its directory is called.
        share: The disk space that it takes at most, as a share of the 16-bit model.
        library: What loads it, as model cards call that.
    """

    name: ClassVar[ExportFormat]
    share: ClassVar[float] = 0.0
    library: ClassVar[str] = "transformers"

    def __init__(self, request: MergeCommandSettings) -> None:
        """Take what was asked for.

        Raises:
            MissingDependencyError: what converts to it is not here.
        """
        self.request = request

    @property
    def holds_model(self) -> bool:
        """Whether the 16-bit model itself is part of it."""
        return False

    @property
    def named(self) -> ExportFormat | None:
        """The other one of the formats asked for without whose files this one is of no use; by default none."""
        return None

    @property
    def quantized_to(self) -> str | None:
        """What the weights are quantized to anew, in words; None if they are those of the 16-bit model."""
        return None

    @property
    def files(self) -> tuple[str, ...]:
        """The patterns of the files that it is made of, all of which are pushed; by default those of a checkpoint."""
        return (*CHECKPOINT, CODE) if self.request.model.trust_remote_code else CHECKPOINT

    @abstractmethod
    def check(self, inputs: Inputs, reporter: Reporter) -> None:
        """Check, before anything is merged, that the model can be written in it, and note what will be different.

        Raises:
            ModelError: it can't.
        """

    @abstractmethod
    def write(self, export: Export) -> Divergence | None:
        """Write it; return how far it is from the 16-bit model, if that was to be measured.

        Raises:
            QloraError: it can't be written, or is not the model in the end.
        """
