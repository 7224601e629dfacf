"""What a plan chooses, by made-up predictions: the fastest that fits, with its alternatives."""

from collections.abc import Callable, Mapping

import pytest

from qlora_cli.errors import ModelError
from qlora_cli.memory.fitting.plan import (
    CHECKPOINTING,
    KEPT,
    PlannedRun,
    best_option,
    describe,
    is_open,
    plan_run,
    planning,
)
from qlora_cli.memory.gpus import Gpu
from qlora_cli.memory.prediction import Estimate, Product
from qlora_cli.settings.choices import Attention
from qlora_cli.settings.models import EstimateSettings
from qlora_cli.units import GIB
from tests.unit.memory.test_fitting import CONTEXT, card, estimate

Predict = Callable[[EstimateSettings, Gpu], Estimate]
SIZES = {"off": 18, "selective": 13, "on": 8, "offload": 7}
SPEED = list(SIZES)
OPEN = EstimateSettings.model_validate({"model": {"name": "any"}})


def settings(**training: object) -> EstimateSettings:
    return EstimateSettings.model_validate({"model": {"name": "any"}, "training": training})


# In the order of their value: operations for each byte.
PRODUCTS = (
    Product(name="v", kept_bytes=GIB, flops=300),
    Product(name="q", kept_bytes=2 * GIB, flops=600),
    Product(name="up", kept_bytes=2 * GIB, flops=500),
)


def predictor(sizes: Mapping[str, float], asked: list[str] | None = None) -> Predict:
    """Return predictions of these GiB by kind of checkpointing; a kind without a size is refused.

    `selective` takes as much as is named if it keeps everything, and less for each product that it does not keep.
    """

    def predict(run: EstimateSettings, gpu: Gpu) -> Estimate:
        kind = run.training.gradient_checkpointing.value
        if asked is not None:
            asked.append(kind)
        if kind not in sizes:
            raise ModelError(f"no {kind}", hint="")
        num_bytes = round(sizes[kind] * GIB)
        if kind == "selective":
            kept = run.training.kept_products or ()
            num_bytes -= sum(product.kept_bytes for product in PRODUCTS if product.name not in kept)
        return estimate(num_bytes, low=num_bytes - CONTEXT, gpu=gpu.name, checkpointing=kind)

    return predict


def planned_run(run: EstimateSettings, memory: float, predict: Predict) -> PlannedRun:
    def find_products(run: EstimateSettings, _: Gpu) -> tuple[Product, ...]:
        assert run.training.gradient_checkpointing == "on"
        return PRODUCTS

    return plan_run(run, card(round(memory * GIB)), predict, find_products)


@pytest.mark.parametrize(
    ("memory", "chosen", "alternatives"),
    [
        (24, "off", ["selective", "on"]),
        (18, "off", ["selective", "on"]),
        (17, "selective", ["off", "on"]),
        (8, "on", ["selective", "offload"]),
        (7, "offload", ["selective", "on"]),
        (3, "offload", ["selective", "on"]),
    ],
)
def test_the_fastest_that_fits_is_chosen(memory: int, chosen: str, alternatives: list[str]) -> None:
    sizes = SIZES if memory != 8 else {**SIZES, "selective": 40}  # so that nothing of it fits
    planned = planned_run(OPEN, memory, predictor(sizes))
    assert planned.plan.chosen.gradient_checkpointing == chosen
    assert planned.chosen.values[CHECKPOINTING] == chosen
    assert planned.chosen.settings.training.gradient_checkpointing == chosen
    assert planned.chosen.estimate.gradient_checkpointing == chosen
    assert planned.plan.chosen.fits == ("yes" if memory >= SIZES["offload"] else "no")
    if memory != 8:
        assert [option.gradient_checkpointing for option in planned.plan.alternatives] == alternatives


def test_more_memory_never_gives_a_slower_plan() -> None:
    speeds = []
    for quarters in range(4, 4 * 24):
        chosen = planned_run(OPEN, quarters / 4, predictor(SIZES)).chosen
        speeds.append((SPEED.index(chosen.estimate.gradient_checkpointing), len(chosen.left_out)))
        assert chosen.fits == "yes" or all(quarters / 4 < size for size in SIZES.values())
    assert speeds == sorted(speeds, reverse=True)
    assert len(set(speeds)) == len(SPEED) + 2  # and two subsets of the products


