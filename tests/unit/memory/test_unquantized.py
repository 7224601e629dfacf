"""What fits in 16 bit, too: found by one prediction, and without any where the weights alone do not fit."""

import pytest

from qlora_cli.errors import ModelError
from qlora_cli.memory.fitting.alternatives import unquantized_run
from qlora_cli.memory.fitting.plan import option_of
from qlora_cli.memory.fitting.suggestions import judge_fit
from qlora_cli.memory.gpus import Gpu
from qlora_cli.memory.prediction import PlanOption
from qlora_cli.settings.choices import Quantization
from qlora_cli.settings.models import EstimateSettings
from qlora_cli.units import GIB
from tests.unit.memory.test_fitting import CONTEXT, card, estimate

QUANTIZED = EstimateSettings.model_validate({"model": {"name": "base"}})
PARAMETERS = 4 * GIB  # 8 GiB in 16 bit


class Predictor:
    """Predicts that a run in 16 bit takes so many GiB; refuses to without a size."""

    def __init__(self, gib: float | None) -> None:
        self.gib, self.asked = gib, 0

    def __call__(self, settings: EstimateSettings, gpu: Gpu) -> PlanOption:
        assert settings.quantization.method == Quantization.NONE
        self.asked += 1
        if self.gib is None:
            raise ModelError("the checkpoint is quantized itself")
        predicted = estimate(round(self.gib * GIB), gpu=gpu.name)
        return option_of(predicted, judge_fit(predicted, gpu).fits)


def found(memory: float, predict: Predictor, settings: EstimateSettings = QUANTIZED) -> int | None:
    """Return the bytes of the run in 16 bit on a card of so many GiB, if it fits."""
    option = unquantized_run(settings, card(round(memory * GIB)), PARAMETERS, predict)
    return None if option is None else option.process_bytes


def test_a_run_that_fits_in_16_bit_is_found_by_one_prediction() -> None:
    predict = Predictor(10)
    assert found(10, predict) == 10 * GIB
    assert predict.asked == 1
    assert found(9.9, predict) is None


def test_weights_that_do_not_fit_take_no_prediction() -> None:
    predict = Predictor(1)
    edge = 8 + CONTEXT / GIB
    assert found(edge - 0.01, predict) is None
    assert predict.asked == 0
    assert found(edge, predict) == GIB


@pytest.mark.parametrize("method", ["none", "nf4"])
def test_a_base_that_can_be_stored_in_one_way_only_has_no_other(method: str) -> None:
    settings = EstimateSettings.model_validate({"model": {"name": "base"}, "quantization": {"method": method}})
    predict = Predictor(None)
    assert found(100, predict, settings) is None
    assert predict.asked == (method == "nf4")
