"""The order of rows, as a sampler for PyTorch's data loader."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch.utils.data import Sampler

from qlora_cli.data.feeding.micro_batches import epoch_order
from qlora_cli.data.feeding.token_table import Numbers
from qlora_cli.settings.models import TrainingSettings


@dataclass(eq=False)
class RowOrder(Sampler[int]):
    """Draws the order of each epoch from the seed and the epoch alone, so that any epoch can be drawn again."""

    lengths: Numbers
    settings: TrainingSettings
    epoch: int = 0

    def __iter__(self) -> Iterator[int]:
        return iter(epoch_order(self.lengths, self.settings, self.epoch))

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        """Switch to another epoch; called by accelerate."""
        self.epoch = epoch
