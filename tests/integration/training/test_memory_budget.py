"""What a plan leaves of a run's memory budget is spent on layers in 16 bit, once, and the run stays with them."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_cli.calibrating.divergence_parts import LayerPart
from qlora_cli.errors import ModelError, OutOfMemoryError
from qlora_cli.events import Noted, PhaseStarted, StepDone
from qlora_cli.loading.loader import load_model
from qlora_cli.loading.save import save_quantized
from qlora_cli.memory.gpus import find_gpu
from qlora_cli.settings.models import TrainSettings
from qlora_cli.settings.resolve import Resolved
from qlora_cli.training.checks import kept_layers, memory_plan
from qlora_cli.training.checks.kept_layers import PlannedMemory, planned_memory, that_fit
from qlora_cli.training.checks.predicted_memory import estimator_of
from qlora_cli.training.run_plan import SettledRun, settle_run
from qlora_cli.training.train_run import train
from qlora_cli.units import GIB, MIB
from tests.conftest import ASSETS, Recorder, short_settings
from tests.support.models.loading import load, load_settings

ROWS = ASSETS / "train.jsonl"
BUDGET, SKIPPED = "training.memory_budget", "quantization.skip_modules"
MEASURING = "Measuring what each layer costs"

Asked = Callable[..., Resolved[TrainSettings]]


@pytest.fixture(scope="module")
def asked(shallow_base: Path) -> Asked:
    def settings(output: Path, **flags: Any) -> Resolved[TrainSettings]:
        given = {"training.save_steps": 1, "training.schedule": "constant", "training.max_steps": 1, **flags}
        return short_settings(shallow_base, Path(f"{ROWS}#40"), output, **given)

    return settings


def memory_of(settled: SettledRun) -> PlannedMemory:
    """Return the planned run on the whole machine, to be given less."""
    settings, load_plan = settled.resolved.settings, settled.load_plan
    longest = memory_plan.longest_row(settings, settled.rows)
    estimator = estimator_of(settings, load_plan)
    return planned_memory(settings, load_plan, settled.outlook, estimator, longest_row=longest)


@pytest.fixture(scope="module")
def budget(asked: Asked, tmp_path_factory: pytest.TempPathFactory) -> int:
    """What the run takes, with half of the bytes that all of its layers would take more unquantized."""
    settled = settle_run(asked(tmp_path_factory.mktemp("unused") / "run"), Recorder())
    memory = memory_of(settled)
    figures = memory.estimate_of(memory.asked, memory.device).predicted
    growth = figures.reserved_high_bytes / figures.reserved_bytes
    half = sum(settled.load_plan.layout.extra_bytes.values()) // 2
    budget = figures.process_high_bytes + int(growth * half)
    assert replace(memory, device=replace(memory.device, total_bytes=budget)).spare_bytes == pytest.approx(
        half, rel=0.01
    )
    return budget


def trained(settings: Resolved[TrainSettings]) -> Recorder:
    recorder = Recorder()
    train(settings, recorder)
    return recorder


def losses(recorder: Recorder) -> list[float]:
    return [event.loss for event in recorder.events if isinstance(event, StepDone)]


def record_of(run: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((run / "run.json").read_text())
    return record


@pytest.fixture(scope="module")
def run(asked: Asked, budget: int, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Recorder]:
    output = tmp_path_factory.mktemp("runs") / "run"
    return output, trained(asked(output, **{BUDGET: budget}))


@pytest.fixture(scope="module")
def losses_of_two_steps(
    run: tuple[Path, Recorder], asked: Asked, tmp_path_factory: pytest.TempPathFactory
) -> list[float]:
    """Those of a run that names the same layers itself."""
    names = ",".join(record_of(run[0])["plan"]["kept_layers"]["modules"])
    settings = asked(tmp_path_factory.mktemp("named") / "run", **{SKIPPED: names, "training.max_steps": 2})
    return losses(trained(settings))


def test_the_gain_is_shown_and_the_layers_are_those_of_the_run(
    run: tuple[Path, Recorder], losses_of_two_steps: list[float], budget: int
) -> None:
    output, recorder = run
    record = record_of(output)
    kept = record["plan"]["kept_layers"]
    assert kept["budget_bytes"] == budget
    assert 0 < kept["extra_bytes"] <= kept["spare_bytes"]
    assert 0 < len(kept["modules"]) < kept["num_layers"]
    assert kept["mean_kl"] < kept["mean_kl_quantized"]
    notes = [event.message for event in recorder.events if isinstance(event, Noted)]
    assert any(f"{len(kept['modules'])} of {kept['num_layers']} layers stay unquantized" in note for note in notes)
    assert record["settings"]["quantization"]["skip_modules"] == kept["modules"]
    assert record["origins"][SKIPPED] == BUDGET
    assert "layers stay unquantized" in (output / "adapter" / "README.md").read_text()
    assert losses(recorder) == losses_of_two_steps[:1]
    loaded = load_model(load_settings(output))
    assert {name for name, why in loaded.layout.unquantized.items() if why == "as asked"} == set(kept["modules"])


def test_a_resumed_run_measures_nothing_and_keeps_its_layers(
    run: tuple[Path, Recorder], losses_of_two_steps: list[float], asked: Asked, budget: int
) -> None:
    output, first = run
    before = record_of(output)
    second = trained(asked(output, **{BUDGET: budget, "training.max_steps": 2}))
    assert losses(first) + losses(second) == losses_of_two_steps
    assert any(event == PhaseStarted(title=MEASURING) for event in first.events)
    assert not any(event == PhaseStarted(title=MEASURING) for event in second.events)
    after = record_of(output)
    assert after["settings"]["quantization"] == before["settings"]["quantization"]
    assert after["plan"]["kept_layers"] == before["plan"]["kept_layers"]
    assert after["origins"][SKIPPED] == BUDGET


def test_with_calibrate_the_other_layers_are_calibrated_and_the_base_is_stored_so(
    run: tuple[Path, Recorder], asked: Asked, budget: int, tmp_path: Path
) -> None:
    flags = {BUDGET: budget, "training.calibrate": True, "training.calibration_tokens": 100}
    trained(asked(tmp_path / "run", **flags))
    record = record_of(tmp_path / "run")
    assert record["plan"]["kept_layers"] == record_of(run[0])["plan"]["kept_layers"]
    modules = set(record["plan"]["kept_layers"]["modules"])
    stored = json.loads((tmp_path / "run" / "base" / "config.json").read_text())["quantization_config"]
    assert modules <= set(stored["llm_int8_skip_modules"])
    again = trained(asked(tmp_path / "run", **flags, **{"training.max_steps": 2}))
    assert len(losses(again)) == 1
    assert not any(event == PhaseStarted(title=MEASURING) for event in again.events)
    assert record_of(tmp_path / "run")["plan"]["kept_layers"] == record["plan"]["kept_layers"]


def test_too_much_is_refused_and_too_little_keeps_nothing(asked: Asked, budget: int, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="suffice for every layer unquantized") as caught:
        settle_run(asked(tmp_path / "run", **{BUDGET: 2 * budget}), Recorder())
    assert caught.value.setting == BUDGET
    too_little = asked(tmp_path / "run", **{BUDGET: budget // 2})
    with pytest.raises(OutOfMemoryError, match="libraries included, and the budget is") as refused:
        settle_run(too_little, Recorder())
    assert refused.value.setting == BUDGET
    recorder = Recorder()
    settled = settle_run(too_little, recorder, force=True)
    assert settled.kept is None
    assert settled.resolved.settings.quantization.skip_modules is None
    assert any("none stays" in event.message for event in recorder.events if isinstance(event, Noted))


def test_a_comparison_that_takes_too_much_memory_ends_in_a_message(
    asked: Asked, budget: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(kept_layers, "predict_on_rows", fail)
    with pytest.raises(OutOfMemoryError, match="with itself unquantized took more memory") as caught:
        settle_run(asked(tmp_path / "run", **{BUDGET: budget}), Recorder())
    assert caught.value.setting == BUDGET


def test_a_base_that_is_stored_quantized_has_no_layers_to_choose(shallow_base: Path, tmp_path: Path) -> None:
    save_quantized(load(shallow_base), tmp_path / "nf4", Recorder())
    asked = short_settings(tmp_path / "nf4", Path(f"{ROWS}#4"), tmp_path / "run", **{BUDGET: GIB})
    with pytest.raises(ModelError, match="is quantized already") as caught:
        settle_run(asked, Recorder())
    assert caught.value.setting == BUDGET


def test_on_a_gpu_the_budget_bounds_the_plan_and_the_rest_is_spent(
    asked: Asked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `--quant auto`, on a card that has ample memory for 16 bit."""
    gpu = replace(find_gpu("RTX 4090"), total_bytes=GIB, context_bytes=0, context_high_bytes=0)
    monkeypatch.setattr(memory_plan, "current_gpu", lambda _: gpu)
    flags = {
        **{"quantization.method": "auto", "training.gradient_checkpointing": "off"},
        **{"training.micro_batch_size": 1, "training.gradient_accumulation_steps": 2},
    }
    settled = settle_run(asked(tmp_path / "run", **flags, **{BUDGET: "33MiB"}), Recorder())
    assert settled.resolved.settings.quantization.method.is_quantized
    assert settled.kept is not None
    assert settled.kept.modules
    assert settled.resolved.settings.quantization.skip_modules == settled.kept.modules
    assert settled.outlook is not None
    assert settled.outlook.estimate.predicted.process_high_bytes <= 33 * MIB


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_as_many_layers_are_chosen_as_are_predicted_to_fit(share: float) -> None:
    """The run lacks 5 bytes more than what the layers take, as an allocator does."""
    parts = [LayerPart(name=str(number), mean_kl=1.0 + number, extra_bytes=10) for number in range(20)]
    free = int(share * 200)

    chosen = that_fit(parts, 200, lambda names: max(0, 10 * len(names) + 5 - free))
    most = max(0, (free - 5) // 10)
    assert most - 1 <= len(chosen) <= most
    assert [part.name for part in chosen] == sorted(str(number) for number in range(20 - len(chosen), 20))
