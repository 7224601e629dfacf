"""The predicted time of a calibration grows with what it computes, and the page shows what is predicted now."""

import importlib
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from qlora_cli.calibrating.calibration_cost import CalibratedShape, calibration_seconds
from qlora_cli.timing.rates import Rates, rates_of

ROOT = Path(__file__).parents[3]
SHAPE = CalibratedShape(num_rows=4096, num_columns=4096)
TOKENS = 100_000


def card(name: str = "RTX 4090") -> Rates:
    rates = rates_of(name, 128)
    assert rates is not None
    return rates


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`scripts/make_calibration_table.py`, imported."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return importlib.import_module("make_calibration_table")


def test_the_page_has_the_times_that_are_predicted_now(script: ModuleType) -> None:
    text = script.PAGE.read_text(encoding="utf-8")
    assert script.row_of("llama-3.1-8b") in text.splitlines()
    assert script.row_of("qwen3-30b-a3b") in text.splitlines()


@pytest.mark.parametrize("key", ["num_rows", "num_columns", "count"])
def test_larger_weights_take_longer(key: str) -> None:
    larger, rates = replace(SHAPE, **{key: 4 * getattr(SHAPE, key)}), replace(card(), dispatch_seconds=0.0)
    assert calibration_seconds([larger], TOKENS, rates) > 1.2 * calibration_seconds([SHAPE], TOKENS, rates)


def test_each_part_counts() -> None:
    seconds = calibration_seconds([SHAPE], TOKENS, card())
    assert calibration_seconds([SHAPE], 100 * TOKENS, card()) > 2 * seconds
    slow_host = replace(card(), dispatch_seconds=10 * card().dispatch_seconds)
    assert calibration_seconds([SHAPE], TOKENS, slow_host) > 5 * seconds  # columns, one after another
    assert calibration_seconds([SHAPE, SHAPE], TOKENS, card()) == pytest.approx(2 * seconds)
    shared = replace(SHAPE, owns_moments=False)
    slow = replace(card(), fp32_flops=1e9, dispatch_seconds=0.0)
    assert calibration_seconds([shared], TOKENS, slow) < 0.5 * calibration_seconds([SHAPE], TOKENS, slow)


def test_small_experts_are_chosen_together() -> None:
    experts = CalibratedShape(num_rows=768, num_columns=2048, count=128)
    alone = [replace(experts, count=1)] * 128
    assert calibration_seconds([experts], TOKENS, card()) < 0.2 * calibration_seconds(alone, TOKENS, card())
