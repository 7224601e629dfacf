"""Complete a step whose micro-batches several processes have computed: what they did, and the sum of their gradients.

Each process holds the whole adapter and makes the same update. Their micro-batches are those of one process, and so
are the losses, which are divided by the trained tokens of the whole step; only the order of the sum differs.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from transformers import set_seed

from qlora_cli.ranks.group import ProcessGroup
from qlora_cli.training.loss_model import PendingMetrics
from qlora_cli.training.resuming.loop_state import Generators, generator_states, set_generators

MOST_PENDING = 256  # batches of an evaluation; each has a tensor on the device until it is read


@dataclass(frozen=True, kw_only=True)
class StepFigures:
    """What all processes did in a step.

    Attributes:
        losses: The losses of the micro-batches, process by process.
        metrics: The metrics of the micro-batches, in the same order.
        num_tokens: The tokens of all, without padding.
        of_peers: The random generators of the processes after the first, by rank, as the step left them.
    """

    losses: list[float]
    metrics: list[dict[str, float]]
    num_tokens: int
    of_peers: list[Generators]


@dataclass(frozen=True, kw_only=True)
class _Share:
    """What one process did in a step; `has_gradient` tells it of each trained weight."""

    losses: list[float]
    metrics: list[dict[str, float]]
    num_tokens: int
    has_gradient: list[bool]
    generators: Generators


class StepRecorder:
    """Collects the losses and metrics of a step's micro-batches, which stay on the device until it ends.

    `metrics` and `losses` are those of this process that were not read yet.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self.metrics = PendingMetrics()
        self.losses: list[torch.Tensor] = []
        self._group = group
        self._shared: StepFigures | None = None

    def share(self, model: torch.nn.Module) -> None:
        """With several processes, sum the gradients of `model`, and keep what all did for `read`.

        A weight that no process has used has no gradient afterwards, either.
        """
        if self._group.size == 1:
            return
        weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
        losses, metrics, num_tokens = self._read()
        own = _Share(
            losses=losses,
            metrics=metrics,
            num_tokens=num_tokens,
            has_gradient=[weight.grad is not None for weight in weights],
            generators=generator_states(),
        )
        shares = self._group.exchange(own)
        is_used = map(any, zip(*(share.has_gradient for share in shares), strict=True))
        self._group.add([_gradient_of(weight) for weight, used in zip(weights, is_used, strict=True) if used])
        self._shared = StepFigures(
            losses=[loss for share in shares for loss in share.losses],
            metrics=[of_one for share in shares for of_one in share.metrics],
            num_tokens=sum(share.num_tokens for share in shares),
            of_peers=[share.generators for share in shares[1:]],
        )

    def read(self, norm: torch.Tensor) -> tuple[float, StepFigures]:
        """Return the value of the gradients' norm and the figures of the step, and forget them."""
        shared, self._shared = self._shared, None
        if shared is not None:
            return float(norm), shared
        self.losses.append(norm)  # in the same transfer
        (*losses, value), metrics, num_tokens = self._read()
        return value, StepFigures(losses=losses, metrics=metrics, num_tokens=num_tokens, of_peers=[])

    def _read(self) -> tuple[list[float], list[dict[str, float]], int]:
        num_tokens = self.metrics.num_tokens
        metrics, losses = self.metrics.read(*self.losses)
        self.losses.clear()
        return losses, metrics, num_tokens


class EvaluationRecorder:
    """Collects the losses and metrics of an evaluation; `metrics` are those that were not read yet."""

    def __init__(self, group: ProcessGroup) -> None:
        self.metrics = PendingMetrics()
        self._group = group
        self._losses: list[tuple[torch.Tensor, int]] = []  # summed over items, and the number of these
        self._read: list[dict[str, float]] = []

    def add(self, total: torch.Tensor, num_items: int) -> None:
        """Add the loss of a batch, summed over its trained tokens, or its rows; `metrics` has its metrics already."""
        self._losses.append((total, num_items))
        if len(self.metrics) >= MOST_PENDING:
            self._read += self.metrics.read()[0]

    def end(self) -> tuple[float, list[dict[str, float]]] | None:
        """Return the mean loss of an item and the metrics of all processes, and forget them; None without a batch."""
        if not self._losses:
            return None
        totals, numbers = zip(*self._losses, strict=True)
        own = float(torch.stack(totals).sum()), sum(numbers), [*self._read, *self.metrics.read()[0]]
        self.clear()
        sums, counts, metrics = zip(*self._group.exchange(own), strict=True)
        return sum(sums) / max(1, sum(counts)), list(chain.from_iterable(metrics))

    def clear(self) -> None:
        """Forget the batches."""
        self._losses.clear()
        self._read.clear()
        self.metrics.clear()


@contextmanager
def unused_kept(model: torch.nn.Module) -> Iterator[None]:
    """A context in which weights without a gradient get none: what is computed in it trains no token."""
    unused = [weight for weight in model.parameters() if weight.requires_grad and weight.grad is None]
    yield
    for weight in unused:
        weight.grad = None


def _gradient_of(weight: torch.Tensor) -> torch.Tensor:
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    return weight.grad


def draw_apart(group: ProcessGroup, seed: int, step: int, of_peers: Sequence[Generators]) -> None:
    """Give the random generators of this process states of its own, or all would drop out the same values.

    They are those of before, if as many processes ran until `step`; the first process keeps what it has.
    """
    if group.is_first:
        return
    if len(of_peers) == group.size - 1:
        set_generators(of_peers[group.rank - 1])
    else:
        set_seed(int(np.random.SeedSequence([seed, step, group.rank]).generate_state(1)[0]))
