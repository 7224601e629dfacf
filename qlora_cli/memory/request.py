"""What is asked of a prediction, as plain values. Imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from qlora_cli.memory.gpus import Gpu
from qlora_cli.settings.models import EstimateSettings, InspectMemorySettings, PredictionSettings
from qlora_cli.settings.resolve import Resolved

SHORTEST = 512  # tokens, where a picture begins
LEAST_LENGTH = 8  # that data.max_length takes


@dataclass(frozen=True, kw_only=True)
class MemoryRequest:
    """What the settings of `qlora inspect-memory` ask, the words in them read.

    Attributes:
        gpus: In the order in which they were named; empty if none was.
        sweep: The values to predict for, rising, by the flag's name without dashes; every combination of them. Empty
            for `max-length`: those of a picture, up to the length of the run, which `swept` fills in.
    """

    asked: Resolved[InspectMemorySettings]
    gpus: tuple[Gpu, ...] = ()
    sweep: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def prediction(self) -> PredictionSettings:
        """What is asked besides the run."""
        return self.asked.settings.inspect_memory

    @property
    def solve(self) -> tuple[str, ...]:
        """The settings to find the largest value of, by the flag's name without dashes."""
        return tuple(setting.value for setting in self.prediction.solve)

    def swept(self, settings: EstimateSettings) -> dict[str, tuple[int, ...]]:
        """Return what is swept around a run with these settings, every value known."""
        return {name: values or lengths_up_to(settings.data.max_length) for name, values in self.sweep.items()}


def does_evaluate(settings: EstimateSettings, asked: bool | None) -> bool:
    """Whether an evaluation batch is run too: as asked, else if `train` would evaluate with these settings."""
    if asked is not None:
        return asked
    data = settings.data
    held_out = data.eval_dataset is not None or data.eval_split is not None
    return held_out or settings.training.eval_steps is not None


def doubled(first: int, last: int) -> tuple[int, ...]:
    """Return `first`, twice that, and so on, up to `last`, which is included whatever the others come to."""
    values = []
    while first < last:
        values.append(first)
        first *= 2
    return (*values, last)


def lengths_up_to(longest: int) -> tuple[int, ...]:
    """Return the lengths of a picture: from 512 tokens, or less where rows are short."""
    return doubled(min(SHORTEST, max(LEAST_LENGTH, longest // 8)), longest)
