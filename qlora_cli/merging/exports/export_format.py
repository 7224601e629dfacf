"""The interface of an export format: its checks, its disk space, how it is written, and which files are pushed."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
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

# The files of a checkpoint for transformers; the base may need its own code.
CHECKPOINT = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken")
CODE = "*.py"
# The files that accompany every format: the card, the record of the merge, the licence of the base.
ABOUT = ("README.md", MERGE_FILE, "LICEN[CS]E*", "NOTICE*", "USE_POLICY*")


@dataclass(frozen=True, kw_only=True)
class Export:
    """The inputs of an export: the model, and the directories to write to.

    Attributes:
        model: The merged 16-bit model in transformers' format.
        target: The directory to write to, which need not exist yet.
        name: The name of the result.
        directories: The directory of each requested format.
        comparer: Compares models; None if nothing is compared.
    """

    model: Path
    target: Path
    name: str
    directories: Mapping[ExportFormat, Path]
    comparer: ModelComparer | None
    reporter: Reporter


class Format(ABC):
    """A format of one merge; its construction checks that its dependencies are installed.

    Attributes:
        name: Its name in the settings, and the name of its directory.
        library: The library that loads it, as named in model cards.
        content: What it is of the base, in model cards.
    """

    name: ClassVar[ExportFormat]
    library: ClassVar[str] = "transformers"
    content: ClassVar[str] = "with the adapter merged into its weights"

    def __init__(self, request: MergeCommandSettings) -> None:
        """Store the request.

        Raises:
            MissingDependencyError: its converter is not installed.
        """
        self.request = request

    @staticmethod
    def serving(path: Path) -> Sequence[str]:
        """Return the command, word by word, that runs the model in `path`."""
        return ("qlora", "chat", str(path))

    @property
    def share(self) -> float:
        """An upper bound of the disk space that writing it takes, as a share of the 16-bit model's."""
        return 0.0

    @property
    def holds_model(self) -> bool:
        """Whether the format includes the 16-bit model itself."""
        return False

    @property
    def depends_on(self) -> ExportFormat | None:
        """Another requested format whose files this one refers to; by default none."""
        return None

    @property
    def quantized_to(self) -> str | None:
        """The format that the weights are requantized to, in words; None if they are those of the 16-bit model."""
        return None

    @property
    def files(self) -> tuple[str, ...]:
        """Patterns of its files, which are all pushed; by default those of a checkpoint."""
        return (*CHECKPOINT, CODE) if self.request.model.trust_remote_code else CHECKPOINT

    @abstractmethod
    def check(self, inputs: Inputs, reporter: Reporter) -> None:
        """Check before anything is merged that the model can be written in this format, and note differences.

        Raises:
            ModelError: it can't.
        """

    @abstractmethod
    def write(self, export: Export) -> Divergence | None:
        """Write the model; return its divergence from the 16-bit model, if that is measured.

        Raises:
            QloraError: it can't be written, or the result is not the model.
        """
