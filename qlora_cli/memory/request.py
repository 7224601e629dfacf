"""What is asked of a prediction, as plain values. Imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from qlora_cli.memory.gpus import Gpu
from qlora_cli.settings.choices import Recipe, SdpaBackend
from qlora_cli.settings.models import EstimateSettings

SHORTEST = 512  # tokens, where a picture begins
LEAST_LENGTH = 8  # that data.max_length takes


@dataclass(frozen=True, kw_only=True)
class MemoryRequest:
    """A run, the GPUs that it is to fit on, and what else is asked about it.

    Attributes:
        gpus: In the order in which they were named; empty if none was.
        sdpa_backend: What `scaled_dot_product_attention` is pinned to: `flash`, `efficient` or `math`. `auto`: the
            one that the GPU takes.
        evaluate: Whether an evaluation batch is run too; None: if `train` would evaluate with these settings.
        solve: The settings to find the largest value of, by the flag's name without dashes.
        sweep: The values to predict for, rising, by the flag's name without dashes; every combination of them. Empty
            for `max-length`: those of a picture, up to the length of the run, which `swept` fills in.
    """

    settings: EstimateSettings
    gpus: tuple[Gpu, ...] = ()
    recipe: Recipe = Recipe.QLORA
    sdpa_backend: SdpaBackend = SdpaBackend.AUTO
    evaluate: bool | None = None
    solve: tuple[str, ...] = ()
    sweep: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def evaluates(self) -> bool:
        """Whether an evaluation batch is run too. Of a run that is named, its settings decide."""
        if self.evaluate is not None:
            return self.evaluate
        data = self.settings.data
        held_out = data.eval_dataset is not None or data.eval_split is not None
        return held_out or self.settings.training.eval_steps is not None

    def swept(self, settings: EstimateSettings) -> dict[str, tuple[int, ...]]:
        """Return what is swept around a run with these settings, every value known."""
        return {name: values or lengths_up_to(settings.data.max_length) for name, values in self.sweep.items()}


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
