"""Rank the cards on which a run fits, by what it costs or how long it takes. Imports no torch."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from qlora_cli.errors import HardwareError, QloraError
from qlora_cli.memory.costs.run_time import with_run
from qlora_cli.memory.fitting.suggestions import YES, judge_fit
from qlora_cli.memory.gpus import Gpu
from qlora_cli.memory.prediction import Estimate, RankedCard, RunFigures, figures_of_run
from qlora_cli.memory.request import Predict
from qlora_cli.memory.run_batches import RunBatches
from qlora_cli.settings.choices import CardOrder, Checkpointing, Strategy
from qlora_cli.settings.models import EstimateSettings
from qlora_cli.settings.settle import with_settings

CHECKPOINTING = "training.gradient_checkpointing"
MAX_RANKED = 5  # cards whose whole run is predicted, each of which takes seconds


@dataclass(frozen=True, kw_only=True)
class PlannedOnCard:
    """A run as it is planned for a card: the settings, their estimate, and the seconds of a step with its rows."""

    settings: EstimateSettings
    estimate: Estimate
    step_seconds: float


# Plans a run for a card whose speed is known.
PlanOnCard = Callable[[EstimateSettings, Gpu], PlannedOnCard]
# Returns the bytes of a card that the weights of a run, and the CUDA context, take at least.
LeastBytes = Callable[[EstimateSettings, Gpu], int]


def rank_cards(
    runs: Sequence[EstimateSettings],
    cards: Sequence[Gpu],
    order: CardOrder,
    prices: Mapping[str, float],
    *,
    plan: PlanOnCard,
    predict: Predict,
    least_bytes: LeastBytes,
    batches_of: Callable[[EstimateSettings], RunBatches],
) -> tuple[RankedCard, ...]:
    """Return the first few of the `cards` on which the run fits with its whole error band, best first.

    `runs` are those to try on a card, one after another: the run on one of it, then on several. `prices` are those of
    an hour, by the names of cards; with `CardOrder.COST`, each of the cards has one. Cards are compared by a step
    first, and the best of them by the whole run.
    """

    def fitting_on(gpu: Gpu) -> PlannedOnCard | None:
        planned = (plan(run, gpu) for run in runs if _may_fit(run, gpu, predict, least_bytes))
        return next((run for run in planned if judge_fit(run.estimate, gpu).fits == YES), None)

    def weight(gpu: Gpu, run: PlannedOnCard) -> float:
        return run.settings.training.num_gpus * prices[gpu.name] if order == CardOrder.COST else 1.0

    fitting = [(gpu, run) for gpu in cards if (run := fitting_on(gpu)) is not None]
    fitting.sort(key=lambda pair: weight(*pair) * pair[1].step_seconds)
    ranked = [
        _ranked(gpu, run, _whole_run(gpu, run, predict, batches_of, prices.get(gpu.name)), prices.get(gpu.name))
        for gpu, run in fitting[:MAX_RANKED]
    ]
    by_cost = order == CardOrder.COST
    return tuple(sorted(ranked, key=lambda card: (card.cost or 0.0) if by_cost else card.run_seconds))


def _may_fit(settings: EstimateSettings, gpu: Gpu, predict: Predict, least_bytes: LeastBytes) -> bool:
    """Return whether the run fits in the way that takes the least memory, which is quicker than to plan it."""
    asked = settings.training.gradient_checkpointing
    is_open = asked in (Checkpointing.AUTO, Checkpointing.SELECTIVE)
    leanest = (Checkpointing.ON, Checkpointing.OFFLOAD) if is_open else (asked,)
    try:
        if least_bytes(settings, gpu) > gpu.usable_bytes:
            return False
        tried = (predict(with_settings(settings, {CHECKPOINTING: kind}), gpu) for kind in leanest)
        return any(judge_fit(estimate, gpu).fits == YES for estimate in tried)
    except HardwareError:  # bf16 before Ampere, for example
        return False
    except QloraError:  # a model without checkpointing: the plan knows what is left
        return True


def _whole_run(
    gpu: Gpu,
    run: PlannedOnCard,
    predict: Predict,
    batches_of: Callable[[EstimateSettings], RunBatches],
    price: float | None,
) -> RunFigures:
    figures = figures_of_run(run.estimate)
    return with_run(figures, run.settings, batches_of(run.settings), gpu, predict, price=price)


def _ranked(gpu: Gpu, run: PlannedOnCard, figures: RunFigures, price: float | None) -> RankedCard:
    assert figures.run_seconds is not None, f"{gpu.name} has rates"
    assert figures.run_seconds_low is not None
    assert figures.run_seconds_high is not None
    training = run.settings.training
    return RankedCard(
        gpu=gpu.name,
        num_gpus=training.num_gpus,
        strategy=Strategy.FSDP.value if training.shards_base else Strategy.DDP.value,
        price=price,
        run_seconds=figures.run_seconds,
        run_seconds_low=figures.run_seconds_low,
        run_seconds_high=figures.run_seconds_high,
        cost=figures.cost,
        cost_low=figures.cost_low,
        cost_high=figures.cost_high,
        energy_wh=figures.energy_wh,
        process_bytes=figures.process_bytes,
        process_high_bytes=figures.process_high_bytes,
        gradient_checkpointing=run.estimate.gradient_checkpointing,
        micro_batch_tokens=training.micro_batch_tokens,
    )
