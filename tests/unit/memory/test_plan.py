"""What a plan chooses, by made-up predictions: the fastest that fits, with its alternatives."""

from collections.abc import Callable, Mapping

import pytest

from qlora_cli.errors import ModelError
from qlora_cli.memory.gpus import Gpu
from qlora_cli.memory.plan import CHECKPOINTING, describe, is_open, plan_run
from qlora_cli.memory.prediction import Estimate
from qlora_cli.settings.models import EstimateSettings
from qlora_cli.units import GIB
from tests.unit.memory.test_fitting import CONTEXT, card, estimate

Predict = Callable[[EstimateSettings, Gpu], Estimate]
SIZES = {"off": 18, "selective": 13, "on": 8, "offload": 7}
SPEED = list(SIZES)
OPEN = EstimateSettings.model_validate({"model": {"name": "any"}})


def settings(**training: object) -> EstimateSettings:
    return EstimateSettings.model_validate({"model": {"name": "any"}, "training": training})


def predictor(sizes: Mapping[str, float], asked: list[str] | None = None) -> Predict:
    """Return predictions of these GiB by kind of checkpointing; a kind without a size is refused."""

    def predict(run: EstimateSettings, gpu: Gpu) -> Estimate:
        kind = run.training.gradient_checkpointing.value
        if asked is not None:
            asked.append(kind)
        if kind not in sizes:
            raise ModelError(f"no {kind}", hint="")
        num_bytes = round(sizes[kind] * GIB)
        return estimate(num_bytes, low=num_bytes - CONTEXT, gpu=gpu.name, checkpointing=kind)

    return predict


@pytest.mark.parametrize(
    ("memory", "chosen", "alternatives"),
    [
        (24, "off", ["selective", "on"]),
        (18, "off", ["selective", "on"]),
        (17, "selective", ["off", "on"]),
        (8, "on", ["off", "selective"]),
        (7, "offload", ["selective", "on"]),
        (3, "offload", ["selective", "on"]),
    ],
)
def test_the_fastest_that_fits_is_chosen(memory: int, chosen: str, alternatives: list[str]) -> None:
    planned = plan_run(OPEN, card(memory * GIB), predictor(SIZES))
    assert planned.plan.chosen.gradient_checkpointing == chosen
    assert planned.chosen.values == {CHECKPOINTING: chosen}
    assert planned.chosen.settings.training.gradient_checkpointing == chosen
    assert planned.chosen.estimate.gradient_checkpointing == chosen
    assert planned.plan.chosen.fits == ("yes" if memory >= SIZES["offload"] else "no")
    assert [option.gradient_checkpointing for option in planned.plan.alternatives] == alternatives


def test_more_memory_never_gives_a_slower_plan() -> None:
    speeds = []
    for gib in range(1, 30):
        chosen = plan_run(OPEN, card(gib * GIB), predictor(SIZES)).plan.chosen
        speeds.append(SPEED.index(chosen.gradient_checkpointing))
        assert chosen.fits == "yes" or all(gib < size for size in SIZES.values())
    assert speeds == sorted(speeds, reverse=True)
    assert len(set(speeds)) == len(SPEED)


def test_what_takes_less_is_tried_in_order_of_memory() -> None:
    planned = plan_run(OPEN, card(24 * GIB), predictor(SIZES))
    assert [other.values[CHECKPOINTING] for other in planned.leaner] == ["selective", "on"]
    # Kinds that take as much as the chosen one would not help.
    planned = plan_run(OPEN, card(24 * GIB), predictor({"off": 4, "selective": 5, "on": 3}))
    assert [other.values[CHECKPOINTING] for other in planned.leaner] == ["on"]


def test_the_host_is_asked_only_if_nothing_else_fits() -> None:
    asked: list[str] = []
    plan_run(OPEN, card(8 * GIB), predictor(SIZES, asked))
    assert asked == ["off", "selective", "on"]
    plan_run(OPEN, card(7 * GIB), predictor(SIZES, asked))
    assert asked[3:] == ["off", "selective", "on", "offload"]


def test_compiled_layers_take_two_kinds_only() -> None:
    asked: list[str] = []
    planned = plan_run(settings(torch_compile=True), card(4 * GIB), predictor(SIZES, asked))
    assert asked == ["off", "on"]
    assert planned.chosen.values == {CHECKPOINTING: "on"}


def test_a_kind_that_the_model_does_not_support_is_left_out() -> None:
    planned = plan_run(OPEN, card(4 * GIB), predictor({"off": 5}))
    assert planned.chosen.values == {CHECKPOINTING: "off"}
    assert planned.plan.alternatives == ()
    assert planned.leaner == ()
    with pytest.raises(ModelError, match="no offload"):
        plan_run(OPEN, card(4 * GIB), predictor({}))


@pytest.mark.parametrize("kind", ["off", "selective", "on", "offload"])
def test_what_was_asked_for_is_not_planned(kind: str) -> None:
    assert not is_open(settings(gradient_checkpointing=kind))
    assert is_open(settings(gradient_checkpointing="auto"))


def test_a_plan_is_one_line() -> None:
    plan = plan_run(OPEN, card(14 * GIB), predictor(SIZES)).plan
    assert describe(plan) == (
        "gradient checkpointing selective: 13.00 GiB; off takes 18.00 GiB and does not fit, on takes 8.00 GiB"
    )
