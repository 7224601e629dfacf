"""The best cards for a run: those on which it fits, by what it costs or how long it takes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_cli.errors import HardwareError, ModelError, QloraError
from qlora_cli.memory.fitting.card_ranking import MAX_RANKED, PlannedOnCard, rank_cards
from qlora_cli.memory.fitting.strategy import on_more_gpus
from qlora_cli.memory.gpus import GPUS, Gpu, find_gpu
from qlora_cli.memory.prediction import Estimate, Figures, RankedCard, StepTime
from qlora_cli.memory.run_batches import RunBatches
from qlora_cli.settings.choices import CardOrder, Strategy
from qlora_cli.settings.models import EstimateSettings
from qlora_cli.settings.settle import with_settings
from qlora_cli.timing.run_ratios import RunKey
from qlora_cli.units import GIB
from tests.support.models.predictions import COMPONENTS, FIGURES

SETTINGS = EstimateSettings.model_validate({"model": {"name": "m"}})
CARDS = tuple(gpu for gpu in GPUS if gpu.has_kernels)
NUM_STEPS = 90
BATCHES = RunBatches(num_steps=NUM_STEPS, by_tokens=((512, NUM_STEPS),))


def estimate(gpu: Gpu, seconds: float, process_bytes: int) -> Estimate:
    time = StepTime(
        micro_batch_seconds=seconds,
        update_seconds=0.0,
        step_seconds=seconds,
        step_seconds_low=0.75 * seconds,
        step_seconds_high=1.3 * seconds,
        tokens_per_second=1.0,
        tokens_per_second_low=1.0,
        tokens_per_second_high=1.0,
        limited_by="compute",
        device_seconds=seconds,
        host_seconds=0.0,
        rates="data sheet",
        key=RunKey(device=gpu.name, kind="nf4", limit="device", basis=""),
    )
    peaks = {field.name: getattr(FIGURES, field.name) for field in fields(Figures)}
    peaks |= {name: process_bytes for name in peaks if name.startswith("process")}
    return Estimate(
        gpu=gpu.name,
        dtype="bf16",
        attention_backends=(),
        gradient_checkpointing="on",
        predicted=Figures(**peaks),
        components=COMPONENTS,
        phases=(),
        paged_bytes=0,
        pinned_host_bytes=0,
        ruling_phase="backward",
        reason="",
        time=time,
    )


def ranked(
    cards: Sequence[Gpu],
    order: CardOrder,
    prices: Mapping[str, float],
    *,
    seconds: Mapping[str, float],
    process_bytes: int = 0,
    failures: Mapping[str, QloraError] | None = None,
    runs: Sequence[EstimateSettings] = (SETTINGS,),
    predicted_on: Callable[[int], None] = lambda _: None,
) -> tuple[RankedCard, ...]:
    """Rank `cards`; a run on one takes `process_bytes`, a sharded one 1 GiB on each and an equal part of the rest."""

    def predict(settings: EstimateSettings, gpu: Gpu) -> Estimate:
        predicted_on(settings.training.num_gpus)
        if failures and gpu.name in failures:
            raise failures[gpu.name]
        return estimate(gpu, seconds.get(gpu.name, 1.0), held_by(settings, process_bytes))

    def plan(settings: EstimateSettings, gpu: Gpu) -> PlannedOnCard:
        own = seconds.get(gpu.name, 1.0)
        taken = estimate(gpu, own, held_by(settings, process_bytes))
        return PlannedOnCard(settings=settings, estimate=taken, step_seconds=own)

    return rank_cards(
        runs,
        cards,
        order,
        prices,
        plan=plan,
        predict=predict,
        least_bytes=lambda settings, _: held_by(settings, process_bytes) * 9 // 10,
        batches_of=lambda _: BATCHES,
    )


def held_by(settings: EstimateSettings, process_bytes: int) -> int:
    training = settings.training
    return GIB + (process_bytes - GIB) // training.num_gpus if training.shards_base else process_bytes


@given(
    cards=st.lists(st.sampled_from(CARDS), min_size=1, max_size=12, unique=True),
    data=st.data(),
    order=st.sampled_from(CardOrder),
)
def test_the_best_come_first_and_none_that_is_left_out_is_better(
    cards: list[Gpu], data: st.DataObject, order: CardOrder
) -> None:
    rates = st.floats(0.01, 100)
    seconds = {card.name: data.draw(rates) for card in cards}
    prices = {card.name: data.draw(rates) for card in cards}
    best = ranked(cards, order, prices, seconds=seconds)
    assert len(best) == min(len(cards), MAX_RANKED)
    by_cost = order == CardOrder.COST
    shown = [(card.cost or 0.0) if by_cost else card.run_seconds for card in best]
    assert shown == sorted(shown)
    for card in best:
        assert card.run_seconds == pytest.approx(NUM_STEPS * seconds[card.gpu])
        assert card.cost == pytest.approx(prices[card.gpu] * card.run_seconds / 3600)
        assert card.run_seconds_low < card.run_seconds < card.run_seconds_high
    all_values = sorted(
        NUM_STEPS * seconds[card.name] * (prices[card.name] / 3600 if by_cost else 1.0) for card in cards
    )
    assert shown == pytest.approx(all_values[: len(shown)])


def test_cards_on_which_it_does_not_fit_or_cannot_compute_are_left_out() -> None:
    cards = [find_gpu(name) for name in ("RTX 3070", "RTX 4090", "L4", "A100 80GB")]
    failures = {"L4": HardwareError("no bf16")}
    best = ranked(cards, CardOrder.TIME, {}, seconds={}, process_bytes=12 * GIB, failures=failures)
    assert {card.gpu for card in best} == {"RTX 4090", "A100 80GB"}
    assert all(card.cost is None and card.price is None for card in best)
    assert ranked(cards, CardOrder.TIME, {}, seconds={}, process_bytes=200 * GIB) == ()


def test_a_model_that_cannot_be_checkpointed_is_planned_without() -> None:
    def refuse(settings: EstimateSettings, gpu: Gpu) -> Estimate:
        if settings.training.gradient_checkpointing == "on":
            raise ModelError("no checkpointing")
        return estimate(gpu, 1.0, 0)

    def plan(_: EstimateSettings, gpu: Gpu) -> PlannedOnCard:
        return PlannedOnCard(settings=SETTINGS, estimate=estimate(gpu, 1.0, 0), step_seconds=1.0)

    (card,) = rank_cards(
        (SETTINGS,),
        CARDS[:1],
        CardOrder.TIME,
        {},
        plan=plan,
        predict=refuse,
        least_bytes=lambda *_: 0,
        batches_of=lambda _: BATCHES,
    )
    assert card.gpu == CARDS[0].name


@given(
    cards=st.lists(st.sampled_from(CARDS), min_size=1, max_size=12, unique=True),
    gib=st.integers(1, 400),
    data=st.data(),
)
def test_a_run_that_is_too_large_for_a_card_is_on_the_fewest_that_share_it(
    cards: list[Gpu], gib: int, data: st.DataObject
) -> None:
    prices = {card.name: data.draw(st.floats(0.01, 100)) for card in cards}
    runs = tuple(on_more_gpus(SETTINGS, strategy=Strategy.AUTO, is_number_open=True))
    assert [run.training.num_gpus for run in runs] == [1, 2, 4, 8]
    ranked_cards = ranked(cards, CardOrder.COST, prices, seconds={}, process_bytes=gib * GIB, runs=runs)
    usable = {card.name: card.usable_bytes for card in cards}
    fewest = {
        name: next((run.training.num_gpus for run in runs if held_by(run, gib * GIB) <= usable[name]), None)
        for name in usable
    }
    assert len(ranked_cards) == min(MAX_RANKED, sum(number is not None for number in fewest.values()))
    assert [card.cost for card in ranked_cards] == sorted(card.cost or 0.0 for card in ranked_cards)
    for card in ranked_cards:
        assert card.num_gpus == fewest[card.gpu]
        assert card.strategy == ("ddp" if card.num_gpus == 1 else "fsdp")
        assert card.cost == pytest.approx(card.num_gpus * prices[card.gpu] * card.run_seconds / 3600)


def test_what_cannot_fit_by_its_weights_alone_is_not_predicted() -> None:
    runs, numbers = tuple(on_more_gpus(SETTINGS, strategy=Strategy.AUTO, is_number_open=True)), list[int]()
    (card,) = ranked(
        [find_gpu("RTX 4090")],
        CardOrder.TIME,
        {},
        seconds={},
        process_bytes=70 * GIB,
        runs=runs,
        predicted_on=numbers.append,
    )
    assert card.num_gpus == 4
    assert not set(numbers) & {1, 2}


@pytest.mark.parametrize(
    ("training", "numbers"),
    [
        ({"gradient_accumulation_steps": 4}, [1, 2, 4]),
        ({"gradient_accumulation_steps": 1}, [1]),
        ({"strategy": "ddp"}, [1]),
        ({"torch_compile": True}, [1]),
    ],
)
def test_more_gpus_are_only_tried_where_the_base_may_be_sharded_and_each_has_rows(
    training: dict[str, object], numbers: list[int]
) -> None:
    settings = EstimateSettings.model_validate({"model": {"name": "m"}, "training": training})
    strategy = settings.training.strategy
    runs = list(on_more_gpus(settings, strategy=strategy, is_number_open=True))
    assert [run.training.num_gpus for run in runs] == numbers
    assert [run.training.shards_base for run in runs] == [False] + [True] * (len(numbers) - 1)
    assert list(on_more_gpus(settings, strategy=strategy, is_number_open=False)) == [settings]


def test_a_number_of_gpus_that_was_given_is_kept() -> None:
    settings = with_settings(SETTINGS, {"training.num_gpus": 3})
    runs = list(on_more_gpus(settings, strategy=Strategy.AUTO, is_number_open=False))
    assert [(run.training.num_gpus, run.training.shards_base) for run in runs] == [(3, False), (3, True)]
