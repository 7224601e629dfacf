"""The largest model for a GPU that the requested one can't be trained on: found with a few predictions."""

from dataclasses import replace

import pytest

from qlora_cli.errors import ModelError
from qlora_cli.memory.catalogue import CatalogueModel, catalogue, find_in_catalogue
from qlora_cli.memory.fitting.alternatives import MAX_PREDICTIONS, SLOW_TO_PREDICT, largest_model, stored_bytes
from qlora_cli.memory.gpus import Gpu, find_gpu
from qlora_cli.memory.prediction import Estimate
from qlora_cli.memory.report_parts import FittingModel
from qlora_cli.settings.models import EstimateSettings
from qlora_cli.units import GIB
from tests.unit.memory.test_fitting import estimate

GPU = find_gpu("RTX 4090")
SETTINGS = EstimateSettings.model_validate({"model": {"name": "base"}})


class Predictor:
    """Predicts that a run takes its weights, some of them more than that; counts the predictions."""

    def __init__(self, *, more: float = 1.1, refused: str = "") -> None:
        self.more, self.refused = more, refused
        self.asked: list[str] = []

    def __call__(self, model: CatalogueModel, gpu: Gpu) -> Estimate:
        self.asked.append(model.name)
        if model.name == self.refused:
            raise ModelError("not with these settings")
        return self.estimate_of(model, gpu)

    def estimate_of(self, model: CatalogueModel, gpu: Gpu = GPU) -> Estimate:
        weights = round(stored_bytes(model, 4))
        taken = estimate(round(self.more * weights), gpu=gpu.name)
        return replace(taken, components=replace(taken.components, quantized_weights_bytes=weights))


def largest_for(name: str, predict: Predictor, *, seems: float | None = None) -> FittingModel | None:
    """Return what is found; `seems`: how many times its weights the run takes that does not fit."""
    model = find_in_catalogue(name)
    assert model is not None
    assert model.num_parameters is not None
    too_large = (predict if seems is None else Predictor(more=seems)).estimate_of(model)
    return largest_model(SETTINGS, GPU, too_large, model.num_parameters, predict)


def fits(model: CatalogueModel, predict: Predictor) -> bool:
    return predict.estimate_of(model).predicted.process_high_bytes <= GPU.usable_bytes


def test_it_is_the_largest_that_fits_found_by_one_prediction() -> None:
    predict = Predictor()
    found = largest_for("llama-3.3-70b", predict)
    assert found is not None
    assert predict.asked == [found.model]
    larger = [
        model
        for model in catalogue()
        if model.num_parameters and found.num_parameters < model.num_parameters < 70_553_706_496
    ]
    assert larger
    assert not any(fits(model, predict) for model in larger if SLOW_TO_PREDICT not in model.config)
    assert found.process_high_bytes <= GPU.usable_bytes


def test_smaller_ones_are_tried_if_the_first_takes_more_than_was_expected() -> None:
    predict = Predictor(more=1.4)
    found = largest_for("llama-3.3-70b", predict, seems=0.8)
    assert found is not None
    assert 1 < len(predict.asked) <= MAX_PREDICTIONS
    assert predict.asked[-1] == found.model


def test_a_model_that_is_refused_is_skipped() -> None:
    first = largest_for("llama-3.3-70b", Predictor())
    assert first is not None
    predict = Predictor(refused=first.model)
    second = largest_for("llama-3.3-70b", predict)
    assert second is not None
    assert predict.asked == [first.model, second.model]


def test_there_is_none_for_the_smallest_model_and_none_after_a_few_predictions() -> None:
    assert largest_for("gpt2", Predictor()) is None
    predict = Predictor(more=1e6)
    assert largest_for("llama-3.3-70b", predict, seems=0.8) is None
    assert len(predict.asked) <= MAX_PREDICTIONS


@pytest.mark.parametrize(("name", "gib"), [("llama-2-7b", 3.6), ("llama-3.1-8b", 5.2), ("qwen2.5-0.5b", 0.42)])
def test_the_bytes_of_weights_are_about_those_that_are_stored(name: str, gib: float) -> None:
    model = find_in_catalogue(name)
    assert model is not None
    assert stored_bytes(model, 4) / GIB == pytest.approx(gib, rel=0.05)
