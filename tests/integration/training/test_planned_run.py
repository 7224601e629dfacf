"""A run on a GPU as it is planned: settings, record, and what happens if it does not fit after all.

The GPU is given by its figures; what is planned for it trains on the CPU, with the same result.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_cli.errors import OutOfMemoryError
from qlora_cli.events import Noted, StepDone
from qlora_cli.memory.fitting.division import MICRO_BATCH_TOKENS
from qlora_cli.memory.gpus import Gpu, find_gpu
from qlora_cli.settings.models import TrainSettings
from qlora_cli.settings.resolve import Resolved, Sources, resolve
from qlora_cli.training import run_plan
from qlora_cli.training.checks import memory_plan
from qlora_cli.training.checks.predicted_memory import check_memory
from qlora_cli.training.run_plan import PreparedRun, prepare_run, settle_run
from qlora_cli.training.train_run import run
from qlora_cli.units import GIB
from tests.conftest import Recorder, train_settings

CHECKPOINTING = "training.gradient_checkpointing"


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    """Plan for a GPU on which everything fits."""
    gpu = replace(find_gpu("RTX 4090"), total_bytes=GIB, context_bytes=0, context_high_bytes=0)
    monkeypatch.setattr(memory_plan, "current_gpu", lambda _: gpu)
    return gpu


def notes_of(recorder: Recorder) -> list[str]:
    return [event.message for event in recorder.events if isinstance(event, Noted)]


def fail_unless_recomputed(prepared: PreparedRun) -> None:
    """Run out of memory, as a GPU would, unless all activations are recomputed."""
    base = prepared.model.get_base_model()
    layers = [module for module in base.modules() if hasattr(module, "gradient_checkpointing")]

    def check(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        functions = [layer._gradient_checkpointing_func for layer in layers if layer.gradient_checkpointing]
        is_trial = inputs[0].shape[0] == 2  # the head is checked before, with a row of its own
        if is_trial and (not functions or "context_fn" in functions[0].keywords):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    prepared.model.get_input_embeddings().register_forward_pre_hook(check)


@pytest.mark.usefixtures("on_a_gpu")
def test_the_plan_is_recorded_with_its_origin(base_model: Path, rows: Path, tmp_path: Path) -> None:
    recorder = Recorder()
    prepared = prepare_run(train_settings(base_model, rows, tmp_path / "run"), recorder)
    assert prepared.plan.gradient_checkpointing == "off"
    assert prepared.resolved.origins[CHECKPOINTING].where == "the plan for this GPU"
    assert prepared.plan.predicted_memory is not None
    (planned,) = [note for note in notes_of(recorder) if note.startswith("planned: ")]
    assert planned.startswith("planned: gradient checkpointing off ")
    assert "; selective " in planned
    assert "; on " in planned


@pytest.mark.usefixtures("on_a_gpu")
def test_what_was_asked_for_is_kept(base_model: Path, rows: Path, tmp_path: Path) -> None:
    asked = train_settings(base_model, rows, tmp_path / "run", training__gradient_checkpointing="on")
    recorder = Recorder()
    prepared = prepare_run(asked, recorder)
    assert prepared.plan.gradient_checkpointing == "on"
    assert prepared.resolved.origins[CHECKPOINTING] == asked.origins[CHECKPOINTING]
    assert not [note for note in notes_of(recorder) if note.startswith("planned: ")]


@pytest.mark.usefixtures("on_a_gpu")
def test_a_plan_that_does_not_fit_gives_way_to_leaner_ones(
    base_model: Path, rows: Path, tmp_path: Path, default_run: Path
) -> None:
    asked = train_settings(base_model, rows, tmp_path / "run", training__auto_micro_batch=True)
    prepared = prepare_run(asked, Recorder())
    at_first = prepared.plan.predicted_memory
    fail_unless_recomputed(prepared)
    recorder = Recorder()
    run(prepared, recorder)
    assert notes_of(recorder)[:2] == [
        "2 rows at once with gradient checkpointing off do not fit in memory: now selective",
        "2 rows at once with gradient checkpointing selective do not fit in memory: now on",
    ]
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["settings"]["training"]["gradient_checkpointing"] == "on"
    assert record["origins"][CHECKPOINTING] == "the plan for this GPU"
    assert record["plan"]["gradient_checkpointing"] == "on"
    assert at_first is not None
    assert record["plan"]["predicted_memory"]["allocated_bytes"] < at_first.allocated_bytes
    name = "adapter/adapter_model.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (default_run / name).read_bytes()


@pytest.mark.usefixtures("on_a_gpu")
def test_the_leanest_plan_that_does_not_fit_ends_the_run(base_model: Path, rows: Path, tmp_path: Path) -> None:
    prepared = prepare_run(train_settings(base_model, rows, tmp_path / "run"), Recorder())

    def fail(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        if inputs[0].shape[0] == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    prepared.model.get_input_embeddings().register_forward_pre_hook(fail)
    recorder = Recorder()
    with pytest.raises(OutOfMemoryError, match="in the forward pass, tried before the first step"):
        run(prepared, recorder)
    assert [note.rpartition(" ")[2] for note in notes_of(recorder) if "do not fit" in note] == ["selective", "on"]


@pytest.mark.usefixtures("on_a_gpu")
def test_the_planned_products_of_a_run_count_where_selective_was_asked_for(
    base_model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = train_settings(base_model, rows, tmp_path / "run", training__gradient_checkpointing="selective")
    prepared = prepare_run(asked, Recorder())
    assert prepared.settings.training.kept_products is not None
    run(prepared, Recorder())
    earlier = []

    def spy(*args: Any, **kwargs: Any) -> Any:
        earlier.append(kwargs["earlier"])
        return check_memory(*args, **kwargs)

    monkeypatch.setattr(memory_plan, "check_memory", spy)
    again = train_settings(
        base_model, rows, tmp_path / "run", training__gradient_checkpointing="selective", training__epochs=3
    )
    prepare_run(again, Recorder())
    (plan,) = earlier
    assert tuple(plan.values["training.kept_products"]) == prepared.settings.training.kept_products
    assert not plan.ran_out


@pytest.mark.usefixtures("on_a_gpu")
def test_a_run_that_ran_out_of_memory_resumes_with_less(base_model: Path, rows: Path, tmp_path: Path) -> None:
    asked = train_settings(base_model, rows, tmp_path / "run", training__save_steps=1)
    prepared = prepare_run(asked, Recorder())

    def fail(*_: Any) -> None:
        if (tmp_path / "run" / "checkpoints" / "step-1").exists():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    hook = prepared.model.get_input_embeddings().register_forward_pre_hook(fail)
    with pytest.raises(OutOfMemoryError) as caught:
        run(prepared, Recorder())
    expected = (
        "Give the same command again: it goes on with gradient checkpointing selective. The training until step "
    )
    assert str(caught.value.hint).startswith(expected)
    hook.remove()
    recorder = Recorder()
    resumed = prepare_run(asked, recorder)
    assert resumed.resume is not None
    assert resumed.resume.step > 0
    assert resumed.plan.gradient_checkpointing == "selective"
    (planned,) = [note for note in notes_of(recorder) if note.startswith("planned: ")]
    assert planned.endswith(", since the run ran out of memory")
    run(resumed, Recorder())
    again = prepare_run(train_settings(base_model, rows, tmp_path / "run", training__epochs=3), Recorder())
    assert again.plan.gradient_checkpointing == "selective"


def in_steps_of_six(model: Path, rows: Path, output: Path, **flags: object) -> Resolved[TrainSettings]:
    """Return settings that leave open how the six rows of a step are divided into micro-batches."""
    values = {
        "model.name": str(model),
        "model.dtype": "fp32",
        "model.device": "cpu",
        "data.dataset": str(rows),
        "output.directory": str(output),
        "training.gradient_accumulation_steps": 6,
        "training.epochs": 2,
        "training.schedule": "constant",
        "training.warmup_ratio": 0,
        **{name.replace("__", "."): value for name, value in flags.items()},
    }
    return resolve(Sources(flags={path: (path, value) for path, value in values.items()}), TrainSettings)


def losses_of(recorder: Recorder) -> list[float]:
    return [event.loss for event in recorder.events if isinstance(event, StepDone)]


@pytest.mark.usefixtures("on_a_gpu")
def test_short_rows_fill_micro_batches_without_another_result(base_model: Path, rows: Path, tmp_path: Path) -> None:
    prepared = prepare_run(in_steps_of_six(base_model, rows, tmp_path / "run"), Recorder())
    longest = prepared.plan.longest_row_tokens
    assert prepared.plan.micro_batch_tokens is not None
    assert prepared.plan.micro_batch_tokens >= longest
    assert prepared.plan.micro_batch_tokens % longest == 0
    assert prepared.plan.padding_share == 0
    assert prepared.resolved.origins[MICRO_BATCH_TOKENS].where == "the plan for this GPU"
    filled, alone = Recorder(), Recorder()
    run(prepared, filled)
    asked = in_steps_of_six(base_model, rows, tmp_path / "alone", training__micro_batch_size=1)
    one_row = prepare_run(asked, Recorder())
    assert one_row.plan.micro_batch_tokens is None
    run(one_row, alone)
    assert losses_of(filled) == pytest.approx(losses_of(alone), rel=1e-4)
    assert len(losses_of(filled)) == 4


@pytest.mark.usefixtures("on_a_gpu")
@pytest.mark.parametrize(
    "flags",
    [{"data__packing": True}, {"training__neftune_noise_alpha": 5.0}, {"training__micro_batch_tokens": 4000}],
)
def test_what_depends_on_micro_batches_or_was_given_is_not_planned(
    base_model: Path, rows: Path, tmp_path: Path, flags: dict[str, object]
) -> None:
    settled = settle_run(in_steps_of_six(base_model, rows, tmp_path / "run", **flags), Recorder())
    assert settled.resolved.settings.training.micro_batch_tokens == flags.get("training__micro_batch_tokens")
    assert settled.resolved.origins[CHECKPOINTING].where == "the plan for this GPU"


def test_a_resumed_run_has_the_micro_batches_that_were_planned(
    base_model: Path, rows: Path, tmp_path: Path, on_a_gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = in_steps_of_six(base_model, rows, tmp_path / "run")
    prepared = prepare_run(asked, Recorder())
    run(prepared, Recorder())
    # A CPU, on which nothing is planned, and another GPU, for which other micro-batches would be.
    slow = replace(on_a_gpu, name="T4", total_bytes=on_a_gpu.total_bytes // 2)
    for gpu in (None, slow):
        monkeypatch.setattr(memory_plan, "current_gpu", lambda _, gpu=gpu: gpu)
        longer = in_steps_of_six(base_model, rows, tmp_path / "run", training__epochs=3)
        resumed = prepare_run(longer, Recorder())
        assert resumed.resume is not None
        assert resumed.plan.micro_batch_tokens == prepared.plan.micro_batch_tokens
        assert resumed.resolved.origins[MICRO_BATCH_TOKENS].where == "the plan for this GPU"
        given = in_steps_of_six(base_model, rows, tmp_path / "run", training__epochs=3, training__micro_batch_size=1)
        assert prepare_run(given, Recorder()).plan.micro_batch_tokens is None


@pytest.mark.usefixtures("on_a_gpu")
def test_a_model_that_mixes_rows_has_one_a_micro_batch_without_a_warning(
    base_model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_plan, "packing_fault_of", lambda *_: "a state passes from one to the next")
    recorder = Recorder()
    prepared = prepare_run(in_steps_of_six(base_model, rows, tmp_path / "run"), recorder)
    assert prepared.plan.micro_batch_tokens is None
    assert prepared.resolved.origins[CHECKPOINTING].where == "the plan for this GPU"
    (note,) = [event for event in recorder.events if isinstance(event, Noted) and "keep joined rows" in event.message]
    assert note.message.startswith("the planned micro-batches are not used, and rows are padded: ")
    assert note.level == "info"
