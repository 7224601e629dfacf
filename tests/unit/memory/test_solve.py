"""Solving and sweeping give the result of trying every value, with few predictions."""

import math
import subprocess
import sys
from collections.abc import Callable

import pytest

from qlora_cli.errors import ModelError, UsageError
from qlora_cli.memory.fitting.solver import SETTINGS, Point, search_between, solve, spare_bytes, sweep, with_value
from qlora_cli.memory.gpus import Gpu
from qlora_cli.memory.prediction import COMPONENTS, Components, Estimate, Figures
from qlora_cli.settings.models import EstimateSettings
from qlora_cli.units import GIB, MIB

MAX_PREDICTIONS = 14
SETTINGS_ASKED = EstimateSettings.model_validate({"model": {"name": "m"}})
CARD = Gpu(
    name="card",
    group="consumer",
    total_bytes=24 * GIB,
    capability=(8, 9),
    num_sms=100,
    context_bytes=0,
    context_high_bytes=0,
)
Bytes = Callable[[EstimateSettings], int]


class Counting:
    """Predicts with a closed form and records the settings."""

    def __init__(self, process_bytes: Bytes) -> None:
        self.asked: list[EstimateSettings] = []
        self._process_bytes = process_bytes

    def __call__(self, settings: EstimateSettings, gpu: Gpu) -> Estimate:
        self.asked.append(settings)
        process = self._process_bytes(settings)
        high = process * 21 // 20
        figures = Figures(
            allocated_bytes=process,
            allocated_low_bytes=process,
            allocated_high_bytes=process,
            reserved_bytes=process,
            reserved_low_bytes=process,
            reserved_high_bytes=high,
            process_bytes=process,
            process_low_bytes=process,
            process_high_bytes=high,
        )
        return Estimate(
            gpu=gpu.name,
            dtype="bf16",
            attention_backends=(),
            gradient_checkpointing="on",
            predicted=figures,
            components=Components(**{f"{name}_bytes": 0 for name in COMPONENTS}),
            phases=(),
            paged_bytes=0,
            pinned_host_bytes=0,
            ruling_phase="backward",
            reason="",
        )


def num_tokens(settings: EstimateSettings) -> int:
    return settings.data.max_length * settings.training.micro_batch_size


def linear(settings: EstimateSettings) -> int:
    return 6 * GIB + num_tokens(settings) * MIB + settings.lora.rank * 3 * MIB


def quadratic(settings: EstimateSettings) -> int:
    return 6 * GIB + num_tokens(settings) * settings.data.max_length * 700 + settings.lora.rank**2 * 9000


def flat_then_steep(settings: EstimateSettings) -> int:
    return max(20 * GIB, linear(settings))


def staircase(settings: EstimateSettings) -> int:
    return linear(settings) // (20 * MIB) * 20 * MIB


def candidates(setting: str, most: int | None) -> list[int]:
    if setting == "max-length":
        return list(range(64, (most or 2**17) + 1, 64))
    return list(range(1, 1025)) if setting == "micro-batch-size" else [1, 2, 4, *range(8, 4097, 8)]


def test_what_is_spare_fits_with_its_own_share_of_the_band() -> None:
    used = 10 * GIB
    spare = spare_bytes(Counting(lambda _: used)(SETTINGS_ASKED, CARD), CARD)
    assert spare > 12 * GIB

    def high_with(more: int) -> int:
        return Counting(lambda _: used + more)(SETTINGS_ASKED, CARD).predicted.process_high_bytes

    assert high_with(spare) <= CARD.usable_bytes < high_with(spare + 2)
    assert spare_bytes(Counting(lambda _: 24 * GIB)(SETTINGS_ASKED, CARD), CARD) == 0


@pytest.mark.parametrize("usable_gib", [5, 7, 12, 24, 80, 180])
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("form", [linear, quadratic, flat_then_steep, staircase])
def test_solve_agrees_with_brute_force_with_few_predictions(form: Bytes, setting: str, usable_gib: int) -> None:
    gpu = Gpu(**{**vars(CARD), "total_bytes": usable_gib * GIB})
    fitting = [
        value
        for value in candidates(setting, 131072)
        if form(with_value(SETTINGS_ASKED, setting, value)) * 21 // 20 <= gpu.usable_bytes
    ]
    predict = Counting(form)
    solution = solve(setting, SETTINGS_ASKED, gpu, predict, most=131072)
    if form is not flat_then_steep:  # of which the end says little
        downwards = Counting(form)
        assert solve(setting, SETTINGS_ASKED, gpu, downwards, most=131072, tries_most_first=True) == solution
        assert len(downwards.asked) <= MAX_PREDICTIONS + 2
    assert solution.value == (fitting[-1] if fitting else None)
    assert len(predict.asked) <= MAX_PREDICTIONS
    if solution.value is None:
        assert solution.process_bytes is None
    else:
        assert solution.process_bytes == form(with_value(SETTINGS_ASKED, setting, solution.value))


@pytest.mark.parametrize("asked", [64, 100, 8192, 1_000_000])
def test_the_solution_does_not_depend_on_the_value_of_the_run(asked: int) -> None:
    solutions = {
        solve(
            "max-length", with_value(SETTINGS_ASKED, "max-length", length), CARD, Counting(linear), most=40_960
        ).value
        for length in (2048, asked)
    }
    assert len(solutions) == 1


