"""`--quant auto`: the least quantization that fits, by fit and time, with as few predictions as that takes."""

from dataclasses import dataclass

import pytest

from qlora_cli.errors import ModelError
from qlora_cli.memory.fitting.method_choice import WORTH_WAITING, MethodChoice, choose_method, describe_choice
from qlora_cli.memory.fitting.suggestions import NO, YES
from qlora_cli.memory.gpus import Gpu
from qlora_cli.memory.prediction import PlanOption
from qlora_cli.settings.choices import METHODS, Quantization
from qlora_cli.settings.models import EstimateSettings
from qlora_cli.units import GIB
from tests.unit.memory.test_fitting import card


@dataclass(frozen=True)
class Run:
    """How long a step takes, whether the run fits, and its weights."""

    seconds: float | None = 1.0
    fits: str = YES
    weights: int = GIB


NONE, INT8, NF4 = Quantization.NONE, Quantization.INT8, Quantization.NF4


def choose(runs: dict[Quantization, Run], **lora: object) -> tuple[MethodChoice, list[Quantization]]:
    """Return the choice on a card of 10 GiB, and the methods whose runs were predicted."""
    planned: list[Quantization] = []

    def run_of(settings: EstimateSettings) -> Run:
        method = settings.quantization.method
        if method not in runs:
            raise ModelError(f"can't be stored in {method}")
        return runs[method]

    def plan(settings: EstimateSettings, _: Gpu) -> PlanOption:
        planned.append(settings.quantization.method)
        run = run_of(settings)
        return PlanOption(
            gradient_checkpointing="off",
            recomputed_products=(),
            micro_batch_tokens=None,
            process_bytes=2 * GIB,
            process_high_bytes=2 * GIB,
            fits=run.fits,
            step_seconds=run.seconds,
        )

    settings = EstimateSettings.model_validate(
        {"model": {"name": "base"}, "quantization": {"method": "auto"}, "lora": lora}
    )
    choice = choose_method(settings, card(10 * GIB), plan, lambda settings, _: run_of(settings).weights)
    return choice, planned


def test_a_base_that_fits_in_16_bit_is_not_quantized_however_long_it_takes() -> None:
    choice, planned = choose({NONE: Run(seconds=100.0), INT8: Run(), NF4: Run()})
    assert choice.method == NONE
    assert planned == [NONE]


@pytest.mark.parametrize(
    ("seconds", "method"), [(WORTH_WAITING, INT8), (WORTH_WAITING + 0.01, NF4), (None, INT8), (0.5, INT8)]
)
def test_a_smaller_error_is_worth_some_time(seconds: float | None, method: Quantization) -> None:
    of_nf4 = None if seconds is None else 1.0
    choice, _ = choose({NONE: Run(fits=NO), INT8: Run(seconds=seconds), NF4: Run(seconds=of_nf4)})
    assert choice.method == method
    assert [option.quantization for option in choice.options] == ["none", "int8", "nf4"]


def test_weights_that_do_not_fit_take_no_prediction() -> None:
    choice, planned = choose({NONE: Run(weights=11 * GIB), INT8: Run(fits="tight"), NF4: Run()})
    assert (choice.method, planned) == (NF4, [INT8, NF4])
    assert choice.options[0].run is None


def test_if_nothing_fits_it_is_the_one_that_quantizes_most() -> None:
    choice, _ = choose({NONE: Run(fits=NO), INT8: Run(fits=NO), NF4: Run(fits=NO)})
    assert choice.method == NF4
    assert "nf4, which takes the least: " in describe_choice(choice)
    assert "nf4 off 2.00 GiB, 1.00 s a step, does not fit" in describe_choice(choice)


def test_a_method_that_the_model_does_not_allow_is_left_out() -> None:
    choice, _ = choose({NONE: Run(fits=NO), NF4: Run()})
    assert choice.method == NF4
    with pytest.raises(ModelError, match="can't be stored in nf4"):
        choose({})


def test_only_what_the_adapter_allows_is_looked_at() -> None:
    runs = {method: Run(fits=NO) for method in METHODS}
    assert choose(runs, init_lora_weights="pissa")[1] == [NONE]
    assert choose(runs, init_lora_weights="loftq")[1] == [NF4]


def test_the_choice_is_told_with_what_was_looked_at() -> None:
    choice, _ = choose({NONE: Run(weights=11 * GIB), INT8: Run(fits=NO), NF4: Run(seconds=2.5)})
    assert describe_choice(choice) == (
        "--quant nf4, the least quantization that fits: none takes 11.00 GiB for the weights alone, does not fit; "
        "int8 off 2.00 GiB, 1.00 s a step, does not fit; nf4 off 2.00 GiB, 2.50 s a step"
    )
