"""The smallest cards for a run: single ones and classes, of which every card has room."""

from collections.abc import Callable

import pytest

from qlora_cli.errors import HardwareError
from qlora_cli.memory.fitting.alternatives import smallest_classes, smallest_gpu
from qlora_cli.memory.gpus import AMPERE, Gpu, find_gpu
from qlora_cli.memory.prediction import Estimate
from qlora_cli.settings.models import EstimateSettings
from qlora_cli.units import GIB
from tests.unit.memory.test_fitting import estimate

SETTINGS = EstimateSettings.model_validate({"model": {"name": "base"}})


def takes(process_gib: float, *, oldest: tuple[int, int] = (0, 0)) -> Callable[[EstimateSettings, Gpu], Estimate]:
    """Return a prediction of as much on every GPU from compute capability `oldest` on, which others refuse."""

    def predict(_: EstimateSettings, gpu: Gpu) -> Estimate:
        if gpu.capability < oldest:
            raise HardwareError("no bf16")
        return estimate(round(process_gib * GIB), gpu=gpu.name)

    return predict


@pytest.mark.parametrize(
    ("process_gib", "card", "size_gb", "roomy_gb"),
    [
        (4.0, "RTX 2060 6GB", 6, 6),
        (5.0, "RTX 2060 6GB", 6, 8),
        (7.6, "RTX 4060", 10, 11),  # 0.08 GiB more than an RTX 5060 of 8 GB has
        (8.4, "RTX 3080 10GB", 10, 12),
        (15.2, "RTX 5070 Ti", 20, 24),  # more than a T4 of 16 GB has
        (200.0, "B300", 288, 288),
        (250.0, "B300", 288, None),
        (300.0, None, None, None),
    ],
)
def test_a_class_fits_only_if_each_of_its_cards_does(
    process_gib: float, card: str | None, size_gb: int | None, roomy_gb: int | None
) -> None:
    predict = takes(process_gib)
    smallest, roomy = smallest_classes(SETTINGS, predict)
    assert smallest_gpu(SETTINGS, predict) == card
    assert (smallest and smallest.size_gb, roomy and roomy.size_gb) == (size_gb, roomy_gb)
    if smallest is not None:
        assert smallest.usable_bytes == find_gpu(f"{size_gb}GB").usable_bytes
        assert smallest.gpus == find_gpu(f"{size_gb}GB").cards
        assert all(find_gpu(name).usable_bytes >= smallest.process_high_bytes for name in smallest.gpus)


def test_a_class_is_judged_without_its_cards_that_cannot_compute_with_the_settings() -> None:
    smallest, _ = smallest_classes(SETTINGS, takes(14.5, oldest=AMPERE))
    assert smallest is not None
    assert smallest.size_gb == 16
    assert "T4" not in smallest.gpus
    assert smallest.usable_bytes == find_gpu("A2").usable_bytes


def test_a_card_that_pytorch_has_no_kernels_for_is_never_the_smallest() -> None:
    assert smallest_gpu(SETTINGS, takes(10.7)) == "RTX 5070"  # a GTX 1080 Ti has 10.81 GiB
