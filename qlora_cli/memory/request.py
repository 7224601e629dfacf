"""The request for a prediction, as plain values. Imports no torch."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from qlora_cli.memory.gpus import GPUS, Gpu
from qlora_cli.memory.prediction import Estimate
from qlora_cli.memory.run_batches import MIN_LENGTH, ReadRows
from qlora_cli.settings.choices import CardOrder, Solvable
from qlora_cli.settings.models import EstimateSettings, InspectMemorySettings, PredictionSettings
from qlora_cli.settings.resolve import Resolved

# Predicts a run on a GPU; raises a QloraError if the settings can't be combined.
Predict = Callable[[EstimateSettings, Gpu], Estimate]

PLOT_START = 512  # tokens


@dataclass(frozen=True, kw_only=True)
class MemoryRequest:
    """The settings of `qlora inspect-memory`, with GPUs and sweeps parsed.

    Attributes:
        gpus: In the order in which they were named; empty if none was.
        sweep: The values to predict for, rising, keyed by the flag's name without dashes, in every combination.
            No values for `max-length` mean those of a plot, up to the length of the run, which `swept` fills in.
        prices: Of an hour, by the names of cards in the catalogue.
        rows: Those of the data set that was named; None if none was.
    """

    asked: Resolved[InspectMemorySettings]
    gpus: tuple[Gpu, ...] = ()
    sweep: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    prices: Mapping[str, float] = field(default_factory=dict)
    rows: ReadRows | None = None

    @property
    def prediction(self) -> PredictionSettings:
        """The settings of the prediction itself, not of the run."""
        return self.asked.settings.inspect_memory

    @property
    def is_on_host(self) -> bool:
        """Whether the run is on this machine's CPU, which is then the only device that was named."""
        return any(gpu.is_host for gpu in self.gpus)

    @property
    def solve(self) -> tuple[str, ...]:
        """The settings whose largest value is to be found, by the flag's name without dashes."""
        return tuple(setting.value for setting in self.prediction.solve if setting != Solvable.GPU)

    @property
    def card_order(self) -> CardOrder | None:
        """By what cards are to be ranked; None if they are not."""
        if Solvable.GPU not in self.prediction.solve:
            return None
        return self.prediction.by or (CardOrder.COST if self.prices else CardOrder.TIME)

    @property
    def ranked_gpus(self) -> tuple[Gpu, ...]:
        """The cards to rank: those that were named, or have a price, or all that PyTorch has kernels for."""
        if self.gpus:
            return self.gpus
        return tuple(gpu for gpu in GPUS if (gpu.name in self.prices if self.prices else gpu.has_kernels))

    def swept(self, settings: EstimateSettings) -> dict[str, tuple[int, ...]]:
        """Return the sweep around a run with these settings, with all values filled in."""
        return {name: values or lengths_up_to(settings.data.max_length) for name, values in self.sweep.items()}


def runs_evaluation(settings: EstimateSettings, asked: bool | None) -> bool:
    """Return whether an evaluation batch is run as well: as `asked`, else if `train` would evaluate."""
    if asked is not None:
        return asked
    data = settings.data
    held_out = data.eval_dataset is not None or data.eval_split is not None
    return held_out or settings.training.eval_steps is not None


def doubled(first: int, last: int) -> tuple[int, ...]:
    """Return `first`, twice that, and so on up to `last`, which is always included."""
    values = []
    while first < last:
        values.append(first)
        first *= 2
    return (*values, last)


def lengths_up_to(longest: int) -> tuple[int, ...]:
    """Return the lengths of a plot, in tokens: from 512 on, or from fewer if `longest` is short."""
    return doubled(min(PLOT_START, max(MIN_LENGTH, longest // 8)), longest)
