"""The longest rows that fit, which are named where a run fits: those, and none that are a step longer."""

from functools import cache
from pathlib import Path

import pytest

from qlora_cli.memory.fitting.alternatives import larger_model
from qlora_cli.memory.fitting.solver import LENGTH_STEP
from qlora_cli.memory.gpus import find_gpu
from qlora_cli.memory.memory_report import MOST_TOKENS, inspect_memory
from qlora_cli.memory.prediction import MemoryReport, Solution
from qlora_cli.memory.request import MemoryRequest
from qlora_cli.settings.models import InspectMemorySettings
from qlora_cli.settings.resolve import Sources, resolve
from tests.conftest import Recorder

POSITIONS = 8192  # of the model


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path))


@cache
def report_on(gpu: str, length: int, **values: str) -> MemoryReport:
    given = {"model.name": "smollm2-135m", "data.max_length": str(length)}
    given |= {name.replace("__", "."): value for name, value in values.items()}
    asked = resolve(Sources(flags={path: (path, value) for path, value in given.items()}), InspectMemorySettings)
    return inspect_memory(MemoryRequest(asked=asked, gpus=(find_gpu(gpu),)), Recorder())


def longer_on(gpu: str, length: int = 512) -> Solution | None:
    return report_on(gpu, length).longer_rows


@pytest.mark.parametrize(
    ("gpu", "values"),
    [
        ("1GiB", {"training__gradient_checkpointing": "on"}),
        ("3GiB", {"training__gradient_checkpointing": "off"}),
    ],
    ids=["on", "off"],
)
def test_rows_of_as_many_tokens_fit_and_rows_a_step_longer_do_not(gpu: str, values: dict[str, str]) -> None:
    longer = report_on(gpu, 512, **values).longer_rows
    assert longer is not None
    assert longer.value is not None
    assert longer.limited_by == "memory"
    assert 512 < longer.value < POSITIONS
    assert longer.value % LENGTH_STEP == 0
    at_most, beyond = (report_on(gpu, longer.value + more, **values) for more in (0, LENGTH_STEP))
    assert (at_most.fits[0].fits, at_most.longer_rows) == ("yes", None)
    assert beyond.fits[0].fits != "yes"
    if values["training__gradient_checkpointing"] == "on":  # which an open setting takes for a limit
        assert longer_on(gpu) == longer


def test_the_positions_of_a_model_bound_its_rows() -> None:
    longer = longer_on("RTX 4090")
    assert longer is not None
    assert (longer.value, longer.limited_by) == (POSITIONS, "the positions of the model")
    assert longer_on("RTX 4090", POSITIONS) is None


def test_longer_rows_are_not_looked_for_where_rows_are_joined_or_do_not_fit() -> None:
    assert report_on("RTX 4090", 512, data__packing="true").longer_rows is None
    assert longer_on("512MiB") is None


def test_a_larger_model_is_proposed_where_the_run_fits_and_one_has_a_preset() -> None:
    larger = report_on("RTX 4090", 512).larger_model
    assert larger == larger_model(find_gpu("RTX 4090"), 135_000_000, 512)
    assert larger is not None
    assert report_on("1GiB", 512).larger_model is None


def test_rows_beyond_a_bound_are_looked_for_only_if_asked() -> None:
    longer = report_on("H200", 512, model__name="qwen2.5-0.5b").longer_rows
    assert longer is not None
    assert (longer.value, longer.limited_by) == (MOST_TOKENS, None)
