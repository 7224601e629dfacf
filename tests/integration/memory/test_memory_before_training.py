"""On a GPU, `train` predicts before it reads weights; the GPU is given by its figures, since there may be none."""

from dataclasses import replace
from pathlib import Path

import pytest
from bitsandbytes.functional import name2qmap

from qlora_cli.cli.rendering.training_text import plan_rows
from qlora_cli.errors import OutOfMemoryError
from qlora_cli.events import Noted, SilentReporter
from qlora_cli.loading.load_plan import LoadPlan, plan_load
from qlora_cli.loading.loader import load_planned
from qlora_cli.memory.estimator import Estimator
from qlora_cli.memory.gpus import Gpu, find_gpu
from qlora_cli.settings.choices import Checkpointing
from qlora_cli.settings.models import TrainSettings
from qlora_cli.settings.settle import resolved_in_code, with_values
from qlora_cli.training.checks.predicted_memory import check_memory, current_gpu
from qlora_cli.training.run_plan import prepare_run
from qlora_cli.units import MIB
from tests.conftest import Recorder, train_settings

LENGTH = 64


def card(num_bytes: int) -> Gpu:
    """Return a GPU with this much memory, none of it used by a context."""
    return replace(find_gpu("RTX 4090"), total_bytes=num_bytes, context_bytes=0, context_high_bytes=0)


@pytest.fixture
def settings(base_model: Path, rows: Path, tmp_path: Path) -> TrainSettings:
    return train_settings(base_model, rows, tmp_path / "run").settings


@pytest.fixture
def load_plan(settings: TrainSettings) -> LoadPlan:
    return plan_load(resolved_in_code(settings), SilentReporter())


@pytest.mark.fast
def test_a_run_that_fits_continues_with_its_prediction(settings: TrainSettings, load_plan: LoadPlan) -> None:
    reporter = Recorder()
    outlook = check_memory(settings, load_plan, card(1 << 34), reporter, longest_row_tokens=LENGTH, force=False)
    assert outlook is not None
    predicted = outlook.predicted
    assert predicted.fits == "yes"
    assert 0 < predicted.allocated_bytes <= predicted.reserved_bytes <= predicted.process_bytes
    (note,) = [event for event in reporter.events if isinstance(event, Noted)]
    assert note.message.startswith("planned: gradient checkpointing off ")


@pytest.mark.parametrize("error", [IndexError("no such layer"), RuntimeError("no meta kernel"), MemoryError()])
def test_a_prediction_that_fails_ends_no_run(
    settings: TrainSettings, load_plan: LoadPlan, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(Estimator, "estimate", fail)
    reporter = Recorder()
    assert check_memory(settings, load_plan, card(MIB), reporter, longest_row_tokens=LENGTH, force=False) is None
    (note,) = [event for event in reporter.events if isinstance(event, Noted)]
    assert note.message == f"its memory can't be predicted: {type(error).__name__}: {error}"


def test_a_run_that_cannot_fit_stops_with_exit_3_and_what_would_fit(
    settings: TrainSettings, load_plan: LoadPlan
) -> None:
    with pytest.raises(OutOfMemoryError) as caught:
        check_memory(settings, load_plan, card(MIB), Recorder(), longest_row_tokens=LENGTH, force=False)
    assert caught.value.exit_code == 3
    assert "1.00 MiB are usable" in str(caught.value)
    assert "--force" in str(caught.value.hint)


def test_force_continues_and_warns(settings: TrainSettings, load_plan: LoadPlan) -> None:
    reporter = Recorder()
    outlook = check_memory(settings, load_plan, card(MIB), reporter, longest_row_tokens=LENGTH, force=True)
    assert outlook is not None
    predicted = outlook.predicted
    assert predicted.fits == "no"
    planned, note = [event for event in reporter.events if isinstance(event, Noted)]
    assert planned.message.startswith("planned: ")
    assert note.level == "warning"


def test_the_hint_names_flags_that_fit(settings: TrainSettings, load_plan: LoadPlan) -> None:
    large = settings.model_copy(
        update={
            "training": with_values(
                settings.training,
                micro_batch_size=16,
                gradient_accumulation_steps=1,
                gradient_checkpointing=Checkpointing.OFF,
            )
        }
    )
    roomy = check_memory(large, load_plan, card(1 << 34), Recorder(), longest_row_tokens=LENGTH, force=False)
    one = settings.model_copy(
        update={"training": with_values(large.training, micro_batch_size=1, gradient_accumulation_steps=16)}
    )
    least = check_memory(one, load_plan, card(1 << 34), Recorder(), longest_row_tokens=LENGTH, force=False)
    assert roomy is not None
    assert least is not None
    between = (roomy.predicted.allocated_bytes + least.predicted.allocated_bytes) // 2
    assert least.predicted.allocated_bytes < between < roomy.predicted.allocated_bytes
    with pytest.raises(OutOfMemoryError) as caught:
        check_memory(large, load_plan, card(between), Recorder(), longest_row_tokens=LENGTH, force=False)
    assert "--micro-batch-size" in str(caught.value.hint) or "--gradient-checkpointing" in str(caught.value.hint)


def test_longer_rows_take_more_memory(settings: TrainSettings, load_plan: LoadPlan) -> None:
    few, many = (
        check_memory(settings, load_plan, card(1 << 34), Recorder(), longest_row_tokens=length, force=False)
        for length in (16, 128)
    )
    assert few is not None
    assert many is not None
    assert few.predicted.allocated_bytes < many.predicted.allocated_bytes


def test_a_prediction_leaves_no_state_that_loading_would_trip_over(
    settings: TrainSettings, load_plan: LoadPlan
) -> None:
    check_memory(settings, load_plan, card(1 << 34), Recorder(), longest_row_tokens=LENGTH, force=False)
    assert all(levels.device.type != "meta" for levels in name2qmap.values())
    load_planned(load_plan, SilentReporter())


def test_nothing_is_predicted_without_a_gpu(base_model: Path, rows: Path, tmp_path: Path, load_plan: LoadPlan) -> None:
    if load_plan.device.type == "cuda":
        pytest.skip("a GPU is here")
    assert current_gpu(load_plan) is None
    plan = prepare_run(train_settings(base_model, rows, tmp_path / "other"), Recorder()).plan
    assert plan.predicted_memory is None
    assert "GPU memory" not in dict(plan_rows(plan))