@pytest.mark.parametrize(
    ("setting", "most", "value", "limited_by"),
    [
        ("max-length", 4096, 4096, "the positions of the model"),
        ("max-length", 1000, 1000, "the positions of the model"),
        ("max-length", 48, 48, "the positions of the model"),
        ("max-length", None, 1_048_576, "1,048,576 tokens, the most that are tried"),
        ("micro-batch-size", 4096, 1024, "1,024 rows, the most that are tried"),
        ("rank", 4096, 4096, "the largest rank that is allowed"),
    ],
)
def test_a_value_that_always_fits_is_limited_by_something_else(
    setting: str, most: int | None, value: int, limited_by: str
) -> None:
    predict = Counting(lambda _: 0)
    solution = solve(setting, SETTINGS_ASKED, CARD, predict, most=most)
    assert (solution.value, solution.limited_by, solution.process_bytes) == (value, limited_by, 0)
    assert len(predict.asked) <= MAX_PREDICTIONS
    directly = Counting(lambda _: 0)
    assert solve(setting, SETTINGS_ASKED, CARD, directly, most=most, tries_most_first=True) == solution
    assert len(directly.asked) <= 2


def test_a_setting_that_never_fits_has_no_solution() -> None:
    predict = Counting(lambda _: 25 * GIB)
    for setting in SETTINGS:
        solution = solve(setting, SETTINGS_ASKED, CARD, predict, most=4096)
        assert (solution.value, solution.process_bytes, solution.limited_by) == (None, None, "memory")
    assert len(predict.asked) == 5  # the number of rows in a micro-batch is already the minimum


def test_a_solution_limited_by_memory_says_so() -> None:
    assert solve("max-length", SETTINGS_ASKED, CARD, Counting(linear), most=131072).limited_by == "memory"


def test_an_error_of_the_prediction_is_not_reported_as_a_lack_of_memory() -> None:
    def refuse(_: EstimateSettings) -> int:
        raise ModelError("no such attention")

    with pytest.raises(ModelError, match="no such attention"):
        solve("rank", SETTINGS_ASKED, CARD, Counting(refuse), most=None)


@pytest.mark.parametrize("power", [0.3, 1, 3, 9])
@pytest.mark.parametrize("stairs", [1, 40])
@pytest.mark.parametrize("share", [0.001, 0.3, 0.7, 0.999])
def test_the_search_finds_the_edge_of_any_falling_function(share: float, stairs: int, power: float) -> None:
    edge = int(1999 * share) // stairs * stairs + stairs - 1
    asked: list[int] = []

    def headroom_at(at: int) -> float:
        asked.append(at)
        left = (edge - at) // stairs
        return math.copysign(abs(left) ** power, left)

    low, high = Point(0, headroom_at(0)), Point(2100, headroom_at(2100))
    assert search_between(low, high, headroom_at) == edge
    assert len(asked) <= 22
    assert search_between(low, high, headroom_at, max_predictions=3) <= edge


def test_a_sweep_predicts_every_combination_in_order() -> None:
    points = sweep({"max-length": (512, 1024), "micro-batch-size": (1, 2, 4)}, SETTINGS_ASKED, CARD, Counting(linear))
    assert [tuple(point.values.values()) for point in points] == [
        (512, 1), (512, 2), (512, 4), (1024, 1), (1024, 2), (1024, 4),
    ]  # fmt: skip
    assert list(points[0].values) == ["max-length", "micro-batch-size"]
    for point in points:
        tokens = point.values["max-length"] * point.values["micro-batch-size"]
        assert point.process_bytes == 6 * GIB + (tokens + 16 * 3) * MIB
        assert point.ruling_phase == "backward"
        assert (point.step_seconds, point.tokens_per_second) == (None, None)  # `linear` knows no time


def test_a_wrong_value_of_a_sweep_is_an_error_before_any_prediction() -> None:
    predict = Counting(linear)
    with pytest.raises(UsageError, match="max-length must be greater than or equal to 8, got 2"):
        sweep({"rank": (8,), "max-length": (512, 2)}, SETTINGS_ASKED, CARD, predict)
    assert not predict.asked


@pytest.mark.parametrize("setting", SETTINGS)
def test_with_value_changes_only_that_setting(setting: str) -> None:
    changed = with_value(SETTINGS_ASKED, setting, 192)
    section, key = SETTINGS[setting].split(".")
    expected = SETTINGS_ASKED.model_dump()
    expected[section][key] = 192
    assert changed.model_dump() == expected
    assert getattr(changed, section).model_fields_set == {key}


def test_a_setting_that_cannot_be_varied_is_refused() -> None:
    with pytest.raises(UsageError, match="'alpha' can't be varied here") as caught:
        solve("alpha", SETTINGS_ASKED, CARD, Counting(linear), most=None)
    assert caught.value.hint == "Vary one of max-length, micro-batch-size, rank."
    with pytest.raises(UsageError, match="'alpha' can't be varied here"):
        with_value(SETTINGS_ASKED, "alpha", 1)


def test_torch_is_not_imported() -> None:
    code = "import sys, qlora_cli.memory.fitting.suggestions; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