def test_the_fastest_alone_is_found_without_slower_ones() -> None:
    for name in ("", *SIZES):  # of which the model refuses one
        sizes = {kind: size for kind, size in SIZES.items() if kind != name}
        for halves in range(2, 2 * 24):
            gpu, asked = card(halves * GIB // 2), list[str]()
            chosen = planned_run(OPEN, halves / 2, predictor(sizes)).chosen
            option = best_option(OPEN, gpu, predictor(sizes, asked), lambda *_: PRODUCTS)
            assert option == chosen.option()
            if chosen.fits == "yes":
                assert asked[-1] == chosen.estimate.gradient_checkpointing


@pytest.mark.parametrize(
    ("memory", "kept", "left_out"),
    [
        (13.0, ("v", "q", "up"), ()),
        (12.9, ("v", "q"), ("up",)),
        (11.0, ("v", "q"), ("up",)),
        (10.9, ("v",), ("q", "up")),
        (9.0, ("v",), ("q", "up")),
    ],
)
def test_the_most_valuable_products_that_fit_are_kept(
    memory: float, kept: tuple[str, ...], left_out: tuple[str, ...]
) -> None:
    for run in (OPEN, settings(gradient_checkpointing="selective")):
        chosen = planned_run(run, memory, predictor(SIZES)).chosen
        assert chosen.values == {CHECKPOINTING: "selective", KEPT: kept}
        assert chosen.left_out == left_out
        assert chosen.fits == "yes"


def test_selective_that_was_asked_for_stays_selective() -> None:
    chosen = planned_run(settings(gradient_checkpointing="selective"), 4, predictor(SIZES)).chosen
    assert chosen.values[CHECKPOINTING] == "selective"
    assert chosen.fits == "no"


def test_a_model_without_such_products_keeps_what_selective_keeps() -> None:
    planned = plan_run(OPEN, card(14 * GIB), predictor({**SIZES, "selective": 18}), lambda *_: ())
    assert planned.chosen.values == {CHECKPOINTING: "selective", KEPT: None}


def test_what_is_suggested_is_predicted_as_it_would_be_planned() -> None:
    predict = planning(predictor({**SIZES, "selective": 13}), lambda *_: PRODUCTS[:1])
    run = settings(gradient_checkpointing="selective")
    # Only one product is computed twice, and only that one is kept.
    assert predict(run, card(40 * GIB)).predicted.process_bytes == 9 * GIB
    run = settings(gradient_checkpointing="selective", kept_products=("v", "q", "up"))
    assert predict(run, card(40 * GIB)).predicted.process_bytes == 13 * GIB


def test_what_takes_less_is_tried_in_order_of_memory() -> None:
    planned = planned_run(OPEN, 24, predictor(SIZES))
    assert [other.values[CHECKPOINTING] for other in planned.leaner] == ["selective", "on"]
    # Kinds that take as much as the chosen one would not help.
    planned = planned_run(OPEN, 24, predictor({"off": 4, "selective": 5, "on": 3}))
    assert [other.values[CHECKPOINTING] for other in planned.leaner] == ["on"]


def test_a_resumed_run_stays_with_its_plan_and_takes_less_memory_if_that_ran_out() -> None:
    planned = planned_run(OPEN, 24, predictor(SIZES))
    kinds = ["off", "selective", "on"]
    assert [planned.chosen.values[CHECKPOINTING], *(other.values[CHECKPOINTING] for other in planned.leaner)] == kinds
    everything = ["v", "q", "up"]
    for kept, kind, now, leaner in (
        (None, "off", "off", "selective"),
        (everything, "selective", "selective", "on"),
        (["v"], "selective", "selective", "on"),  # less memory was free then
        (None, "on", "on", "on"),
        (None, "offload", "off", "off"),  # it fits without by now
    ):
        before = {CHECKPOINTING: kind, KEPT: kept}
        for ran_out, expected in ((False, now), (True, leaner)):
            resumed = planned.resumed(before, ran_out=ran_out)
            assert resumed.chosen.values[CHECKPOINTING] == expected
            assert resumed.plan.chosen.gradient_checkpointing == expected
            assert all(other.high_bytes < resumed.chosen.high_bytes for other in resumed.leaner)
            assert len(resumed.plan.alternatives) == 2


def test_the_host_is_asked_only_if_nothing_else_fits() -> None:
    asked: list[str] = []
    planned_run(OPEN, 13, predictor(SIZES, asked))
    assert asked == ["off", "selective", "on"]
    planned_run(OPEN, 7, predictor(SIZES, asked))
    assert asked[-1] == "offload"


def test_compiled_layers_take_two_kinds_only() -> None:
    asked: list[str] = []
    planned = planned_run(settings(torch_compile=True), 4, predictor(SIZES, asked))
    assert asked == ["off", "on"]
    assert planned.chosen.values == {CHECKPOINTING: "on", KEPT: None}


def test_with_compiled_attention_no_products_are_kept() -> None:
    asked: list[str] = []
    flex = settings()
    flex = flex.model_copy(update={"model": flex.model.model_copy(update={"attention": Attention.FLEX_ATTENTION})})
    planned_run(flex, 4, predictor(SIZES, asked))
    assert asked == ["off", "on", "offload"]


def test_a_kind_that_the_model_does_not_support_is_left_out() -> None:
    planned = planned_run(OPEN, 4, predictor({"off": 5}))
    assert planned.chosen.values == {CHECKPOINTING: "off", KEPT: None}
    assert planned.plan.alternatives == ()
    assert planned.leaner == ()
    with pytest.raises(ModelError, match="no offload"):
        planned_run(OPEN, 4, predictor({}))


@pytest.mark.parametrize("kind", ["off", "selective", "on", "offload"])
def test_what_was_asked_for_is_not_planned(kind: str) -> None:
    kept = ("q_proj",) if kind == "selective" else None
    assert not is_open(settings(gradient_checkpointing=kind, kept_products=kept))
    assert is_open(settings(gradient_checkpointing="auto"))
    assert is_open(settings(gradient_checkpointing="selective"))


def test_a_plan_is_one_line() -> None:
    plan = planned_run(OPEN, 12, predictor(SIZES)).plan
    assert describe(plan) == (
        "gradient checkpointing selective without up 11.00 GiB; selective 13.00 GiB, does not fit; on 8.00 GiB"
    )
