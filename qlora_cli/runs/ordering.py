"""The order of runs in a list, and which of them are in it."""

import math
from collections.abc import Iterable, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qlora_cli.runs.summary import RunSummary


class Order(StrEnum):
    """What runs are ordered by: their start, name or state, or a figure, of which the best comes first."""

    STARTED = "started"
    NAME = "name"
    STATE = "state"
    LOSS = "loss"
    BEST = "best"
    SPEED = "speed"
    MEMORY = "memory"


def selected(runs: Iterable["RunSummary"], words: Iterable[str]) -> list["RunSummary"]:
    """Return the runs that have all `words` in path, state, model or data, in any case."""
    lowered = [word.lower() for word in words]
    return [run for run in runs if all(word in _text_of(run) for word in lowered)]


def _text_of(run: "RunSummary") -> str:
    return "\n".join([str(run.path), run.state, run.model or "", *run.dataset]).lower()


def ordered(runs: Sequence["RunSummary"], by: Order) -> list["RunSummary"]:
    """Return runs in an order; those without a figure come last, and equal ones stay as they were."""
    if by == Order.STARTED:
        return list(runs)
    if by in (Order.NAME, Order.STATE):
        return sorted(runs, key=lambda run: str(run.path) if by == Order.NAME else run.state)
    return sorted(runs, key=lambda run: _figure_of(run, by))


def _figure_of(run: "RunSummary", by: Order) -> float:
    """Return a figure of which less is better."""
    if by == Order.SPEED:
        return -(run.tokens_per_second or -math.inf)
    figures = {
        Order.LOSS: run.loss,
        Order.BEST: run.best_loss,
        Order.MEMORY: run.peak_reserved_bytes or run.peak_host_bytes,
    }
    figure = figures[by]
    return math.inf if figure is None else figure
